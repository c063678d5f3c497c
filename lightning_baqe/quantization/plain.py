"""Plain equivalents of modules that extend torch's.

Convolutions that compute their weights or their padding as they run (timm's ``StdConv2d``, ``Conv2dSame``), linears
with a forward of their own (timm's ``Linear``), batch norms with an activation inside (timm's ``BatchNormAct2d``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lightning_baqe.errors import UnsupportedModelError

# Of a layer's input: (left, right, top, bottom) zeros as functional.pad takes them; None for none.
Padding = tuple[int, ...] | None


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


class _Recorder(TorchFunctionMode):
    """Remembers the arguments of the convolutions, matrix products and paddings that run inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, Any]] = []
        self.pads: list[tuple[int, ...]] = []
        self.outputs: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in (functional.conv2d, torch.conv2d, functional.linear):
            self.calls.append(dict(zip(("input", "weight"), args, strict=False)) | kwargs)
            self.outputs.append(out)
        elif func is functional.pad:
            self.pads.append(tuple(args[1] if len(args) > 1 else kwargs["pad"]))
        return out


def has_fused_activation(module: nn.Module) -> bool:
    """Whether a batch norm has a dropout ``drop`` and an activation ``act`` inside, as timm's ``BatchNormAct2d``."""
    return (
        isinstance(module, nn.BatchNorm2d)
        and isinstance(getattr(module, "act", None), nn.Module)
        and isinstance(getattr(module, "drop", None), nn.Module)
    )


def make_plain(model: nn.Module, example_input: torch.Tensor | None) -> dict[str, Padding]:
    """Turn a model's special layers and batch norms into torch's own, in place.

    A layer keeps the weights that it computes at this moment, and has the padding that the example's size asks
    for. A batch norm with an activation inside loses it; whoever traces calls ``drop`` and ``act`` after it.

    Args:
        model: changed.
        example_input: a batch of any size.

    Returns:
        what stands before each layer that changed, by module path.

    Raises:
        UnsupportedModelError: such a layer without an example input, or one that does more than a layer.
    """
    for module in model.modules():
        if has_fused_activation(module):
            module.__class__ = nn.BatchNorm2d
    special = {
        name: module
        for name, module in model.named_modules()
        if _base(module) is not None and not hasattr(module, "weight_quantizer")
    }
    if not special:
        return {}
    if example_input is None:
        name, module = next(iter(special.items()))
        raise UnsupportedModelError(
            f"layer {name!r} ({type(module).__name__}) has a forward of its own: give example_input to quantize, so "
            "that the weights and the padding that it computes are known"
        )
    found: dict[str, Padding] = {}
    hooks = [
        module.register_forward_hook(lambda m, args, out, name=name: found.update({name: _replay(name, m, args[0])}))
        for name, module in special.items()
    ]
    try:
        with evaluating(model), torch.no_grad():
            model(example_input[:1])
    finally:
        for hook in hooks:
            hook.remove()
    for name, padding in found.items():
        special[name].__class__ = _base(special[name])
        if padding is not None:
            special[name].padding = (0, 0)
    return found


def _base(module: nn.Module) -> type[nn.Conv2d] | type[nn.Linear] | None:
    """torch's class of a layer whose forward is someone's own, None for any other module."""
    for base in (nn.Conv2d, nn.Linear):
        if isinstance(module, base):
            return None if type(module).forward is base.forward else base
    return None


def _replay(name: str, module: nn.Module, x: torch.Tensor) -> Padding:
    """Run a layer once more, recorded, and give it the weights that it used; returns how it padded its input."""
    assert isinstance(module, nn.Conv2d | nn.Linear)
    with _Recorder() as recorder:
        out = module.forward(x)
    if len(recorder.calls) != 1 or out is not recorder.outputs[0] or len(recorder.pads) > 1:
        raise UnsupportedModelError(
            f"layer {name!r} ({type(module).__name__}) does more in its forward than one layer; replace it by an "
            f"{'nn.Conv2d' if isinstance(module, nn.Conv2d) else 'nn.Linear'}"
        )
    conv = recorder.calls[0]
    module.weight.data.copy_(conv["weight"])
    pads = recorder.pads[0] if recorder.pads else None
    if pads is None and tuple(conv["input"].shape) != tuple(x.shape):
        raise UnsupportedModelError(
            f"layer {name!r} ({type(module).__name__}) changes its input's shape from {tuple(x.shape)} to "
            f"{tuple(conv['input'].shape)} before its product; replace it by torch's own"
        )
    return pads
