"""How an island's loops are arranged.

TVM's lowering leaves one nest of loops for each operator, and for a softmax or a norm several. Here cheap ones move
into those that read them, so that reshapes, permutations, masks and scales cost nothing, and matrix products get tiles
of registers. LLVM makes vectors of the rest.
"""

from __future__ import annotations

import math
import re
from typing import Any

from tvm.s_tir import Schedule, ScheduleError
from tvm.tirx import IterVar, PrimFunc

_DEAR = re.compile(r"T\.(?:exp|erf|log|tanh|pow|power|sqrt|rsqrt|sin|cos|tan|a\w+h?|call_\w+|reinterpret)\(| / ")
_ROWS = {16: 6, 8: 4, 4: 4}  # of a tile, by lanes: two accumulators each, in 32 or 16 registers
_SHARED = 16384  # elements that are worth a second thread
_REUSE = 2  # a reduction that reads each operand more often than this is a matrix product


def schedule_island(function: PrimFunc, lanes: int, threads: int) -> PrimFunc:
    """Arrange the loops of an island: a function as FuseTIR leaves it, all of its nests in the root block.

    Args:
        lanes: float32 values of a vector.
        threads: that share its larger loops.
    """
    schedule = Schedule(function)
    for block in schedule.get_output_blocks(schedule.get_sblock("root")):
        _write_in_shape(schedule, block)
    for block in _blocks(schedule):
        if _may_move(schedule, block):
            _inline(schedule, block)
    for block in [block for block in _blocks(schedule) if _is_product(schedule, block)]:
        _tile(schedule, block, lanes)
    if threads > 1:
        for block in _blocks(schedule):
            _share(schedule, block)
    return schedule.mod["main"]


def _write_in_shape(schedule: Schedule, block: Any) -> None:
    """Let what computes a result write it where it is wanted: the loops of its own shape vectorize, those over the flat
    result divide for each element.
    """
    for _ in range(2):  # the last two are the reshape to the flat shape, and the product by 1
        producers = list(schedule.get_producers(block))
        if len(producers) != 1 or len(schedule.get_consumers(producers[0])) != 1:
            return
        if not hasattr(schedule.get(producers[0]).body.value, "indices") or _reductions(schedule, producers[0]):
            break
        _inline(schedule, producers[0])
    try:
        schedule.reverse_compute_inline(block)
    except ScheduleError:  # the flat result stays a copy
        return


def _blocks(schedule: Schedule) -> list[Any]:
    return list(schedule.get_child_blocks(schedule.get_sblock("root")))


def _volume(schedule: Schedule, block: Any) -> int:
    return math.prod(int(var.dom.extent) for var in schedule.get(block).iter_vars)


def _reductions(schedule: Schedule, block: Any) -> list[int]:
    """Which of a block's variables are reduced over."""
    return [i for i, var in enumerate(schedule.get(block).iter_vars) if var.iter_type != IterVar.DataPar]


def _is_product(schedule: Schedule, block: Any) -> bool:
    if not _reductions(schedule, block):
        return False
    reads = [math.prod(int(size) for size in region.source.shape) for region in schedule.get(block).reads]
    return bool(reads) and _volume(schedule, block) > _REUSE * max(reads)


def _may_move(schedule: Schedule, block: Any) -> bool:
    """Whether a block computes each element by itself and its readers can do so as cheaply."""
    if _reductions(schedule, block) or block in schedule.get_output_blocks(schedule.get_sblock("root")):
        return False
    readers = list(schedule.get_consumers(block))
    if not readers or any(_is_product(schedule, reader) for reader in readers):
        return False
    work = sum(_volume(schedule, reader) for reader in readers)
    return work <= _volume(schedule, block) or not _DEAR.search(str(schedule.get(block).body))


def _inline(schedule: Schedule, block: Any) -> None:
    try:
        schedule.compute_inline(block)
    except ScheduleError:  # it stays where it is
        return


def _tile(schedule: Schedule, block: Any, lanes: int) -> None:
    """Compute a matrix product in tiles of registers: some rows times two vectors of columns.

    Operands are padded to whole tiles; what computes them moves into the copy.
    """
    columns, rows = _columns_and_rows(schedule, block)
    variables = schedule.get(block).iter_vars
    extents = [int(var.dom.extent) for var in variables]
    if columns is None or extents[columns] < lanes // 2:
        return
    width = 2 * lanes if extents[columns] > lanes else lanes
    height = min(_ROWS[lanes], extents[rows]) if rows is not None else 1
    sizes = [1] * len(variables)
    sizes[columns] = width
    if rows is not None:
        sizes[rows] = height
    if any(extent % size for extent, size in zip(extents, sizes, strict=True)):
        operands = schedule.get_producers(block)
        try:
            schedule.pad_einsum(block, sizes)
        except ScheduleError:
            return
        for operand in operands:
            if not _reductions(schedule, operand) and block not in schedule.get_consumers(operand):
                _inline(schedule, operand)
    loops = schedule.get_loops(block)
    reduced = _reductions(schedule, block)
    j0, j1, j2 = schedule.split(loops[columns], [None, width // lanes, lanes])
    i0, i1 = schedule.split(loops[rows], [None, height]) if rows is not None else (None, None)
    outer = [loop for i, loop in enumerate(loops) if i not in (columns, rows, *reduced)]
    tile = [loop for loop in (i1, j1, j2) if loop is not None]
    head = [*outer, *([] if i0 is None else [i0]), j0]
    schedule.reorder(*head, *(loops[i] for i in reduced), *tile)
    written = schedule.cache_write(block, 0, "local")
    schedule.reverse_compute_at(written, j0)
    schedule.vectorize(j2)
    for loop in tile[:-1]:
        schedule.unroll(loop)
    schedule.vectorize(schedule.split(schedule.get_loops(written)[-1], [None, lanes])[1])
    schedule.decompose_reduction(block, loops[reduced[0]])


def _columns_and_rows(schedule: Schedule, block: Any) -> tuple[int | None, int | None]:
    """Which of a product's variables are the last of its result, and the one before that is no batch."""
    body = schedule.get(block)
    variables = [var.var for var in body.iter_vars]
    order = []
    for part in body.writes[0].region:
        order += [i for i, var in enumerate(variables) if var.same_as(part.min)]
    last = [i for i in order if int(body.iter_vars[i].dom.extent) > 1]
    if not last:
        return None, None
    return last[-1], last[-2] if len(last) > 1 else None


def _share(schedule: Schedule, block: Any) -> None:
    """Let threads share a block's outer loops, where it is large."""
    if _volume(schedule, block) < _SHARED:
        return
    loops = schedule.get_loops(block)
    outer = next((loop for loop in loops if int(schedule.get(loop).extent) > 1), None)
    if outer is None:
        return
    try:
        schedule.parallel(outer)
    except ScheduleError:  # a reduction's
        return
