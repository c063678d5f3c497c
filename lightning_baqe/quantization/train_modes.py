"""Train and eval modes of networks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards every module has its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def freeze_statistics(norm: nn.Module) -> None:
    """Let a batch norm normalise by its running statistics and leave these as they are, whoever calls ``train()``
    afterwards; copies, too.
    """
    if not is_frozen(norm):
        norm.register_forward_pre_hook(_use_running_statistics)
    norm.eval()


def is_frozen(norm: nn.Module) -> bool:
    """Whether :func:`freeze_statistics` was called on it."""
    return _use_running_statistics in norm._forward_pre_hooks.values()


def _use_running_statistics(module: nn.Module, args: tuple[Any, ...]) -> None:
    module.training = False
