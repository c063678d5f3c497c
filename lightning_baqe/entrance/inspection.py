"""What becomes of each operator of a network, before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass
from io import StringIO
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import fx, nn

from lightning_baqe.calibration.activation_ranges import set_ranges
from lightning_baqe.errors import BuildError, UnsupportedModelError
from lightning_baqe.integer.float_operators import FloatOperator
from lightning_baqe.integer.lowering import Lowered, lower_all
from lightning_baqe.integer.values import named
from lightning_baqe.quantization.aten import name_of, origin
from lightning_baqe.quantization.config import BitConfig
from lightning_baqe.quantization.convert import QuantizedModel, fake_quantize
from lightning_baqe.quantization.ops import OpReader

INTEGER, FLOAT, REFUSED = "integer", "float", "refused"
_STAYS_FLOAT = 'With fallback="float" it stays float'
_NO_OPERATORS = ("input", "output", "constant", "value", "part", "quantizer", "literal")


@dataclass(frozen=True)
class OperatorReport:
    """What becomes of one operator.

    Args:
        operator: its name.
        path: of the module whose forward calls it; ``""`` for the network itself.
        module: that module's class.
        becomes: ``"integer"``; ``"float"``: it has no integer meaning, and can stay float by ``fallback="float"``; or
            ``"refused"``.
        advice: why it is no integer and what to do; ``""`` where it is one.
    """

    operator: str
    path: str
    module: str
    becomes: str
    advice: str = ""


@dataclass(frozen=True)
class Report:
    """What becomes of a network's operators, in its order."""

    operators: tuple[OperatorReport, ...]

    @property
    def refused(self) -> tuple[OperatorReport, ...]:
        return tuple(operator for operator in self.operators if operator.becomes == REFUSED)

    @property
    def floats(self) -> tuple[OperatorReport, ...]:
        """What stays float where ``fallback="float"``, and is refused without."""
        return tuple(operator for operator in self.operators if operator.becomes == FLOAT)

    @property
    def ok(self) -> bool:
        """Whether nothing is refused."""
        return not self.refused

    def __str__(self) -> str:
        table = Table("operator", "module", "class", "becomes", "why, and what to do")
        for row in self.operators:
            table.add_row(row.operator, row.path, row.module, row.becomes, row.advice)
        text = StringIO()
        Console(file=text, width=160).print(table)
        return text.getvalue()


def inspect(model: nn.Module, graph: fx.GraphModule, inputs: tuple[Any, ...], fallback: str) -> Report:
    """Every operator of a traced network, lowered at 8 bits with ranges from these inputs.

    Args:
        model: the user's module.
        graph: its trace.
        inputs: batches of two.
        fallback: of operators without an integer meaning: ``"refuse"`` or ``"float"``.
    """
    shapes = tuple(tuple(x.shape[1:]) for x in inputs)
    bits = BitConfig.uniform(model)  # with the scales that cost least: how good they are does not matter here
    quantized = fake_quantize(graph, bits, shapes, weight_init="lsq", activation_range="minmax", fallback=fallback)
    set_ranges(quantized.eval(), [inputs if len(inputs) > 1 else inputs[0]])
    lowered = lower_all(quantized, collect=True)
    refused = dict(lowered.refused) | _not_compiled(lowered, quantized)
    rows = []
    for node, op in OpReader(quantized, quantized.graph).ops.items():
        if op.kind in _NO_OPERATORS and node.name not in refused:
            continue
        found = origin(node)
        what = type(op.module).__name__ if op.module is not None else name_of(node)
        kind = found.kind.rpartition(".")[2]
        if node.name in refused:
            becomes, advice = REFUSED, refused[node.name]
        elif node.name in lowered.floats:
            becomes, advice = FLOAT, f"{lowered.floats[node.name]}. {_STAYS_FLOAT}"
        else:
            becomes, advice = INTEGER, ""
        rows.append(OperatorReport(what, found.path, kind, becomes, advice))
    return Report(tuple(rows))


def _not_compiled(lowered: Lowered, quantized: QuantizedModel) -> dict[str, str]:
    """The float operators that the compiler does not know, by the names of their nodes."""
    if not lowered.floats:
        return {}
    from lightning_baqe.kernels.islands import check_compiles  # TVM, which most networks need later alone

    operators = {node.name: node for node in lowered.graph if isinstance(node, FloatOperator)}
    found = {}
    for node in quantized.graph.nodes:
        operator = operators.get(lowered.values[node.name].name) if node.name in lowered.floats else None
        if operator is not None:
            try:
                check_compiles(operator)
            except BuildError as error:
                found[node.name] = f"{named(node, quantized)}: {error}"
    return found


def refuse_all(report: Report, fallback: str) -> None:
    """Raise UnsupportedModelError with all refusals of a report, if there are any."""
    reasons = list(dict.fromkeys(row.advice for row in report.refused))
    if reasons:
        more = f" ({len(report.refused)} operators in all)" if len(report.refused) > 1 else ""
        if fallback == "refuse":
            more += '. lightning_baqe.check tells which of them quantize(..., fallback="float") keeps float'
        raise UnsupportedModelError("; ".join(reasons) + more)
