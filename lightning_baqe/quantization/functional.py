"""Fake quantization with learnable scales, as stateless autograd functions of a few elementwise passes each.

Each has two forms of the same arithmetic. On a CPU the passes go block by block through the cache, in place, and the
numbers of a whole tensor are Python's. For ``torch.compile``, which fuses by itself, and for other devices, where a
number of Python's would wait for the device, they are plain tensor operations.

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

from lightning_baqe.quantization.gradient_scaling import STRAIGHT, GradientScaling

MIN_SCALE = 1e-8
Bound = int | torch.Tensor  # of all channels, or of each, ``(channels,)``
_BLOCK_ELEMENTS = 2**18


def clamped(values: torch.Tensor, qn: Bound, qp: Bound) -> torch.Tensor:
    """Within -Qn..Qp."""
    low: Any = -qn
    high: Any = qp
    return values.clamp(low, high)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, factor: float | torch.Tensor) -> torch.Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0] * ctx.factor, None


def scale_gradient(value: torch.Tensor, factor: float | torch.Tensor) -> torch.Tensor:
    """The value itself, bit for bit, with ``factor`` times its gradient (LSQ, section 2.2)."""
    scaled: torch.Tensor = _ScaleGradient.apply(value, factor)
    return scaled


def _in_blocks(x: torch.Tensor) -> bool:
    """Which of the two forms serves it."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _blocks(rows: int, row_length: int) -> list[slice]:
    """Row ranges of about 1 MiB, so that successive passes over a block stay in the cache."""
    size = max(1, _BLOCK_ELEMENTS // max(row_length, 1))
    return [slice(start, start + size) for start in range(0, rows, size)]


def _mask(grad: torch.Tensor, value: torch.Tensor, low: float, high: float, out: torch.Tensor) -> None:
    """Write ``grad`` where ``low < value < high``, else 0, in one pass."""
    torch.ops.aten.hardtanh_backward.grad_input(grad, value, low, high, grad_input=out)


class _WeightQuantization(torch.autograd.Function):
    """LSQ eqs. 1-3 for each channel of the first dimension."""

    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, scale: torch.Tensor, qn: int, qp: int, gradient: GradientScaling
    ) -> torch.Tensor:
        rows = weight.flatten(1)
        step = scale.detach().clamp_min(MIN_SCALE).to(weight.dtype)[:, None]
        inverse = step.reciprocal()
        ctx.qn, ctx.qp, ctx.scale_dtype, ctx.gradient = qn, qp, scale.dtype, gradient
        out = torch.empty_like(rows)
        for block in _blocks(rows.shape[0], rows.shape[1]):
            part = torch.mul(rows[block], inverse[block], out=out[block])
            part.round_().clamp_(-qn, qp).mul_(step[block])
        ctx.save_for_backward(weight, step, out)
        return out.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        weight, step, out = ctx.saved_tensors
        rows, grad = weight.flatten(1), grads[0].flatten(1)
        inverse = step.reciprocal()
        inside = torch.empty_like(rows)
        grad_scale = torch.empty_like(step)
        blocks = _blocks(rows.shape[0], rows.shape[1])
        buffers = torch.empty(
            2, *rows[blocks[0]].shape, dtype=rows.dtype
        )  # fresh memory would cost more than the passes
        for block in blocks:
            ratio, total = buffers[:, : len(rows[block])]
            torch.mul(rows[block], inverse[block], out=ratio)
            _mask(grad[block], ratio, -ctx.qn, ctx.qp, out=inside[block])
            # grad * q everywhere, less grad * w/s inside the range; q = out / s.
            torch.mul(grad[block], out[block], out=total).addcmul_(inside[block], rows[block], value=-1)
            torch.sum(total, 1, keepdim=True, out=grad_scale[block])
            if ctx.gradient.kind != STRAIGHT.kind:
                inside[block] = ctx.gradient.scaled(inside[block], ratio)
        grad_scale = (grad_scale * inverse).flatten().to(ctx.scale_dtype)
        return inside.view_as(weight), grad_scale, None, None, None


class _PlainWeightQuantization(torch.autograd.Function):
    """The same in tensor operations, whatever the memory's order."""

    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, scale: torch.Tensor, qn: Bound, qp: Bound, gradient: GradientScaling
    ) -> torch.Tensor:
        shape = (-1, *[1] * (weight.ndim - 1))
        step = scale.detach().clamp_min(MIN_SCALE).to(weight.dtype).reshape(shape)
        ctx.qn, ctx.qp = (bound.reshape(shape) if isinstance(bound, torch.Tensor) else bound for bound in (qn, qp))
        ctx.scale_dtype, ctx.gradient = scale.dtype, gradient
        ctx.save_for_backward(weight, step)
        return clamped((weight * step.reciprocal()).round(), ctx.qn, ctx.qp) * step

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        weight, step = ctx.saved_tensors
        ratio = weight * step.reciprocal()
        within = torch.where((ratio > -ctx.qn) & (ratio < ctx.qp), grads[0], 0.0)
        at_scale = grads[0] * clamped(ratio.round(), ctx.qn, ctx.qp) - within * ratio
        grad_scale = at_scale.sum(tuple(range(1, weight.ndim))).to(ctx.scale_dtype)
        return ctx.gradient.scaled(within, ratio), grad_scale, None, None, None


def quantize_weight(
    weight: torch.Tensor, scale: torch.Tensor, qn: Bound, qp: Bound, gradient: GradientScaling = STRAIGHT
) -> torch.Tensor:
    """``s * clamp(round(w / s), -Qn, Qp)``, symmetric, one scale for each output channel (LSQ eqs. 1 and 2).

    Gradients are LSQ's: through to ``w`` where ``-Qn < w/s < Qp``; to ``s`` ``round(w/s) - w/s`` there, ``-Qn`` below
    and ``Qp`` above (eq. 3). A scale below 1e-8 acts as 1e-8.

    Args:
        weight: ``(channels, ...)``.
        scale: ``(channels,)``.
        qn, qp: of all channels, or of each, ``(channels,)``.
        gradient: what becomes of the gradient to ``w`` within the range.

    Returns:
        Same shape as ``weight``.
    """
    if isinstance(qn, torch.Tensor) or isinstance(qp, torch.Tensor) or not _in_blocks(weight):
        plain: torch.Tensor = _PlainWeightQuantization.apply(weight, scale, qn, qp, gradient)
        return plain
    if _is_channels_last(weight):
        return quantize_weight(weight.permute(0, 2, 3, 1), scale, qn, qp, gradient).permute(0, 3, 1, 2)
    out: torch.Tensor = _WeightQuantization.apply(weight, scale, qn, qp, gradient)
    return out


def _is_channels_last(x: torch.Tensor) -> bool:
    return x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


class _ActivationQuantization(torch.autograd.Function):
    """LSQ+ eqs. 1, 2, 5 and 6 with the offset rounded to the grid, so that an integer zero point stands for 0."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        scale: torch.Tensor,
        offset: torch.Tensor,
        zero_point: torch.Tensor,
        qmax: int,
        gradient: GradientScaling,
    ) -> torch.Tensor:
        ctx.qmax, ctx.gradient, ctx.dtypes = qmax, gradient, (scale.dtype, offset.dtype)
        step = scale.detach().clamp_min(MIN_SCALE)
        # The reciprocal in single precision: an integer graph multiplies the network's input by this very number.
        inverse = step.float().reciprocal()
        if not _in_blocks(x):
            ctx.save_for_backward(x, step, inverse, zero_point)
            low = -zero_point.to(x.dtype)
            return (x * inverse.to(x.dtype)).round().clamp(low, low + qmax) * step.to(x.dtype)
        ctx.step, ctx.inverse, zero = float(step), float(inverse), float(zero_point)
        ctx.low, ctx.high = -zero, qmax - zero
        flat, out = x.flatten(), torch.empty_like(x)
        flat_out = out.view(-1)
        for block in _blocks(x.numel(), 1):
            part = torch.mul(flat[block], ctx.inverse, out=flat_out[block])
            part.round_().clamp_(ctx.low, ctx.high).mul_(ctx.step)
        ctx.save_for_backward(x, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None, None]:
        saved = ctx.saved_tensors
        # d/d beta is 1 outside the range. d/ds is round(x/s) - x/s inside, 0 below and Q above, which is what the
        # clamped integer says once the zero point is taken off: low below, high = Q + low above.
        if len(saved) > 2:
            x, step, inverse, zero_point = saved
            grad, low = grads[0], -zero_point.to(x.dtype)
            ratio = x * inverse.to(x.dtype)
            inside = torch.where((ratio > low) & (ratio < low + ctx.qmax), grad, 0.0)
            outside = grad.sum() - inside.sum()
            total = (grad * ratio.round().clamp(low, low + ctx.qmax) - inside * x / step.to(x.dtype)).sum()
            at_scale = (total - low * outside).to(ctx.dtypes[0])
            return ctx.gradient.scaled(inside, ratio), at_scale, outside.to(ctx.dtypes[1]), None, None, None
        x, out = (tensor.view(-1) for tensor in saved)
        grad = grads[0].contiguous().view(-1)
        inside = torch.empty_like(grad)
        outside, total = grad.new_zeros(()), grad.new_zeros(())
        blocks = _blocks(x.numel(), 1)
        buffer = torch.empty_like(x[blocks[0]]) if blocks else x
        for block in blocks:
            g, v, i = grad[block], x[block], inside[block]
            ratio = torch.mul(v, ctx.inverse, out=buffer[: len(v)])
            _mask(g, ratio, ctx.low, ctx.high, out=i)
            outside += g.sum() - i.sum()
            total += torch.dot(g, out[block]) - torch.dot(i, v)
            if ctx.gradient.kind != STRAIGHT.kind:
                inside[block] = ctx.gradient.scaled(i, ratio)
        grad_scale = total / ctx.step - ctx.low * outside
        return inside.view_as(saved[0]), grad_scale.to(ctx.dtypes[0]), outside.to(ctx.dtypes[1]), None, None, None


def quantize_activation(
    x: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor,
    zero_point: torch.Tensor,
    qmax: int,
    gradient: GradientScaling = STRAIGHT,
) -> torch.Tensor:
    """``s * (clamp(round(x / s) + z, 0, Q) - z)``, asymmetric, one scale for the tensor.

    Gradients are LSQ+'s (eqs. 5 and 6), straight through the rounding of the offset to a zero point: to ``x`` 1 inside
    the range; to ``s`` ``round(x/s) - x/s`` inside, 0 below and ``Q`` above; to ``beta`` 1 outside the range.
    With ``z = 0`` and an offset that does not learn this is LSQ's unsigned quantizer.

    Args:
        x: any shape.
        scale, offset: shape ``()``; ``offset`` only receives a gradient, its value enters through ``zero_point``.
        zero_point: the integer z, 0 to ``qmax``, shape ``()``; NaN makes all of it NaN.
        gradient: what becomes of the gradient to ``x`` within the range.
    """
    if x.dtype in (torch.float16, torch.bfloat16):
        return quantize_activation(x.float(), scale, offset, zero_point, qmax, gradient).to(x.dtype)
    if not _in_blocks(x):
        compiled: torch.Tensor = _ActivationQuantization.apply(x, scale, offset, zero_point, qmax, gradient)
        return compiled
    if _is_channels_last(x):
        by_pixel = quantize_activation(x.permute(0, 2, 3, 1), scale, offset, zero_point, qmax, gradient)
        return by_pixel.permute(0, 3, 1, 2)
    out: torch.Tensor = _ActivationQuantization.apply(x.contiguous(), scale, offset, zero_point, qmax, gradient)
    return out
