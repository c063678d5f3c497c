"""Tables of numbers in a Relax function as loops that make them: FuseTIR joins loops, and takes no constant tensors.

TVM's translator makes such tables where torch had none: weights of a norm without weights, the indices of a roll or of
an upsampling, scalars of a ``where``. They are uniform or consist of a few even steps.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import IRModule, relax, te, tirx
from tvm.ir.expr import GenericConst

MOST_PIECES = 256  # pieces of a table, all of which become code


class TableError(ValueError):
    """A table of too many pieces."""


def even_pieces(values: np.ndarray) -> list[tuple[int, Any, Any]]:
    """A vector in pieces of even steps: ``(first index, first value, step)`` of each."""
    pieces: list[tuple[int, Any, Any]] = []
    whole = np.issubdtype(values.dtype, np.integer)
    end = 0
    while end < len(values):
        first, step = end, 0
        end += 1
        if end < len(values) and (whole or values[end] == values[first]):
            step = values[end] - values[first] if whole else 0  # of floats only equal ones
            while end < len(values) and values[end] == values[end - 1] + step:
                end += 1
        pieces.append((first, values[first], step))
    return pieces


def table_function(values: np.ndarray) -> tirx.PrimFunc:
    """Loops that write a table; TableError where it has more than :data:`MOST_PIECES`."""
    dtype = str(values.dtype)
    numbers = values.reshape(-1).astype("int64") if dtype == "bool" else values.reshape(-1)
    pieces = even_pieces(numbers)
    if len(pieces) > MOST_PIECES:
        raise TableError(f"it needs a table of {values.size} numbers that TVM cannot keep in code")

    def piece(index: Any, first: int, last: int) -> Any:
        if first < last:
            middle = (first + last + 1) // 2
            later = piece(index, middle, last)
            return tirx.if_then_else(index >= pieces[middle][0], later, piece(index, first, middle - 1))
        start, value, step = pieces[first]
        number = tirx.const(value.item(), str(numbers.dtype))
        return number if step == 0 else number + ((index - start) * int(step)).astype(str(numbers.dtype))

    def element(*indices: Any) -> Any:
        flat = tirx.const(0, "int64")
        for index, size in zip(indices, values.shape, strict=True):
            flat = flat * size + index
        return piece(flat, 0, len(pieces) - 1).astype(dtype)

    shape = [tirx.IntImm("int64", size) for size in values.shape]  # as Relax has them
    return te.create_prim_func([te.compute(shape, element, name="table")]).without_attr("global_symbol")


@relax.expr_functor.mutator
class _Tables(relax.PyExprMutator):
    def visit_generic_const_(self, op: GenericConst) -> relax.Expr:
        values = op.value.numpy()
        function = self.builder_.add_func(table_function(values), "table")
        return self.builder_.emit(relax.call_tir(function, [], relax.TensorType(values.shape, str(values.dtype))))


def make_tables(module: IRModule) -> IRModule:
    """The module whose function ``main``, which calls loops only, makes its constant tensors by loops, too.

    TableError where that is too much code.
    """
    mutator = _Tables(module)
    for variable, function in module.functions.items():
        if isinstance(function, relax.Function):
            mutator.builder_.update_func(variable, mutator.visit_expr(function))
    return mutator.builder_.get()
