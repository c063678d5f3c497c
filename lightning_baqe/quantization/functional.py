"""Fake quantization with learnable scales, as stateless autograd functions of a few elementwise passes each.

| symbol | meaning | shape |
| --- | --- | --- |
| w, x | weights, activations | ``(channels, ...)``, ``(n, ...)`` |
| s | step size (scale), positive | ``(channels,)`` for weights, ``()`` for activations |
| z | zero point, an integer within 0..Q | ``()`` |
| beta | offset of LSQ+, the real value that the lowest integer stands for; ``z = round(-beta / s)`` | ``()`` |
| Qn, Qp | weights become integers within -Qn..Qp | |
| Q | activations become integers within 0..Q | |

LSQ: Esser et al., "Learned Step Size Quantization", ICLR 2020. LSQ+: Bhalgat et al., "LSQ+: Improving low-bit
quantization through learnable offsets and better initialization", CVPR Workshops 2020.
"""

from __future__ import annotations

from typing import Any

import torch

MIN_SCALE = 1e-8


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0] * ctx.factor, None


def scale_gradient(value: torch.Tensor, factor: float) -> torch.Tensor:
    """The value itself, bit for bit, with ``factor`` times its gradient (LSQ, section 2.2)."""
    scaled: torch.Tensor = _ScaleGradient.apply(value, factor)
    return scaled


def _hardtanh_backward(grad: torch.Tensor, value: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """``grad`` where ``low < value < high``, else 0, in one pass."""
    return torch.ops.aten.hardtanh_backward(grad, value, low, high)


class _WeightQuantization(torch.autograd.Function):
    """LSQ eqs. 1-3 for each channel of the first dimension."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, scale: torch.Tensor, qn: int, qp: int) -> torch.Tensor:
        step = scale.detach().clamp_min(MIN_SCALE).to(weight.dtype).reshape(-1, *[1] * (weight.ndim - 1))
        ratio = weight * step.reciprocal()
        out = torch.round(ratio).clamp_(-qn, qp).mul_(step)
        ctx.save_for_backward(weight, step, ratio, out)
        ctx.qn, ctx.qp, ctx.scale_dtype = qn, qp, scale.dtype
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
        weight, step, ratio, out = ctx.saved_tensors
        grad = grads[0].contiguous()
        inside = _hardtanh_backward(grad, ratio, -ctx.qn, ctx.qp)
        grad_scale = None
        if ctx.needs_input_grad[1]:
            # sum of grad * q everywhere, less grad * w/s inside the range: both are row-wise dot products.
            total = torch.linalg.vecdot(grad.flatten(1), out.flatten(1))
            total -= torch.linalg.vecdot(inside.flatten(1), weight.flatten(1))
            grad_scale = (total / step.flatten()).to(ctx.scale_dtype)
        return inside, grad_scale, None, None


def quantize_weight(weight: torch.Tensor, scale: torch.Tensor, qn: int, qp: int) -> torch.Tensor:
    """``s * clamp(round(w / s), -Qn, Qp)``, symmetric, one scale for each output channel (LSQ eqs. 1 and 2).

    Gradients are LSQ's: through to ``w`` where ``-Qn < w/s < Qp``; to ``s`` ``round(w/s) - w/s`` there, ``-Qn`` below
    and ``Qp`` above (eq. 3). A scale below 1e-8 acts as 1e-8.

    Args:
        weight: ``(channels, ...)``.
        scale: ``(channels,)``.

    Returns:
        Same shape as ``weight``.
    """
    out: torch.Tensor = _WeightQuantization.apply(weight, scale, qn, qp)
    return out


class _ActivationQuantization(torch.autograd.Function):
    """LSQ+ eqs. 1, 2, 5 and 6 with the offset rounded to the grid, so that an integer zero point stands for 0."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, zero_point: int, qmax: int
    ) -> torch.Tensor:
        step = float(scale.detach().clamp_min(MIN_SCALE))
        # The reciprocal in single precision: an integer graph multiplies the network's input by this very number.
        inverse = float(torch.tensor(step, dtype=torch.float32).reciprocal())
        ratio = x * inverse
        low, high = -zero_point, qmax - zero_point
        out = torch.round(ratio).clamp_(low, high).mul_(step)
        ctx.save_for_backward(x, ratio, out)
        ctx.step, ctx.low, ctx.high = step, low, high
        ctx.dtypes = scale.dtype, offset.dtype
        return out

    @staticmethod
    def backward(
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, None, None]:
        x, ratio, out = ctx.saved_tensors
        grad = grads[0].contiguous()
        inside = _hardtanh_backward(grad, ratio, ctx.low, ctx.high)
        grad_scale = grad_offset = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            # d/d beta is 1 outside the range. d/ds is round(x/s) - x/s inside, 0 below and Q = high - low above:
            # sum(grad * out) / s counts low below and high above; both are too small by -low = z.
            outside = grad.sum() - inside.sum()
            total = torch.dot(grad.flatten(), out.flatten()) - torch.dot(inside.flatten(), x.flatten())
            grad_scale = (total / ctx.step - ctx.low * outside).to(ctx.dtypes[0])
            grad_offset = outside.to(ctx.dtypes[1])
        return inside, grad_scale, grad_offset, None, None


def quantize_activation(
    x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, zero_point: int, qmax: int
) -> torch.Tensor:
    """``s * (clamp(round(x / s) + z, 0, Q) - z)``, asymmetric, one scale for the tensor.

    Gradients are LSQ+'s (eqs. 5 and 6), straight through the rounding of the offset to a zero point: to ``x`` 1 inside
    the range; to ``s`` ``round(x/s) - x/s`` inside, 0 below and ``Q`` above; to ``beta`` 1 outside the range.
    With ``z = 0`` and an offset that does not learn this is LSQ's unsigned quantizer.

    Args:
        x: any shape.
        scale, offset: shape ``()``; ``offset`` only receives a gradient, its value enters through ``zero_point``.
        zero_point: the integer z, 0 to ``qmax``.
    """
    if x.dtype in (torch.float16, torch.bfloat16):
        return quantize_activation(x.float(), scale, offset, zero_point, qmax).to(x.dtype)
    out: torch.Tensor = _ActivationQuantization.apply(x.contiguous(), scale, offset, zero_point, qmax)
    return out
