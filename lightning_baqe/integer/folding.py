"""The constants of lowered layers: batch-norm folding, integer biases, dyadic factors.

| symbol | meaning |
| --- | --- |
| s_x, z_x | scale and zero point of the layer's input |
| s_w | weight scales, by output channel |
| gamma, beta, mean, sigma | batch norm's gain, shift, running mean, sqrt(running variance + eps) |
| s_out | scale of the grid that the output is stored on |
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lightning_baqe.errors import ConfigError, UnsupportedModelError
from lightning_baqe.integer.dyadic import MAX_SHIFT, Dyadic
from lightning_baqe.integer.nodes import INT32_MAX
from lightning_baqe.quantization.batch_norm import gain_and_shift
from lightning_baqe.quantization.layers import QuantConv2d, QuantLinear

MAX_BIAS = 2.0**29


@dataclass(frozen=True, eq=False)
class Affine:
    """What follows the weights: ``out = gain * (w @ x) + shift``, float64, shapes ``(channels,)``."""

    gain: torch.Tensor
    shift: torch.Tensor


def fold(layer: nn.Conv2d | nn.Linear, norm: nn.Module | None, name: str) -> Affine:
    """The layer's bias and its batch norm as one gain and shift by channel.

    Raises:
        UnsupportedModelError: the batch norm has no running statistics.
    """
    channels = layer.weight.shape[0]
    zeros = torch.zeros(channels, dtype=torch.float64)
    bias = zeros if layer.bias is None else layer.bias.detach().double().cpu()
    if norm is None:
        return Affine(torch.ones_like(zeros), bias)
    assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
    own = batch_norm_affine(norm, name)
    return Affine(own.gain, own.shift + bias * own.gain)


def batch_norm_affine(norm: nn.BatchNorm1d | nn.BatchNorm2d, name: str) -> Affine:
    """A batch norm with running statistics as one gain and shift by channel.

    Args:
        name: of the layer before it, or its own.

    Raises:
        UnsupportedModelError: it has no running statistics.
    """
    return Affine(*gain_and_shift(norm, name))


@dataclass(frozen=True, eq=False)
class IntegerWeights:
    """Constants of one integer layer.

    Args:
        weight: int64, the layer's shape.
        bias: int64, ``(channels,)``, the input's zero point folded in.
        remainder: float64, ``(channels,)``, what rounding the bias left, within half an accumulator step.
        scale: float64 of the accumulators, ``(channels,)``, any sign: the real output is ``scale * acc``.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    remainder: torch.Tensor
    scale: torch.Tensor

    def fraction(self, factors: Dyadic) -> torch.Tensor:
        """The remainder in steps of ``2^-shift`` of the output, int64: below half of the multiplier."""
        return torch.round(self.remainder * factors.multiplier.double()).to(torch.int64)


def integer_weights(
    layer: QuantConv2d | QuantLinear, affine: Affine, input_scale: float, input_zero_point: int
) -> IntegerWeights:
    """Fold a batch norm into integer weights.

    Weight scales are by output channel, so that the gain only changes the scale, ``s_w * gain``, and leaves the
    integers alone; a negative gain makes a negative scale. Where the bias would leave 2^29 (a gain near 0) the channel
    gets the coarser scale ``|shift| / 2^29`` and rounded weights: each weight is off by half of that scale at most, so
    the output is off by at most ``n * Q * 2^-30`` of the shift, for n weights per channel and inputs up to Q; since the
    shift is then more than 2^29 steps of the original scale, so is the exact contribution of the weights small.
    """
    weight, step = layer.weight_quantizer.integers(layer.weight)
    weight, step = weight.cpu(), step.cpu()
    scale = input_scale * step * affine.gain
    coarse = affine.shift.abs() / MAX_BIAS
    too_fine = scale.abs() < coarse
    if bool(too_fine.any()):
        coarse = torch.where(scale < 0, -coarse, coarse)  # the weights keep their signs, and their bits
        ratio = torch.where(too_fine, scale / torch.where(too_fine, coarse, 1.0), 1.0)
        rounded = torch.round(weight * ratio.reshape(-1, *[1] * (weight.ndim - 1))).to(torch.int64)
        weight, scale = rounded, torch.where(too_fine, coarse, scale)
    # Gain and shift both 0: the channel is 0, at any scale.
    dead = scale == 0
    weight = torch.where(dead.reshape(-1, *[1] * (weight.ndim - 1)), 0, weight)
    scale = torch.where(dead, input_scale * step, scale)
    exact = affine.shift / scale
    bias = torch.round(exact).to(torch.int64)
    return IntegerWeights(weight, bias - input_zero_point * weight.flatten(1).sum(1), exact - bias, scale)


def requant(factors: torch.Tensor | float, name: str) -> Dyadic:
    """:meth:`Dyadic.from_real` with the place in its error.

    Raises:
        UnsupportedModelError: a factor is too large or not finite.
    """
    try:
        return Dyadic.from_real(factors)
    except ConfigError as error:
        raise UnsupportedModelError(
            f"{name}: its scales cannot be brought onto the output's grid ({error}); calibrate with representative "
            "data, or keep the layer float (32)"
        ) from error


@dataclass(frozen=True)
class AddFactors:
    """Constants of an integer addition; see :class:`~lightning_baqe.integer.nodes.Add`."""

    multipliers: tuple[int, int]
    shift: int
    offset: int


def add_factors(
    ratios: tuple[float, float],
    ranges: tuple[tuple[int, int], tuple[int, int]],
    zero_points: tuple[int, int],
    name: str,
) -> AddFactors:
    """Multipliers with the most bits that keep every partial sum of the addition within 32 bits.

    The bound covers the products, their sum, the offset and the rounding half in any order, so that a kernel may use
    int32 lanes throughout. Operands of more than 16 bits (a residual stream in int32) get 62 bits instead.

    Args:
        ratios: scales of the operands over the output's.
        ranges, zero_points: of the operands.

    Raises:
        UnsupportedModelError: no shift keeps it within 32 bits, or both operands would vanish.
    """
    wide = max(abs(limit) for limits in ranges for limit in limits) >= 2**16
    allowed = 2**62 if wide else INT32_MAX
    for shift in range(30, 0, -1):
        a, b = (round(ratio * 2.0**shift) for ratio in ratios)
        offset = -(a * zero_points[0] + b * zero_points[1])
        largest = sum(abs(m) * max(map(abs, limits)) for m, limits in zip((a, b), ranges, strict=True))
        if largest + abs(offset) + 2 ** (shift - 1) <= allowed:
            return AddFactors((a, b), shift, offset)
    raise UnsupportedModelError(
        f"{name}: operands of scale {ratios[0]:.3g} and {ratios[1]:.3g} of the output's do not fit 32 bits; calibrate "
        f"with representative data (shifts are at most {MAX_SHIFT})"
    )
