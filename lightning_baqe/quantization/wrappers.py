"""What networks come in: wrapped, or without shapes."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from lightning_baqe.errors import UnsupportedModelError


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel``."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def refuse_lazy(name: str, tensor: torch.Tensor) -> None:
    """Raises UnsupportedModelError if a parameter or buffer has no shape yet."""
    if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
        raise UnsupportedModelError(
            f"{name!r} is not initialised: a lazy module gets its shape from the first batch; run the network on "
            "one before"
        )
