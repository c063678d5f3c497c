"""Block reconstruction: the weights of a whole block are rounded such that its output is closest, by gradient.

Li et al., "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction", ICLR 2021: block after
block (a residual unit, say), on what the quantized blocks before it give, with AdaRound's relaxation (Nagel et al., "Up
or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020, eq. 21 to 25) over all weights of a block at
once. Theirs weighs outputs by the gradient of the loss, which needs labels; here they count alike. It begins with the
rounding that is there: each weight may go one step to where the error falls. What does not bring a block closer on
images that were held out is taken back.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from lightning_baqe.calibration.moments import Weighted
from lightning_baqe.calibration.walk import Walk
from lightning_baqe.errors import ConfigError
from lightning_baqe.quantization.convert import QuantizedModel
from lightning_baqe.quantization.functional import clamped
from lightning_baqe.quantization.layers import QuantLayer
from lightning_baqe.quantization.ops import OpReader
from lightning_baqe.quantization.train_modes import evaluating
from lightning_baqe.quantization.weight import WeightQuantizer

MOST_STEPS = 1000  # of a block
FEWEST_STEPS = 10
_RATE, _WAY = 0.01, 5.0  # of Adam at least, and so that this way is gone in all steps: from undecided to decided is 2
_LOW, _HIGH = -0.1, 1.1  # AdaRound's gamma and zeta
_PULL = 1.0  # of the term that drives roundings to 0 and 1, against the error that there was
_EXPONENTS = 20.0, 2.0  # of that term, from the first step that has it to the last
_FREE = 0.2  # of the steps, before that term
_BEGIN = 0.1  # of a step
_TINY = 1e-12
_BATCH = 32
_HELD_OUT = 5  # of so many images, one


@dataclass(frozen=True, eq=False)
class Block:
    """Consecutive nodes that read one tensor of what is before them and give one to what is behind them.

    Args:
        source: the node that they read.
        nodes: in order; the last one's value is the block's output.
        layers: paths of the quantized layers that can be reconstructed; none: the block can only be computed.
    """

    source: fx.Node
    nodes: tuple[fx.Node, ...]
    layers: tuple[str, ...]


def blocks(model: QuantizedModel) -> list[Block]:
    """The blocks of a network, in order and without gaps, as short as they can be with a layer in them.

    Nodes between which more than one tensor is alive stay together: residual units, the branches of an inception block.
    What has no weights (a ReLU, an activation quantizer) belongs to the block before it; what comes before several
    inputs are joined belongs to none.
    """
    reader = OpReader(model, model.graph)
    nodes = [node for node in model.graph.nodes if node.op != "output"]
    place = {node: i for i, node in enumerate(nodes)}
    until = {node: max((place.get(user, len(nodes)) for user in node.users), default=-1) for node in nodes}
    # Until the last of several inputs was read there is more than one tensor, whatever the order of the nodes.
    alive = {node for node in nodes if node.op == "placeholder" and until[node] >= 0}
    cuts = []
    for i, node in enumerate(nodes):
        alive = {other for other in alive if until[other] > i}
        if reader[node].kind not in ("value", "constant") and until[node] > i:
            alive.add(node)
        if alive == {node}:
            cuts.append(i)
    found: list[tuple[int, int]] = []
    for begin, end in itertools.pairwise(cuts):
        if any(reader[node].kind == "layer" for node in nodes[begin + 1 : end + 1]):
            found.append((begin, end))
        elif found:
            found[-1] = (found[-1][0], end)
    return [_block(model, nodes[begin], nodes[begin + 1 : end + 1]) for begin, end in found]


def _block(model: QuantizedModel, source: fx.Node, nodes: list[fx.Node]) -> Block:
    read = {other for node in nodes for other in node.all_input_nodes}
    outside = {other for other in read - {source, *nodes} if other.op != "get_attr" and not _is_batch_size(other)}
    calls = [str(node.target) for node in model.graph.nodes if node.op == "call_module"]
    paths = [str(node.target) for node in nodes if node.op == "call_module"]
    layers = [
        path
        for path in paths
        if isinstance(layer := model.get_submodule(path), QuantLayer)
        and isinstance(layer, Weighted)
        and calls.count(path) == 1
    ]
    return Block(source, tuple(nodes), () if outside else tuple(layers))


def _is_batch_size(node: fx.Node) -> bool:
    return node.target is torch.ops.aten.sym_size.int and bool(node.args[1] == 0)


def check_gradients() -> None:
    """Raises ConfigError where no gradients can be computed."""
    if torch.is_inference_mode_enabled():
        raise ConfigError(
            "block reconstruction computes gradients, which torch.inference_mode() rules out: call it outside, or "
            "under torch.no_grad()."
        )


def reconstruct(
    model: QuantizedModel,
    twin: fx.GraphModule,
    batches: Sequence[tuple[Tensor, ...]],
    seconds: float,
    tell: Callable[[str, int, int], None] | None = None,
) -> dict[str, tuple[float, float]]:
    """Reconstruct block after block, in place.

    Args:
        model: calibrated, and corrected or not.
        twin: what :func:`~lightning_baqe.calibration.walk.float_twin` made of it before any correction.
        batches: the network's inputs, each a tensor for each input.
        seconds: for all blocks; each has its share of what is left, :data:`FEWEST_STEPS` steps at least.
        tell: called after each block with its last layer, how many are done, and of how many.

    Returns:
        for each reconstructed block, by its last layer: the mean squared error of its output over the variance of the
        float network's, on the images that were held out, before and after.

    Raises:
        ConfigError: inference mode is on.
    """
    check_gradients()
    found = blocks(model)
    total, done = sum(bool(block.layers) for block in found), 0
    ends = time.monotonic() + seconds
    images = [len(inputs[0]) for inputs in batches]
    here, there = Walk(model, batches), Walk(twin, batches)
    twins = dict(zip(model.graph.nodes, twin.graph.nodes, strict=True))
    behind = {node: block for block in found for node in block.nodes[:1]}
    errors: dict[str, tuple[float, float]] = {}
    with evaluating(model), evaluating(twin):
        for node, other in twins.items():
            if node.op == "output":
                break
            block = behind.get(node)
            if block is not None and block.layers:
                share = (ends - time.monotonic()) / (total - done)
                floats = Task(twin, twins[block.source], tuple(twins[n] for n in block.nodes))
                task = Task(model, block.source, block.nodes)
                mine, theirs = here.values(task.source), there.values(floats.source)
                if _by_image(theirs, images) and _by_image([floats(theirs[0])], images[:1]):
                    layers = [_layer(model, path) for path in block.layers]
                    wanted = floats.run(torch.cat(theirs))
                    errors[block.layers[-1]] = _reconstruct(task, layers, torch.cat(mine), wanted, share)
                done += 1
                if tell is not None:
                    tell(block.layers[-1], done, total)
            for walk, step in ((here, node), (there, other)):
                walk.step(step)
                walk.drop(step)
    return errors


@dataclass(frozen=True, eq=False)
class Task:
    """Nodes of a network that can be computed by themselves, on batches of any size.

    Args:
        model: the network.
        source: the node that they read.
        nodes: in order.
    """

    model: fx.GraphModule
    source: fx.Node
    nodes: tuple[fx.Node, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """What the last node gives for these values of the source, with gradients."""
        run = fx.Interpreter(self.model)
        run.env = {self.source: x}
        for node in self.nodes:
            for other in node.all_input_nodes:
                if other not in run.env:  # read before the block; else it is a parameter or buffer
                    run.env[other] = len(x) if _is_batch_size(other) else run.run_node(other)
            run.env[node] = run.run_node(node)
        found: Tensor = run.env[self.nodes[-1]]
        return found

    @torch.no_grad()
    def run(self, x: Tensor) -> Tensor:
        """The same without gradients, a few images at once."""
        return torch.cat([self(part) for part in x.split(_BATCH)])


def _by_image(values: Sequence[object], images: Sequence[int]) -> bool:
    """Whether these are tensors of so many images each, along their first dimension."""
    return all(isinstance(v, Tensor) and v.ndim > 0 and len(v) == n for v, n in zip(values, images, strict=True))


def _layer(model: QuantizedModel, path: str) -> QuantLayer:
    layer = model.get_submodule(path)
    assert isinstance(layer, QuantLayer)
    return layer


def _reconstruct(
    task: Task, layers: Sequence[QuantLayer], x: Tensor, wanted: Tensor, seconds: float
) -> tuple[float, float]:
    """Of one block, given what it reads and what it should give; the errors before and after."""
    variance = wanted.var().clamp_min(_TINY)
    held = torch.arange(len(x)) % _HELD_OUT == _HELD_OUT - 1
    if not bool(held.any()):
        held[:] = True  # too few to hold some out
    shown = held if bool(held.all()) else ~held
    x_shown, wanted_shown = x[shown], wanted[shown]

    def error(chosen: Tensor) -> Tensor:
        return (task(x_shown[chosen]) - wanted_shown[chosen]).square().mean() / variance

    def error_held_out() -> float:
        return float((task.run(x[held]) - wanted[held]).square().mean() / variance)

    before = error_held_out()
    kept = [(layer.weight_quantizer, layer.weight.detach().clone()) for layer in layers]
    rounded = [quantizer(weight).detach().requires_grad_() for quantizer, weight in kept]
    try:
        with torch.enable_grad():
            slopes = [torch.zeros_like(weight) for weight in rounded]
            for layer, weight in zip(layers, rounded, strict=True):
                layer.weight_quantizer = _Given(weight)  # type: ignore[assignment]
            for part in torch.arange(len(x_shown)).split(_BATCH):
                for slope, more in zip(slopes, torch.autograd.grad(error(part), rounded), strict=True):
                    slope += more * len(part)
            softs = [SoftRounding(q, w, slope) for (q, w), slope in zip(kept, slopes, strict=True)]
            for layer, soft in zip(layers, softs, strict=True):
                layer.weight_quantizer = soft  # type: ignore[assignment]
            _fit(softs, error, len(x_shown), seconds)
    finally:
        for layer, (quantizer, _) in zip(layers, kept, strict=True):
            layer.weight_quantizer = quantizer
    with torch.no_grad():
        for layer, soft in zip(layers, softs, strict=True):
            layer.weight.copy_(soft.decided())
        after = error_held_out()
        if after < before:
            return before, after
        for layer, (_, weight) in zip(layers, kept, strict=True):
            layer.weight.copy_(weight)
    return before, before


def _fit(softs: Sequence[SoftRounding], error: Callable[[Tensor], Tensor], count: int, seconds: float) -> None:
    """Adam on what is undecided, for as many steps as there is time for.

    Args:
        error: of the images with these indices.
        count: of images.
        seconds: as they pass; the exponents' course follows from how many steps fit in, which the steps tell.
    """
    optimizer = torch.optim.Adam([soft.undecided for soft in softs], _RATE)
    generator = torch.Generator().manual_seed(0)
    start, steps, step = time.monotonic(), MOST_STEPS, 0
    first: Tensor | None = None
    while step < steps:
        found = error(torch.randperm(count, generator=generator)[:_BATCH])
        first = found.detach().clamp_min(_TINY) if first is None else first
        loss = found / first
        progress = (step / steps - _FREE) / (1 - _FREE)
        if progress > 0:
            exponent = _EXPONENTS[0] + progress * (_EXPONENTS[1] - _EXPONENTS[0])
            loss = loss + _PULL * torch.stack([soft.indecision(exponent) for soft in softs]).mean()
        # Of nothing else: gradients of the network's own parameters are the user's.
        undecided = [soft.undecided for soft in softs]
        for parameter, slope in zip(undecided, torch.autograd.grad(loss, undecided), strict=True):
            parameter.grad = slope
        step += 1
        each = (time.monotonic() - start) / step
        steps = min(MOST_STEPS, max(FEWEST_STEPS, int(seconds / each)))
        optimizer.param_groups[0]["lr"] = max(_RATE, _WAY / steps)
        optimizer.step()


class _Given(nn.Module):
    """In a weight quantizer's place: these weights, whatever is given."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.given = weight

    def forward(self, weight: Tensor) -> Tensor:
        return self.given


class SoftRounding(nn.Module):
    """In a weight quantizer's place: each weight between its integer and the next one that lowers the error.

    ``s (q + d h(v))`` with h the rectified sigmoid of AdaRound (eq. 23), d the direction and v what is learned; h
    begins near 0.

    Args:
        quantizer: of the layer.
        weight: on or off the grid; it is rounded to the nearest.
        slope: of the error by the weights.
    """

    def __init__(self, quantizer: WeightQuantizer, weight: Tensor, slope: Tensor) -> None:
        super().__init__()
        integers, scale = quantizer.integers(weight)
        step = scale.to(weight).reshape(-1, *[1] * (weight.ndim - 1))
        integers = integers.to(weight)
        reached = clamped(integers - torch.sign(slope * step), *quantizer.bounds(step.shape))
        self.start, self.move = integers * step, (reached - integers) * step
        self.undecided = nn.Parameter(torch.full_like(weight, math.log((_BEGIN - _LOW) / (_HIGH - _BEGIN))))

    def _share(self) -> Tensor:
        return (torch.sigmoid(self.undecided) * (_HIGH - _LOW) + _LOW).clamp(0.0, 1.0)

    def forward(self, weight: Tensor) -> Tensor:
        """The soft weights, whatever is given."""
        return self.start + self.move * self._share()

    def indecision(self, exponent: float) -> Tensor:
        """AdaRound's eq. 24, the mean over the weights: 0 if all are decided."""
        return (1 - (2 * self._share() - 1).abs().pow(exponent)).mean()

    def decided(self) -> Tensor:
        """The weights on their grid."""
        return self.start + self.move * (self._share() >= 0.5).to(self.start)
