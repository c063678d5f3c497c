"""Quantizers whose bits are learned: step size and range are parameters, bits follow (Schaefer et al., eq. 1).

| symbol | meaning | shape |
| --- | --- | --- |
| x | weights or activations | any |
| d | step size | ``()``, or ``(channels, 1, ...)`` |
| q | dynamic range, the largest magnitude | as d |
| n | q / d: the largest integer, before it is rounded | as d |
| b | bits, log2(n + 1), and 1 more where x is signed | as d |

As printed, b is log2(n) + 1, which would give 2^b + 1 levels; n + 1 gives those that b bits have. Integers are
within -round(n)..round(n), or 0..round(n) where x is never negative. The gradients are those of the straight-through
surrogate: rounding adds a constant to what it rounds, and that constant has no gradient (Uhlich et al., 2020).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_baqe.quantization.config import MAX_BITS, MIN_BITS
from lightning_baqe.quantization.functional import MIN_SCALE
from lightning_baqe.quantization.gradient_scaling import STRAIGHT, GradientScaling


class _LearnedQuantization(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, top: Tensor, signed: bool, gradient: GradientScaling) -> Tensor:
        ctx.save_for_backward(x, step, top)
        ctx.signed, ctx.gradient = signed, gradient
        high = top / step
        return torch.clamp(x / step, -high if signed else torch.zeros_like(high), high).round() * step

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, step, top = ctx.saved_tensors
        grad, ratio, high = grads[0], x / step, top / step
        above = grad * (ratio >= high)
        below = grad * (ratio <= (-high if ctx.signed else torch.zeros_like(high)))
        inside = grad - above - below
        outside = above - below if ctx.signed else above
        at_step = inside * (ratio.round() - ratio) + outside * (high.round() - high)
        return (
            ctx.gradient.scaled(inside, ratio),
            _summed_as(at_step, step).to(step.dtype),
            _summed_as(outside, top).to(top.dtype),
            None,
            None,
        )


def _summed_as(values: Tensor, like: Tensor) -> Tensor:
    return values.sum_to_size(like.shape)


def learned_quantization(
    x: Tensor, step: Tensor, top: Tensor, signed: bool, gradient: GradientScaling = STRAIGHT
) -> Tensor:
    """``d * round(clamp(x / d, -q / d, q / d))``, from 0 on where x is unsigned.

    Args:
        x: any shape.
        step, top: d and q, positive, of a shape that broadcasts to ``x``.
        signed: whether ``x`` has negative values.
        gradient: what becomes of the gradient to ``x`` within the range.
    """
    if x.dtype in (torch.float16, torch.bfloat16):
        return learned_quantization(x.float(), step, top, signed, gradient).to(x.dtype)
    out: Tensor = _LearnedQuantization.apply(x, step.to(x.dtype), top.to(x.dtype), signed, gradient)
    return out


class LearnedQuantizer(nn.Module):
    """Learns step size and range; its bits stay within 2 to 8 whatever an optimizer does.

    The parameters are logarithms: d and q stay positive, and a step of an optimizer changes as many bits in a layer of
    small weights as in one of large ones.

    Attributes:
        log_step, log_top: log2 of d and of q, the parameters. :meth:`project` brings them back to where bits are in
            range; until then what acts is the nearest step there.
        fixed_bits: that it has; d then follows q, which learns on. None: bits are learned.
        gradient: how gradients pass the rounding.

    Args:
        step: first step size, ``()`` or ``(channels, 1, ...)``.
        bits: at first.
        signed: whether values may be negative.
        count: values that one number of bits is for: weights, or activations of a sample.
    """

    def __init__(self, step: Tensor, bits: float, signed: bool, count: int) -> None:
        super().__init__()
        self.signed, self.count, self.gradient = signed, count, STRAIGHT
        self.fixed_bits: float | None = None
        self._least, self._most = (math.log2(self._integers(b)) for b in (MIN_BITS, MAX_BITS))
        log_step = step.detach().clamp_min(MIN_SCALE).log2()
        self.log_step = nn.Parameter(log_step)
        self.log_top = nn.Parameter(log_step + math.log2(self._integers(bits)))

    def _integers(self, bits: float) -> float:
        """n of so many bits."""
        return 2.0 ** (bits - self.signed) - 1

    def _log_step(self, log_top: Tensor) -> Tensor:
        if self.fixed_bits is not None:
            return log_top - math.log2(self._integers(self.fixed_bits))
        return torch.clamp(self.log_step, log_top - self._most, log_top - self._least)

    def bits(self) -> Tensor:
        """b, of the shape of d; differentiable by d alone.

        A penalty on bits must make steps coarser, not ranges smaller: by d and q as they are its gradients are as n to
        1, but by their logarithms they would be alike, and half of what is saved would be clipped away.
        """
        log_top = self.log_top.detach()
        return torch.log2(torch.exp2(log_top - self._log_step(log_top)) + 1) + float(self.signed)

    def size_bits(self) -> Tensor:
        """Bits of all values together, ``()``; differentiable as :meth:`bits`."""
        return self.bits().sum() * self.count

    @property
    def values(self) -> int:
        """How many they are."""
        return self.log_step.numel() * self.count

    def top(self) -> Tensor:
        """q, of the shape of d."""
        return torch.exp2(self.log_top)

    def fix(self, bits: float) -> None:
        """Have these bits, within the same range, from now on."""
        self.fixed_bits = bits
        self.project()

    @torch.no_grad()
    def project(self) -> None:
        """Bring the parameters where they act: a step that is too small or large for its range is taken along."""
        self.log_step.copy_(self._log_step(self.log_top))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return learned_quantization(x, torch.exp2(self._log_step(self.log_top)), self.top(), self.signed, self.gradient)

    def extra_repr(self) -> str:
        """Whether values may be negative."""
        return f"signed={self.signed}"


def learned_weights(weight: Tensor, step: Tensor, bits: float, by_channel: bool) -> LearnedQuantizer:
    """Of a layer's weights.

    Args:
        weight: ``(channels, ...)``.
        step: as its quantizer has it so far, ``(channels,)``.
        bits: at first.
        by_channel: learn bits of each output channel; else the largest step is for all.
    """
    shaped = step.detach().reshape(-1, *[1] * (weight.ndim - 1)) if by_channel else step.detach().max()
    return LearnedQuantizer(shaped, bits, True, weight.numel() // shaped.numel())
