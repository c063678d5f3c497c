"""The front door: a network is checked, traced, and compared with what the user's module computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from lightning_baqe.entrance.equality import refuse_different, wanted_output
from lightning_baqe.entrance.inspection import REFUSED, OperatorReport, Report, inspect, refuse_all
from lightning_baqe.entrance.network import as_inputs, named_network, refuse_unfit, run_float
from lightning_baqe.errors import BaqeError, ConfigError
from lightning_baqe.quantization.trace import trace

FALLBACKS = ("refuse", "float")


@dataclass(frozen=True, eq=False)
class Network:
    """A network that was let in; made by :func:`admit`.

    Args:
        model: the user's module, which stays as it is.
        graph: what it computes; see :func:`lightning_baqe.quantization.trace.trace`.
        inputs: of which it was traced, each a batch of two.
        fallback: what becomes of operators without an integer meaning: ``"refuse"`` or ``"float"``.
    """

    model: nn.Module
    graph: fx.GraphModule
    inputs: tuple[torch.Tensor, ...]
    fallback: str = "refuse"

    @property
    def input_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of each input, without the batch."""
        return tuple(tuple(x.shape[1:]) for x in self.inputs)


def admit(model: nn.Module, example_input: Any, output: str | int | None = None, fallback: str = "refuse") -> Network:
    """Trace a network and make sure that the trace computes what the network does.

    Args:
        model: a float network; what it is wrapped in (``torch.compile``, ``DataParallel``) is taken off.
        example_input: a batch of any size of real inputs; a tuple of batches for several inputs.
        output: of several outputs, the key or number of the one that is wanted.
        fallback: of operators without an integer meaning: ``"refuse"`` or ``"float"``.

    Raises:
        ConfigError: an argument that cannot be right.
        UnsupportedModelError: the network cannot be traced or lowered, or numbers in it are not finite.
    """
    network, report = admit_all(model, example_input, output, fallback)
    refuse_all(report, fallback)
    return network


def admit_all(
    model: nn.Module, example_input: Any, output: str | int | None = None, fallback: str = "refuse"
) -> tuple[Network, Report]:
    """As :func:`admit`, with the operators that are refused in a report instead."""
    if fallback not in FALLBACKS:
        raise ConfigError(f"fallback must be one of {FALLBACKS}, got {fallback!r}")
    model = named_network(model)
    refuse_unfit(model)
    inputs = as_inputs(example_input, model)
    wanted = run_float(model, inputs)
    wanted_output(model, wanted, output)
    graph = trace(model, inputs, output)
    report = inspect(model, graph, inputs, fallback)
    if report.ok:
        refuse_different(model, graph, inputs, wanted, output, fallback)
    return Network(model, graph, inputs, fallback), report


def check(model: nn.Module, example_input: Any, output: str | int | None = None) -> Report:
    """What :func:`lightning_baqe.quantize` makes of each operator of a network; nothing is trained, nothing changed.

    Args:
        model, example_input, output: as for :func:`lightning_baqe.quantize`.

    Returns:
        the report; ``print(report)`` shows a table. A network that cannot be traced at all is one refused operator.
    """
    try:
        return admit_all(model, example_input, output, "float")[1]
    except BaqeError as error:
        name = type(model).__name__
        return Report((OperatorReport(name, "", name, REFUSED, str(error)),))
