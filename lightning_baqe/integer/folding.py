"""The constants of lowered layers: batch-norm folding, integer biases, dyadic factors.

| symbol | meaning |
| --- | --- |
| s_x, z_x | scale and zero point of the layer's input |
| s_w | weight scales, by output channel |
| gamma, beta, mean, sigma | batch norm's gain, shift, running mean, sqrt(running variance + eps) |
| s_out | scale of the grid that the output is stored on |
"""

from __future__ import annotations

import torch

from lightning_baqe.errors import ConfigError, UnsupportedModelError
from lightning_baqe.integer.dyadic import MAX_SHIFT, Dyadic
from lightning_baqe.integer.nodes import INT32_MAX, TensorType
from lightning_baqe.quantization.weight import WeightQuantizer

MAX_BIAS = 2.0**29


def integer_weights(
    quantizer: WeightQuantizer, weight: torch.Tensor, gain: torch.Tensor, shift: torch.Tensor, source: TensorType
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fold ``out = gain * (w @ x) + shift`` into the integer weights of a layer that reads ``source``.

    ``weight`` is the float weight, outputs first; ``gain`` and ``shift`` are float64, ``(outputs,)``.

    Weight scales are by output channel, so that the gain only changes the scale, ``s_w * gain``, and leaves the
    integers alone; a negative gain makes a negative scale. Where the bias would leave 2^29 (a gain near 0) the channel
    gets the coarser scale ``|shift| / 2^29`` and rounded weights: each weight is off by half of that scale at most, so
    the output is off by at most ``n * Q * 2^-30`` of the shift, for n weights per channel and inputs up to Q; since the
    shift is then more than 2^29 steps of the original scale, so is the exact contribution of the weights small.

    Returns:
        weight: int64, ``(outputs, ...)``.
        bias: int64, ``(channels,)``, the input's zero point folded in.
        remainder: float64, ``(channels,)``, what rounding the bias left, within half an accumulator step.
        scale: float64 of the accumulators, ``(channels,)``, any sign: the real output is ``scale * acc``.
    """
    weight, step = quantizer.integers(weight)
    weight, step = weight.cpu(), step.cpu()
    by_channel = (-1, *[1] * (weight.ndim - 1))
    scale = source.scale * step * gain
    coarse = shift.abs() / MAX_BIAS
    too_fine = scale.abs() < coarse
    if bool(too_fine.any()):
        coarse = torch.where(scale < 0, -coarse, coarse)  # the weights keep their signs, and their bits
        ratio = torch.where(too_fine, scale / torch.where(too_fine, coarse, 1.0), 1.0)
        rounded = torch.round(weight * ratio.reshape(by_channel)).to(torch.int64)
        weight, scale = rounded, torch.where(too_fine, coarse, scale)
    # Gain and shift both 0: the channel is 0, at any scale.
    dead = scale == 0
    weight = torch.where(dead.reshape(by_channel), 0, weight)
    scale = torch.where(dead, source.scale * step, scale)
    exact = shift / scale
    bias = torch.round(exact).to(torch.int64)
    return weight, bias - source.zero_point * weight.flatten(1).sum(1), exact - bias, scale


def requant(factors: torch.Tensor | float, name: str) -> Dyadic:
    """:meth:`Dyadic.from_real` with the place in its UnsupportedModelError: a factor is too large or not finite."""
    try:
        return Dyadic.from_real(factors)
    except ConfigError as error:
        raise UnsupportedModelError(
            f"{name}: its scales cannot be brought onto the output's grid ({error}); calibrate with representative "
            "data, or keep the layer float (32)"
        ) from error


def add_factors(
    ratios: tuple[float, float], operands: tuple[TensorType, TensorType], name: str
) -> tuple[tuple[int, int], int, int]:
    """Multipliers with the most bits that keep every partial sum of the addition within 32 bits.

    The bound covers the products, their sum, the offset and the rounding half in any order, so that a kernel may use
    int32 lanes throughout. Operands of more than 16 bits (a residual stream in int32) get 62 bits instead.

    Args:
        ratios: scales of the operands over the output's, with the sign that each is added with.
        operands: what they are; their scales are not read.

    Returns:
        multipliers, shift and offset of :class:`~lightning_baqe.integer.nodes.Add`.

    Raises:
        UnsupportedModelError: no shift keeps it within 32 bits, or both operands would vanish.
    """
    reach = [max(map(abs, operand.limits)) for operand in operands]
    allowed = 2**62 if max(reach) >= 2**16 else INT32_MAX
    for shift in range(30, 0, -1):
        a, b = (round(ratio * 2.0**shift) for ratio in ratios)
        offset = -(a * operands[0].zero_point + b * operands[1].zero_point)
        if abs(a) * reach[0] + abs(b) * reach[1] + abs(offset) + 2 ** (shift - 1) <= allowed:
            return (a, b), shift, offset
    raise UnsupportedModelError(
        f"{name}: operands of scale {ratios[0]:.3g} and {ratios[1]:.3g} of the output's do not fit 32 bits; calibrate "
        f"with representative data (shifts are at most {MAX_SHIFT})"
    )
