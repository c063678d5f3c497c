"""HAWQ-V3's treatment of batch norm (section III-B): train unfolded, freeze the statistics, fold, go on training.

Yao et al., "HAWQ-V3: Dyadic Neural Network Quantization", ICML 2021. Lowering folds by itself; folding beforehand lets
training go on with the very weights and scales that the device will use.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from lightning_baqe.errors import UnsupportedModelError
from lightning_baqe.quantization.convert import QuantizedModel
from lightning_baqe.quantization.functional import MIN_SCALE
from lightning_baqe.quantization.layers import QuantLayer
from lightning_baqe.quantization.ops import OpReader
from lightning_baqe.quantization.train_modes import freeze_statistics
from lightning_baqe.quantization.weight import WeightQuantizer

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# Not transposed convolutions: their output channels are not the weight's first dimension.
Layer = nn.Conv2d | nn.Conv1d | nn.Linear
AnyModule = TypeVar("AnyModule", bound=nn.Module)


class FoldedBatchNorm(nn.Identity):
    """What stands where a batch norm was until :func:`fold_batch_norm` put it into the layer before."""


@dataclass(frozen=True, eq=False)
class Foldable:
    """A batch norm that one layer's weights can take in.

    Args:
        layer: whose output nothing but the batch norm reads.
        norm: the batch norm.
        names: module paths by which the network calls the batch norm.
    """

    layer: Layer
    norm: nn.BatchNorm1d | nn.BatchNorm2d
    names: tuple[str, ...]


def foldable(model: QuantizedModel) -> tuple[Foldable, ...]:
    """The batch norms that can be folded, in network order: those right after a conv or linear, their only reader.

    Left out are a layer or a batch norm that the network also calls elsewhere, in other company, and a layer that
    shares its parameters with another one: there, no one set of weights would do for all.
    """
    reader = OpReader(model, model.graph)
    calls = Counter(op.module for op in reader.ops.values() if op.module is not None)
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    found: dict[tuple[Layer, nn.BatchNorm1d | nn.BatchNorm2d], list[str]] = {}
    for node, op in reader.ops.items():
        layer, norm = (reader[op.inputs[0]].module if op.inputs else None), op.module
        if reader.is_attached(node) and isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d) and isinstance(layer, Layer):
            found.setdefault((layer, norm), []).append(str(node.target))
    return tuple(
        Foldable(layer, norm, tuple(dict.fromkeys(names)))
        for (layer, norm), names in found.items()
        if calls[layer] == calls[norm] == len(names)
        and all(owners[id(p)] == 1 for p in layer.parameters(recurse=False))
    )


def is_folded(model: nn.Module) -> bool:
    """Whether :func:`fold_batch_norm` folded anything in it."""
    return any(isinstance(module, FoldedBatchNorm) for module in model.modules())


def gain_and_shift(norm: nn.BatchNorm1d | nn.BatchNorm2d, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What a batch norm does in eval mode, ``gain * x + shift``: float64 on the CPU, both of shape ``(channels,)``.

    Args:
        name: its module path, or that of the layer before it.

    Raises:
        UnsupportedModelError: it has no running statistics.
    """
    _require_statistics(norm, name)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, variance = norm.running_mean.double().cpu(), norm.running_var.double().cpu()
    gamma = torch.ones_like(mean) if norm.weight is None else norm.weight.detach().double().cpu()
    beta = torch.zeros_like(mean) if norm.bias is None else norm.bias.detach().double().cpu()
    gain = gamma / torch.sqrt(variance + norm.eps)
    return gain, beta - mean * gain


def _require_statistics(norm: Any, name: str) -> None:
    if norm.running_mean is None or norm.running_var is None:
        raise UnsupportedModelError(
            f"the batch norm at {name!r} keeps no running statistics; use track_running_stats=True, and train it"
        )


@torch.no_grad()
def fold_batch_norm(model: QuantizedModel) -> QuantizedModel:
    """Fold batch norms into the layers before them, in place; in eval mode the network's function stays what it was.

    With the gain ``g = gamma / sqrt(running variance + eps)`` of each output channel, weights become ``g * w``, weight
    scales ``|g| * s``, and the bias takes up the rest; the sign of ``g`` becomes the weight quantizer's ``sign``, since
    the range of the integers is not symmetric. So the integers stay the same, whatever ``g``: where rounding would
    carry a weight across the border between two integers, it takes the value of its own. A channel of gain 0 keeps its
    scale, its weights become 0; scales below 1e-8 act as 1e-8. Float layers take the gain up in their weights.

    A :class:`FoldedBatchNorm`, an identity, takes each folded batch norm's place; batch norms that cannot be folded
    (see :func:`foldable`) stay. Weights, scales and biases stay the same ``nn.Parameter`` objects with new values;
    only a layer without a bias gets a new one. It learns if the batch norm's shift did. The batch norms' parameters are
    gone, and gradients have new units: an optimizer that was made before must be made again
    (:class:`lightning_baqe.callbacks.FreezeBatchNorm` does).

    In training mode the function changes, from statistics of the batch to running ones. A state_dict of a folded
    network loads into a folded one only.

    Args:
        model: what :func:`quantize` returned; calibrated, trained or neither.

    Returns:
        the same model.

    Raises:
        UnsupportedModelError: a batch norm without running statistics; nothing was changed then.
    """
    found = foldable(model)
    affine = [gain_and_shift(pair.norm, pair.names[0]) for pair in found]
    for pair, (gain, shift) in zip(found, affine, strict=True):
        _scale(pair.layer, gain)
        _shift(pair, gain, shift)
        for name in pair.names:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, FoldedBatchNorm().train(pair.norm.training))
    return model


def _by_channel(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _scale(layer: Layer, gain: torch.Tensor) -> None:
    weight = layer.weight
    product = weight.double().cpu() * _by_channel(gain, weight)
    if not isinstance(layer, QuantLayer):
        weight.copy_(product)
        return
    quantizer: WeightQuantizer = layer.weight_quantizer
    integers, before = quantizer.integers(weight)
    after = before.cpu() * gain
    quantizer.scale.copy_(torch.where(after == 0, before.cpu(), after).abs())
    quantizer.sign = torch.where(after < 0, -1.0, 1.0).to(weight)
    weight.copy_(product)
    found, scale = quantizer.integers(weight)
    crossed = (found != integers) & _by_channel(after.abs() >= MIN_SCALE, weight).to(weight.device)
    weight.copy_(torch.where(crossed, (integers * _by_channel(scale, weight)).to(weight.dtype), weight))


def _shift(pair: Foldable, gain: torch.Tensor, shift: torch.Tensor) -> None:
    layer, norm = pair.layer, pair.norm
    learns = any(p is not None and p.requires_grad for p in (layer.bias, norm.bias))
    if layer.bias is None:
        layer.bias = nn.Parameter(shift.to(layer.weight))
    else:
        layer.bias.copy_(shift + layer.bias.double().cpu() * gain)
    layer.bias.requires_grad_(learns)


def freeze_batch_norm(model: AnyModule) -> AnyModule:
    """Let every batch norm normalise by its running statistics from now on, and leave these as they are; in place.

    That holds in training mode, too, whoever calls ``train()`` afterwards, and for copies. Gains and shifts still
    learn. Freezing again changes nothing.

    Args:
        model: any network, float or fake-quantized.

    Returns:
        the same model.

    Raises:
        UnsupportedModelError: a batch norm without running statistics; nothing was changed then.
    """
    norms = {name: module for name, module in model.named_modules() if isinstance(module, BATCH_NORMS)}
    for name, norm in norms.items():
        _require_statistics(norm, name)
    for norm in norms.values():
        freeze_statistics(norm)
    return model
