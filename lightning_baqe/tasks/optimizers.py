"""Optimizers that treat weights and quantizers each in their own way."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from lightning_baqe.errors import ConfigError
from lightning_baqe.quantization.activation import ActivationQuantizer
from lightning_baqe.quantization.weight import WeightQuantizer

OPTIMIZERS = ("adamw", "sgd", "rmsprop")
SCHEDULERS = ("none", "cosine", "warmup_cosine", "onecycle")
WARM_UP = 0.04  # of all steps: Schaefer et al. take 2 of 50 epochs


def parameter_groups(net: nn.Module, learning_rate: float, weight_decay: float, relative: bool) -> list[dict[str, Any]]:
    """Groups for an optimizer: ``weights`` decay; ``vectors`` (biases, batch norms) and quantizers do not.

    Which groups there are follows from the structure of ``net`` alone, so that a checkpoint's optimizer state fits.

    Args:
        net: float or fake-quantized.
        learning_rate: of weights and vectors.
        weight_decay: of weights.
        relative: multiply the quantizers' learning rate by their magnitude: the mean scale of the group, for offsets
            times the number of steps. Adam and RMSProp move a parameter by about its learning rate whatever the
            gradient, while scales are 1e-4 to 1: one absolute rate for all would wipe out the small ones at once. SGD
            needs no such thing: LSQ scales the gradients.

    Raises:
        CalibrationError: a quantizer has no scale yet, so that its magnitude is not known.
    """
    groups: dict[str, dict[str, Any]] = {}
    magnitudes: dict[str, list[float]] = {}
    seen: set[int] = set()

    def add(name: str, parameter: nn.Parameter, decay: float, magnitude: float | None = None) -> None:
        if id(parameter) in seen or not parameter.requires_grad:
            return
        seen.add(id(parameter))
        group = groups.setdefault(name, {"name": name, "params": [], "lr": learning_rate, "weight_decay": decay})
        group["params"].append(parameter)
        if magnitude is not None:
            magnitudes.setdefault(name, []).append(magnitude)

    for module in net.modules():
        if isinstance(module, ActivationQuantizer | WeightQuantizer):
            if relative and isinstance(module, ActivationQuantizer):
                module.require_initialized()
            kind = "activation" if isinstance(module, ActivationQuantizer) else "weight"
            by_channel = isinstance(module.bits, tuple)
            scales, width = module.scale.detach().abs(), "channelwise_" if by_channel else f"{module.bits}"
            scale = float(scales.min() if by_channel else scales.mean())  # no channel may leap over its own
            for name, parameter in module.named_parameters(recurse=False):
                steps = module.qmax if isinstance(module, ActivationQuantizer) and name == "offset" else 1
                add(f"{kind}_{name}_{width}bit", parameter, 0.0, scale * steps)
    for parameter in net.parameters():
        matrix = parameter.ndim > 1
        add("weights" if matrix else "vectors", parameter, weight_decay if matrix else 0.0)
    if relative:
        for name, values in magnitudes.items():
            groups[name]["lr"] = learning_rate * sum(values) / len(values)
    order = {"weights": 0, "vectors": 1}
    return [groups[name] for name in sorted(groups, key=lambda name: (order.get(name, 2), name))]


def make_optimizer(name: str, net: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """``"adamw"``, ``"sgd"`` with Nesterov momentum 0.9, or ``"rmsprop"`` with momentum 0.9 (Schaefer et al., section
    4.1), over :func:`parameter_groups`.
    """
    groups = parameter_groups(net, learning_rate, weight_decay, relative=name != "sgd")
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=learning_rate)
    if name == "rmsprop":
        return torch.optim.RMSprop(groups, lr=learning_rate, alpha=0.9, momentum=0.9)
    return torch.optim.SGD(groups, lr=learning_rate, momentum=0.9, nesterov=True)


def make_scheduler(
    name: str, optimizer: torch.optim.Optimizer, total_steps: float
) -> torch.optim.lr_scheduler.LRScheduler:
    """A schedule over all steps of the training: ``"cosine"`` to 0, ``"warmup_cosine"``, which before that rises evenly
    from 0 for 4 % of the steps, or ``"onecycle"`` (30 % warm-up).

    Raises:
        ConfigError: a training without an end.
    """
    if total_steps == float("inf"):
        raise ConfigError(
            f"scheduler={name!r} needs to know how long training lasts, but the Trainer has no end: give the Trainer "
            "max_epochs or max_steps, or scheduler='none'."
        )
    if name == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=int(total_steps))
    if name == "warmup_cosine":
        warm_up = max(round(WARM_UP * total_steps), 1)
        falling = max(int(total_steps) - warm_up, 1)

        def share(step: int) -> float:
            if step < warm_up:
                return (step + 1) / (warm_up + 1)
            return (1 + math.cos(math.pi * min((step - warm_up) / falling, 1.0))) / 2

        return torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    rates = [group["lr"] for group in optimizer.param_groups]
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rates, total_steps=int(total_steps))
