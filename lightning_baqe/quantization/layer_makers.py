"""Torch's own layers around tensors that exist already."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from lightning_baqe.quantization.train_modes import freeze_statistics


def make_linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    """A linear layer with these tensors."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight, layer.bias = _as_parameter(weight), _as_parameter(bias)  # type: ignore[assignment]
    return layer


def make_conv(
    kind: type[nn.Module], weight: nn.Parameter, bias: nn.Parameter | None, window: Mapping[str, Any]
) -> nn.Module:
    """A convolution of a kind with these tensors and ATen\'s arguments of its window."""
    options = {key: tuple(v) if isinstance(v, list) else v for key, v in window.items() if v is not None}
    groups, (first, second) = options.get("groups", 1), weight.shape[:2]
    channels = (first, second * groups) if kind is nn.ConvTranspose2d else (second * groups, first)
    layer = kind(*channels, tuple(weight.shape[2:]), bias=bias is not None, device="meta", **options)
    layer.weight, layer.bias = _as_parameter(weight), _as_parameter(bias)  # type: ignore[assignment]
    return layer


def make_batch_norm(
    make: type[nn.BatchNorm2d],
    weight: nn.Parameter | None,
    bias: nn.Parameter | None,
    mean: torch.Tensor,
    variance: torch.Tensor,
    counter: torch.Tensor | None,
    momentum: float,
    eps: float,
    frozen: bool,
) -> nn.Module:
    """A batch norm with these tensors; ``frozen``: its statistics stay in training, too."""
    norm = make(len(mean), eps, momentum, affine=False)
    norm.running_mean, norm.running_var = mean.detach(), variance.detach()
    norm.register_parameter("weight", _as_parameter(weight))
    norm.register_parameter("bias", _as_parameter(bias))
    norm.affine = weight is not None or bias is not None
    if counter is not None:
        norm.num_batches_tracked = counter.clone()
    if frozen:
        freeze_statistics(norm)
    return norm


def _as_parameter(tensor: torch.Tensor | None) -> nn.Parameter | None:
    """A tensor that is no parameter becomes one that does not train."""
    is_parameter = tensor is None or isinstance(tensor, nn.Parameter)
    return cast("nn.Parameter | None", tensor) if is_parameter else nn.Parameter(cast(torch.Tensor, tensor), False)
