"""Islands: runs of float operators inside an integer network, each compiled to one kernel by TVM's own lowering.

Torch exports an island as a small program, TVM's translator imports it, Relax legalizes its operators to loops, and
FuseTIR joins all loops of the island to one function with its intermediate values inside. That function is a kernel
like any other: it takes the values that the island reads, its constants, and the buffers that it writes; it has a key,
is compiled once and kept. So Relax's own pipeline never meets our kernels, nor they it.

All values that an island reads from the network and all that it writes are plain float32 buffers, row-major.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from tvm import IRModule, relax
from tvm.tirx import PrimFunc

from lightning_baqe.errors import BuildError
from lightning_baqe.integer.float_operators import FloatOperator, Shape, call_operator
from lightning_baqe.kernels.island_schedule import schedule_island
from lightning_baqe.kernels.relax_tables import make_tables
from lightning_baqe.kernels.vector_functions import VECTOR_FUNCTIONS


@dataclass(frozen=True)
class IslandStep:
    """One operator.

    Args:
        operator: name of the ATen overload.
        arguments: as of a :class:`~lightning_baqe.integer.float_operators.FloatOperator` as JSON; ``"%k"`` is the k-th
            operand.
        operands: for each, the index of the value (the island's sources, then the results of its steps), and the shape
            that the operator takes it in.
    """

    operator: str
    arguments: str
    operands: tuple[tuple[int, Shape], ...]


@dataclass(frozen=True)
class IslandSpec:
    """All that the code of an island depends on.

    Args:
        sources: shapes and types of the buffers that it reads: values, then constants.
        steps: its operators, in order.
        results: the steps whose results it writes, as ``(1, values)``.
        lanes: float32 values of a vector.
        threads: that share its loops.
        torch: version of torch, which decomposes operators before TVM sees them.
    """

    sources: tuple[tuple[Shape, str], ...]
    steps: tuple[IslandStep, ...]
    results: tuple[int, ...]
    lanes: int
    threads: int
    torch: str = torch.__version__

    @property
    def op(self) -> str:
        """The kind of kernel, for its name."""
        return "island"


@dataclass(frozen=True, eq=False)
class Island:
    """An island of a graph: its code and what it takes.

    Args:
        spec: of its code.
        sources: names of the nodes whose values it reads.
        constants: that it takes after them.
        results: names of the nodes whose values it writes.
    """

    spec: IslandSpec
    sources: tuple[str, ...]
    constants: tuple[torch.Tensor, ...]
    results: tuple[str, ...]


def make_island(
    nodes: Sequence[FloatOperator], results: Sequence[str], buffers: dict[str, Shape], lanes: int, threads: int
) -> Island:
    """The island of some operators.

    Args:
        nodes: in order; operators that are not among them are not run through on the way from one to another.
        results: names of those whose values are wanted.
        buffers: ``{node that is read: shape of its buffer}``; what is missing has ``(1, values)``.
        lanes, threads: of the spec.
    """
    inside = {node.name: index for index, node in enumerate(nodes)}
    sources = list(dict.fromkeys(name for node in nodes for name in node.inputs if name not in inside))
    shapes: dict[str, Shape] = {}
    for node in nodes:
        for name, shape in zip(node.inputs, node.shapes, strict=True):
            shapes[name] = buffers.get(name, (1, torch.Size(shape).numel()))
    constants = [constant for node in nodes for constant in node.constants.values()]
    taken = [(shapes[name], "float32") for name in sources]
    taken += [(tuple(constant.shape), str(constant.dtype).removeprefix("torch.")) for constant in constants]
    steps, used = [], len(sources)
    for node in nodes:
        references = {f"%{k}": k for k in range(len(node.inputs))}
        operands = []
        for name, shape in zip(node.inputs, node.shapes, strict=True):
            at = len(taken) + inside[name] if name in inside else sources.index(name)
            operands.append((at, shape))
        for key, constant in node.constants.items():
            references[f"@{key}"] = len(operands)
            operands.append((used, tuple(constant.shape)))
            used += 1
        arguments = json.dumps(_renamed(node.arguments, references))
        steps.append(IslandStep(node.operator, arguments, tuple(operands)))
    written = tuple(inside[name] for name in results)
    spec = IslandSpec(tuple(taken), tuple(steps), written, lanes, threads)
    return Island(spec, tuple(sources), tuple(constants), tuple(results))


def _renamed(value: Any, references: dict[str, int]) -> Any:
    if isinstance(value, list | tuple):
        return [_renamed(part, references) for part in value]
    return f"%{references[value]}" if isinstance(value, str) and value in references else value


def can_compile(node: FloatOperator) -> bool:
    """Whether :func:`check_compiles` finds nothing wrong with an operator."""
    return _refusal(_alone(node)) is None


def check_compiles(node: FloatOperator) -> None:
    """Import one operator as a build would; what was imported once is remembered.

    Raises:
        BuildError: TVM does not know the operator, or not with these arguments and shapes.
    """
    why = _refusal(_alone(node))
    if why is not None:
        raise BuildError(f"{node.name!r}: {why}")


def _alone(node: FloatOperator) -> IslandSpec:
    return make_island([node], [node.name], {}, 1, 1).spec


@lru_cache(maxsize=4096)
def _refusal(spec: IslandSpec) -> str | None:
    try:
        _import(spec)
    except BuildError as error:
        return str(error)
    return None


def build_island(spec: IslandSpec) -> PrimFunc:
    """An island's TIR function of (sources, results); BuildError names an operator that TVM cannot import."""
    try:
        function = _import(spec)
    except BuildError:
        for step in spec.steps:  # whose fault is it?
            operands = tuple((index, shape) for index, (_, shape) in enumerate(step.operands))
            taken = tuple((shape, _dtype(spec, at)) for at, shape in step.operands)
            _import(IslandSpec(taken, (IslandStep(step.operator, step.arguments, operands),), (0,), 1, 1))
        raise
    return schedule_island(function, spec.lanes, spec.threads)


def _dtype(spec: IslandSpec, at: int) -> str:
    return spec.sources[at][1] if at < len(spec.sources) else "float32"


def _extreme(reduce: Callable[..., relax.Expr]) -> Callable[[torch.fx.Node, Any], relax.Var]:
    """What imports ``amax`` or ``amin``, which the translator does not know."""

    def convert(node: torch.fx.Node, importer: Any) -> relax.Var:
        axes = node.args[1] if len(node.args) > 1 else None
        keep = node.args[2] if len(node.args) > 2 else False
        value = importer.env[node.args[0]]
        found: relax.Var = importer.block_builder.emit(reduce(value, axis=axes or None, keepdims=keep))
        return found

    return convert


_CONVERTERS = {"amax.default": _extreme(relax.op.max), "amin.default": _extreme(relax.op.min)}


class _Program(torch.nn.Module):
    """An island as torch runs it. Each result is multiplied by 1, so that none is an operand or another result; the
    compiler drops that.
    """

    def __init__(self, spec: IslandSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, *sources: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = list(sources)
        for step in self.spec.steps:
            operands = {f"%{k}": values[at].reshape(shape) for k, (at, shape) in enumerate(step.operands)}
            arguments = json.loads(step.arguments)
            if step.operator == "group_norm.default":  # the translator wants gain and shift
                channels = operands["%0"].shape[1]
                for place, number in ((2, 1.0), (3, 0.0)):
                    if arguments[place] is None:
                        arguments[place] = f"%{len(operands)}"
                        operands[arguments[place]] = torch.full((channels,), number)
            values.append(call_operator(step.operator, arguments, operands))
        return tuple(values[len(sources) + at].reshape(1, -1) * 1.0 for at in self.spec.results)


def _select(value: torch.Tensor, dim: int, index: int) -> torch.Tensor:
    """``select.int`` as a slice: TVM's gather would read before the tensor for a negative index."""
    return value.narrow(dim, index % value.shape[dim], 1).squeeze(dim)


@cache
def _decompositions() -> Any:
    table = torch.export.default_decompositions()
    table[torch.ops.aten.select.int] = _select
    return table


def _import(spec: IslandSpec) -> PrimFunc:
    """An island's loops as TVM makes them, in one function."""
    from tvm.relax.frontend.torch import from_exported_program  # slow to import; most networks do without

    what = ", ".join(
        f"aten::{step.operator} of {', '.join(str(shape) for _, shape in step.operands)}" for step in spec.steps
    )
    example = tuple(torch.zeros(shape, dtype=getattr(torch, dtype)) for shape, dtype in spec.sources)
    try:
        with torch.no_grad():
            program = torch.export.export(_Program(spec), example).run_decompositions(_decompositions())
        module = from_exported_program(program, run_ep_decomposition=False, custom_convert_map=_CONVERTERS)
    except Exception as error:  # the translator asserts, and raises whatever its look-ups raise
        raise _cannot_import(what, error) from error
    try:
        function = _joined(module)
    except (RuntimeError, ValueError) as error:
        raise _cannot_import(what, error) from error
    wanted = [tuple(node.meta["val"].shape) for node in next(iter(program.graph.find_nodes(op="output"))).args[0]]
    found = [tuple(map(int, buffer.shape)) for buffer in function.params[-len(wanted) :]]
    if found != wanted:
        raise _cannot_import(what, ValueError(f"its results have the shapes {found} there, {wanted} in PyTorch"))
    return function


def _cannot_import(what: str, error: Exception) -> BuildError:
    detail = (str(error).strip().splitlines() or [""])[-1]
    return BuildError(
        f"TVM cannot import {what} ({type(error).__name__}: {detail}); write the operator with others, or leave it out "
        "of the network that is compiled"
    )


def _joined(module: IRModule) -> PrimFunc:
    """The loops of a Relax module's main function as one function."""
    legal = make_tables(relax.transform.LegalizeOps(VECTOR_FUNCTIONS)(module))
    main = legal["main"]
    builder = relax.BlockBuilder(IRModule({name: f for name, f in legal.functions.items() if isinstance(f, PrimFunc)}))
    island = builder.add_func(main.with_attr("Primitive", 1).without_attr("global_symbol"), "island")
    parameters = [relax.Var(f"p{index}", parameter.ty) for index, parameter in enumerate(main.params)]
    with builder.function("main", parameters):
        with builder.dataflow():
            out = builder.emit_output(relax.Call(island, parameters))
        builder.emit_func_output(out)
    fused = relax.transform.DeadCodeElimination()(relax.transform.FuseTIR()(builder.get()))
    functions = [function for function in fused.functions.values() if isinstance(function, PrimFunc)]
    if len(functions) != 1:
        raise RuntimeError("a part of it is no loop to TVM, but a call of a library")
    return functions[0]
