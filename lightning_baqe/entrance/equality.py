"""The gate of equality: what was traced, and lowered with every layer float, computes what the user's module does."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from lightning_baqe.entrance.network import run_float
from lightning_baqe.errors import BaqeError, UnsupportedModelError
from lightning_baqe.integer.lowering import lower_all
from lightning_baqe.integer.values import Value, named
from lightning_baqe.quantization.aten import origin
from lightning_baqe.quantization.config import FLOAT_BITS, BitConfig
from lightning_baqe.quantization.convert import fake_quantize
from lightning_baqe.quantization.trace import chosen
from lightning_baqe.quantization.train_modes import evaluating

EXACT = 1e-6  # of the largest value, float64 against float64; weights that a layer computes are rounded to float32
LOWERED = 1e-4  # of the largest value, float32 against float64; more where float32 alone is further away
ROUNDED = 4.0  # times the network's own distance between float32 and float64, where its constants are float32
NOISE = 30.0  # times the network's own distance between float32 and float64
MOST = 1e-2  # whatever the noise: a network that is further from itself changes from call to call


def refuse_different(
    model: nn.Module,
    graph: fx.GraphModule,
    inputs: tuple[torch.Tensor, ...],
    returned: Any,
    output: str | int | None,
    fallback: str = "refuse",
) -> None:
    """Compare the user's module, its trace and the trace lowered at 32 bit on real inputs.

    Module and trace are compared in float64 where the module can be copied and runs in it, else in float32; the lowered
    graph computes in float32.

    Args:
        model: the user's module.
        graph: its trace.
        inputs: batches of two.
        returned: what the module returned for them.
        output: which of its outputs is meant.
        fallback: what becomes of operators without an integer meaning.

    Raises:
        UnsupportedModelError: names the first tensor that differs, the module around it and its class; or what has no
            finite values.
    """
    plain = wanted_output(model, returned, output)
    again = wanted_output(model, run_float(model, inputs), output)
    if _distance(again, plain) > (LOWERED if plain.device.type == "cpu" else MOST):  # a GPU may take another algorithm
        raise _changes(model)
    doubled = _in_double(model, inputs, output)
    exact = plain.double() if doubled is None else doubled
    precise = doubled is not None
    network = copy.deepcopy(graph).double() if precise else graph
    try:
        found = _values(network, tuple(x.double() for x in inputs) if precise else inputs)
    except RuntimeError:
        if not precise:
            raise
        exact, precise, network = plain, False, graph  # the trace has types of its own: float32 decides
        found = _values(network, inputs)
    noise = _distance(plain, exact)
    if noise > MOST:
        raise _changes(model)
    # Constants that the network computes as it runs are float32 in the trace: their rounding counts like its own.
    if _distance(found[_last(network)], exact) > (min(max(EXACT, ROUNDED * noise), LOWERED) if precise else LOWERED):
        raise _traced_otherwise(model, network, inputs, found, precise)
    limit = min(max(LOWERED, NOISE * noise), MOST)
    bits, shapes = BitConfig.uniform(model, FLOAT_BITS, FLOAT_BITS), tuple(tuple(x.shape[1:]) for x in inputs)
    quantized = fake_quantize(graph, bits, shapes, fallback=fallback)
    lowered = lower_all(quantized)
    run = lowered.graph.run_all(inputs[0] if len(inputs) == 1 else inputs)
    if _distance(run[lowered.graph.output.name], exact) > limit:
        raise _lowered_otherwise(model, graph, quantized, found, lowered.values, run, limit)


def _last(graph: fx.GraphModule) -> str:
    return str(next(iter(graph.graph.find_nodes(op="output"))).args[0])


def wanted_output(model: nn.Module, returned: Any, output: str | int | None) -> torch.Tensor:
    """The output that is meant of what a network returned; UnsupportedModelError where it is not finite, or one number
    for the whole batch.
    """
    plain = chosen(returned, output, type(model).__name__, torch.Tensor).detach()
    if plain.ndim == 0:
        raise UnsupportedModelError(
            f"{type(model).__name__} returns one number for a whole batch; wanted is a result for each image, "
            "(n, ...): leave the loss out of forward"
        )
    if not bool(torch.isfinite(plain).all()):
        raise UnsupportedModelError(
            f"{type(model).__name__} returns values that are not finite for example_input: "
            f"{int((~torch.isfinite(plain)).sum())} of {plain.numel()}; give real inputs, and check the weights"
        )
    return plain


def _distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, over the largest value; infinite where shapes differ or a number is not finite."""
    found, wanted = found.detach().double().cpu().flatten(), wanted.detach().double().cpu().flatten()
    if found.shape != wanted.shape or not bool(torch.isfinite(found).all()):
        return float("inf")
    if not wanted.numel():
        return 0.0
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))


def _in_double(model: nn.Module, inputs: tuple[torch.Tensor, ...], output: str | int | None) -> torch.Tensor | None:
    """What the module returns in float64; None where it cannot be copied, or does not run in it."""
    try:
        doubled = copy.deepcopy(model).double()
        cast = tuple(x.double() if x.is_floating_point() else x for x in inputs)
        found = wanted_output(doubled, run_float(doubled, cast), output)
    except (BaqeError, RuntimeError, TypeError, copy.Error):
        return None  # tensors of a fixed type are made inside: float32 decides
    return found if found.dtype == torch.float64 else None


class _Recorder(fx.Interpreter):
    """Every node's value by the node's name."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.found: dict[str, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """As the base class, and keep the value."""
        out = super().run_node(n)
        if isinstance(out, torch.Tensor):
            self.found[n.name] = out
        return out


@torch.no_grad()
def _values(graph: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    recorder = _Recorder(graph)
    with evaluating(graph):
        recorder.run(*inputs)
    return recorder.found


def _traced_otherwise(
    model: nn.Module,
    graph: fx.GraphModule,
    inputs: tuple[torch.Tensor, ...],
    found: Mapping[str, torch.Tensor],
    precise: bool,
) -> UnsupportedModelError:
    """Which module's output differs first: each module's is compared with its last traced operator's."""
    try:
        running = copy.deepcopy(model).double() if precise else model
    except (RuntimeError, TypeError):
        running = model
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str, out: Any) -> None:
        if isinstance(out, torch.Tensor):
            outputs[name] = out

    hooks = [
        module.register_forward_hook(lambda m, args, out, name=name: keep(name, out))
        for name, module in running.named_modules()
    ]
    try:
        run_float(running, tuple(x.double() if precise and x.is_floating_point() else x for x in inputs))
    finally:
        for hook in hooks:
            hook.remove()
    last: dict[str, str] = {}
    for node in graph.graph.nodes:
        for path in _around(origin(node).path):
            last[path] = node.name
    modules = dict(model.named_modules())
    for name, wanted in outputs.items():
        if name in last and found[last[name]].shape == wanted.shape and _distance(found[last[name]], wanted) > EXACT:
            kind = type(modules[name]).__name__
            what = f"module {name!r} ({kind})" if name else f"the forward of {kind}"
            return UnsupportedModelError(
                f"what was traced of {what} is not what it computes: its tensor {last[name]!r} differs first. It "
                "depends on something that changes from call to call (random numbers, counters, Python state); let "
                "forward be a function of its input in eval mode"
            )
    return _changes(model)


def _changes(model: nn.Module) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"what was traced of {type(model).__name__} is not what it computes on example_input: it depends on something "
        "that changes from call to call (random numbers, counters, Python state); let forward be a function of its "
        "input in eval mode"
    )


def _around(path: str) -> list[str]:
    parts = path.split(".") if path else []
    return ["", *(".".join(parts[: count + 1]) for count in range(len(parts)))]


def _lowered_otherwise(
    model: nn.Module,
    graph: fx.GraphModule,
    quantized: fx.GraphModule,
    found: Mapping[str, torch.Tensor],
    values: Mapping[str, Value],
    run: Mapping[str, torch.Tensor],
    limit: float,
) -> UnsupportedModelError:
    for node in graph.graph.nodes:
        value = values.get(node.name)
        if value is None or node.name not in found or isinstance(value.index, tuple):
            continue
        base = run[value.name].float()
        if value.index is not None:
            flat = torch.cat([torch.zeros(1), base.flatten()])
            base = flat[value.index.to(torch.int64)]
        wanted = found[node.name]
        if base.numel() == wanted.numel() and _distance(base, wanted) > limit:
            return UnsupportedModelError(
                f"lowered to float32, {named(node, quantized)} does not compute what {type(model).__name__} does: the "
                f"tensor {origin(node).label!r} is off by {_distance(base, wanted):.2g} of its largest value; keep it "
                "out of the network, and report this"
            )
    return UnsupportedModelError(
        f"lowered to float32, {type(model).__name__} does not compute what it does in PyTorch, though no tensor alone "
        "differs; report this"
    )
