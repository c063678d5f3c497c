"""Quantizers whose bits are learned: range and levels are parameters, step and bits follow (Schaefer et al., eq. 1).

| symbol | meaning | shape |
| --- | --- | --- |
| x | weights or activations | any |
| d | step size | ``()``, or ``(channels, 1, ...)`` |
| q | dynamic range, the largest magnitude | as d |
| n | q / d: the largest integer, before it is rounded | as d, or ``()`` |
| b | bits, log2(n + 1), and 1 more where x is signed | as n |

As printed, b is log2(n) + 1, which would give 2^b + 1 levels; n + 1 gives those that b bits have. Integers are
within -round(n)..round(n), or 0..round(n) where x is never negative. The gradients are those of the straight-through
surrogate: rounding adds a constant to what it rounds, and that constant has no gradient (Uhlich et al., 2020).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
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
    """Learns range and bits; they stay within 2 to 8 whatever an optimizer does.

    The parameters are logarithms: q and n stay positive, and a step of an optimizer changes as many bits in a layer of
    small weights as in one of large ones. They are q and n, not q and d: a penalty on bits must make steps coarser, not
    ranges smaller, and several ranges can share their bits.

    Attributes:
        log_top: log2 of q, a parameter.
        log_levels: log2 of n, a parameter. :meth:`project` brings it back to where bits are in range; until then what
            acts is the nearest value there.
        fixed_bits: that it has, n with them; q learns on. None: bits are learned.
        gradient: how gradients pass the rounding.

    Args:
        top: first range, ``()`` or ``(channels, 1, ...)``.
        bits: at first.
        signed: whether values may be negative.
        count: values that one number of bits is for: weights, or activations of a sample.
        apart: each channel has bits of its own; else all ranges share them.
    """

    def __init__(self, top: Tensor, bits: float, signed: bool, count: int, apart: bool = False) -> None:
        super().__init__()
        self.signed, self.count, self.gradient = signed, count, STRAIGHT
        self.fixed_bits: Tensor | None = None
        # In single precision, as the parameter is: one that lies on a bound must not be beyond it, without a gradient.
        self._least, self._most = torch.tensor([MIN_BITS, MAX_BITS]).sub(float(signed)).exp2().sub(1).log2().tolist()
        log_top = top.detach().clamp_min(MIN_SCALE).log2()
        self.log_top = nn.Parameter(log_top)
        self.log_levels = nn.Parameter(
            torch.full_like(log_top if apart else log_top.flatten()[:1].squeeze(), math.log2(self._integers(bits)))
        )

    def _integers(self, bits: float) -> float:
        """n of so many bits."""
        return 2.0 ** (bits - self.signed) - 1

    def log_levels_in_range(self) -> Tensor:
        """log2 of n as it acts; differentiable."""
        if self.fixed_bits is not None:
            fixed = self.fixed_bits.to(self.log_levels)  # of a module that was moved since
            # With a gradient, of 0: distributed training wants one for every parameter.
            return torch.log2(torch.exp2(fixed - float(self.signed)) - 1) + 0 * self.log_levels
        levels = self.log_levels
        within = (levels >= self._least) & (levels <= self._most)  # torch.clamp has no gradient on a bound
        return torch.where(within, levels, levels.detach().clamp(self._least, self._most))

    def bits(self) -> Tensor:
        """b, ``()`` or ``(channels, 1, ...)``; differentiable."""
        return torch.log2(torch.exp2(self.log_levels_in_range()) + 1) + float(self.signed)

    def size_bits(self) -> Tensor:
        """Bits of all values together, ``()``; differentiable."""
        return self.bits().sum() * self.count

    @property
    def values(self) -> int:
        """How many they are."""
        return self.log_levels.numel() * self.count

    def top(self) -> Tensor:
        """q, ``()`` or ``(channels, 1, ...)``."""
        return torch.exp2(self.log_top)

    def fix(self, bits: float | Sequence[int]) -> None:
        """Have these bits, one number or one for each channel, within the same ranges, from now on."""
        wanted = torch.as_tensor(bits, dtype=self.log_levels.dtype, device=self.log_levels.device)
        self.fixed_bits = wanted.expand(self.log_levels.numel()).reshape(self.log_levels.shape)
        self.project()

    def release(self) -> None:
        """Learn bits, from those on that there are."""
        self.fixed_bits = None

    @torch.no_grad()
    def project(self) -> None:
        """Bring the bits where they act."""
        self.log_levels.copy_(self.log_levels_in_range())

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        top = self.top()
        return learned_quantization(x, top / torch.exp2(self.log_levels_in_range()), top, self.signed, self.gradient)

    def extra_repr(self) -> str:
        """Whether values may be negative."""
        return f"signed={self.signed}"


class BiasQuantizer(nn.Module):
    """A layer's biases at the bits of its weights, within a range of their own (Schaefer et al., section 4.4.1).

    Attributes:
        log_top: log2 of the range, a parameter.
        gradient: how gradients pass the rounding.

    Args:
        bias: ``(channels,)``, to set the first range from.
        weights: whose bits it has, of all or of each channel.
    """

    def __init__(self, bias: Tensor, weights: LearnedQuantizer) -> None:
        super().__init__()
        self.gradient = STRAIGHT
        self.log_top = nn.Parameter(bias.detach().abs().amax().clamp_min(MIN_SCALE).log2())
        self._weights = (weights,)  # no submodule: its parameters are the layer's already

    def forward(self, bias: Tensor) -> Tensor:
        """Same shape."""
        levels, top = self._weights[0].log_levels_in_range(), torch.exp2(self.log_top)
        step = top / torch.exp2(levels.flatten() if levels.ndim else levels)
        return learned_quantization(bias, step, top.expand(step.shape), True, self.gradient)


def learned_weights(
    weight: Tensor, scale: Tensor, bits: int, by_channel: bool, bias: Tensor | None = None
) -> LearnedQuantizer:
    """Of a layer's weights, each output channel with a range of its own.

    Args:
        weight: ``(channels, ...)``.
        scale: step sizes at these bits, ``(channels,)``.
        bits: at first.
        by_channel: learn bits of each output channel; else they share them.
        bias: ``(channels,)``, counted with the weights; None: without.
    """
    count = weight.numel() + (0 if bias is None else bias.numel())
    top = scale.detach().reshape(-1, *[1] * (weight.ndim - 1)) * (2 ** (bits - 1) - 1)
    return LearnedQuantizer(top, bits, True, count // (top.numel() if by_channel else 1), by_channel)


def bits_and_counts(quantizers: Iterable[LearnedQuantizer]) -> tuple[Tensor, Tensor]:
    """All their bits, ``(n,)``, differentiable, and how many values each is for."""
    found = [(of.bits().flatten(), of.count) for of in quantizers]
    counts = [torch.full_like(bits, count, requires_grad=False) for bits, count in found]
    return torch.cat([bits for bits, _ in found]), torch.cat(counts)
