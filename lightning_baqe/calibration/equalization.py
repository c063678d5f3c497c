"""Cross-layer equalization: channels between two layers are scaled alike, and the network computes what it did.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, section 4.1: where
all that stands between two layers commutes with positive factors by channel (eq. 6), dividing the outputs of the first
by s and multiplying the inputs of the second by s leaves the function as it was. Theirs, for one scale per tensor of
weights, makes the ranges of both layers' weights equal. Here each output channel has a scale of its own, so the first
layer's weights do not care; what shares a grid are the channels of the tensor between the layers and, for each output
of the second, its weights. As in Xiao et al., "SmoothQuant", ICML 2023, eq. 4 with alpha = 1/2: ``s = sqrt(a / w)``, a
the largest absolute value of a channel, w the second layer's largest weight for it. After a layer by channel
(depthwise) only the tensor counts: ``s = a``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from lightning_baqe.calibration.walk import float_twin
from lightning_baqe.quantization.batch_norm import foldable
from lightning_baqe.quantization.convert import QuantizedModel
from lightning_baqe.quantization.layers import QuantLayer
from lightning_baqe.quantization.ops import OpReader
from lightning_baqe.quantization.train_modes import evaluating
from lightning_baqe.quantization.weight import initial_weight_scale

# Of positive factors by channel it makes no difference whether they come before or after these.
_HOMOGENEOUS = (
    *("quantizer", "dropout", "identity", "relu"),
    *("max_pool", "adaptive_max_pool", "avg_pool", "adaptive_avg_pool"),
)
_MOST = 1e3  # of a factor, and of its inverse


@dataclass(frozen=True, eq=False)
class Pair:
    """Two layers whose channels in between can be scaled.

    Args:
        first: whose output nothing else reads.
        norm: the batch norm right behind it, if there is one; it takes the factors up.
        second: the other layer.
        path: of the second.
    """

    first: QuantLayer
    norm: nn.BatchNorm1d | nn.BatchNorm2d | None
    second: QuantLayer
    path: str

    @property
    def by_channel(self) -> bool:
        """Whether each output of the second layer reads one channel."""
        return self.second.weight.shape[1] == 1 and not isinstance(self.second, nn.Linear)


def pairs(model: QuantizedModel) -> list[Pair]:
    """The pairs of quantized layers, in network order, that can be equalized exactly."""
    reader = OpReader(model, model.graph)
    calls = Counter(op.module for op in reader.ops.values() if op.module is not None)
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    norms: dict[nn.Module, nn.BatchNorm1d | nn.BatchNorm2d] = {pair.layer: pair.norm for pair in foldable(model)}

    def alone(module: nn.Module) -> bool:
        return calls[module] == 1 and all(owners[id(p)] == 1 for p in module.parameters(recurse=False))

    found = []
    for node, op in reader.ops.items():
        second = op.module
        if not isinstance(second, QuantLayer) or isinstance(second, nn.ConvTranspose2d):
            continue
        first = _before(reader, op.inputs[0], norms)
        if first is None or not alone(first) or not alone(second):
            continue
        norm = norms.get(first)
        inputs = second.in_features if isinstance(second, nn.Linear) else second.in_channels
        if len(first.weight) == inputs and (norm is None or (norm.weight is not None and norm.bias is not None)):
            found.append(Pair(first, norm, second, str(node.target)))
    return found


def _before(
    reader: OpReader, node: fx.Node, norms: dict[nn.Module, nn.BatchNorm1d | nn.BatchNorm2d]
) -> QuantLayer | None:
    """The quantized layer whose output, behind homogeneous operators alone, this tensor is."""
    norm: nn.Module | None = None
    while len(reader.consumers[node]) == 1:
        op = reader[node]
        if op.kind == "layer":
            layer = op.module
            if not isinstance(layer, QuantLayer) or isinstance(layer, nn.ConvTranspose2d):
                return None
            return layer if norms.get(layer) is norm else None
        if op.kind == "batch_norm" and norm is None:
            norm = op.module
        elif op.kind not in _HOMOGENEOUS or norm is not None:
            return None
        node = op.inputs[0]
    return None


@torch.no_grad()
def equalize(model: QuantizedModel, batches: Sequence[tuple[Tensor, ...]]) -> int:
    """Equalize all pairs, in place; activation ranges have to be set afterwards.

    Args:
        model: in float it computes what it did, to single precision.
        batches: the network's inputs, each a tensor for each input.

    Returns:
        how many pairs were equalized.
    """
    found = pairs(model)
    largest = _largest(model, found, batches)
    for pair in found:
        _scale(pair, _factors(pair, largest[pair.path]))
    return len(found)


def _largest(model: QuantizedModel, found: Sequence[Pair], batches: Sequence[tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """The largest absolute value of each channel that a second layer reads, by its path."""
    twin, largest = float_twin(model), dict[str, Tensor]()

    def watch(pair: Pair) -> None:
        channel = -1 if isinstance(pair.second, nn.Linear) else 1

        def keep(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            values = arguments[0].transpose(0, channel).flatten(1).abs().amax(1)
            largest[pair.path] = torch.maximum(largest.get(pair.path, values), values)

        twin.get_submodule(pair.path).register_forward_pre_hook(keep)

    for pair in found:
        watch(pair)
    with evaluating(twin):
        for inputs in batches:
            twin(*inputs)
    return largest


def _factors(pair: Pair, largest: Tensor) -> Tensor:
    """s, ``(channels,)``, with a geometric mean of 1 over the channels that count."""
    if pair.by_channel:
        weights = torch.ones_like(largest)
        factors = largest.clone()
    else:
        weights = _columns(pair.second, pair.second.weight).abs().amax(dim=(1, 3)).flatten()
        factors = torch.sqrt(largest / weights)
    counts = (largest > 0) & (weights > 0)
    if not bool(counts.any()):
        return torch.ones_like(largest)
    factors = factors / torch.exp(torch.log(factors[counts]).mean())
    return torch.where(counts, factors, 1.0).clamp(1 / _MOST, _MOST)


def _columns(layer: QuantLayer, weight: Tensor) -> Tensor:
    """A view ``(groups, outputs, inputs, kernel)`` of weights."""
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    return weight.unflatten(0, (groups, -1)).flatten(3) if weight.ndim > 2 else weight[None, ..., None]


def _scale(pair: Pair, factors: Tensor) -> None:
    first, second = pair.first, pair.second
    if pair.norm is not None:
        pair.norm.weight.div_(factors)
        pair.norm.bias.div_(factors)
    else:
        first.weight.div_(factors.reshape(-1, *[1] * (first.weight.ndim - 1)))
        if first.bias is not None:
            first.bias.div_(factors)
        first.weight_quantizer.scale.div_(factors)
    columns = _columns(second, second.weight)
    columns.mul_(factors.reshape(columns.shape[0], 1, -1, 1))
    quantizer = second.weight_quantizer
    if pair.by_channel:
        quantizer.scale.mul_(factors.repeat_interleave(len(second.weight) // len(factors)))
    else:
        quantizer.scale.copy_(initial_weight_scale(second.weight, quantizer.bits))
