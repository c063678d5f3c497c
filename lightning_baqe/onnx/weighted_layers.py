"""Weights of integer layers as ONNX has them: int8 or int4 with a positive scale by channel, biases int32."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from lightning_baqe.errors import UnsupportedModelError
from lightning_baqe.integer import nodes as ir
from lightning_baqe.integer.nodes import INT32_MAX
from lightning_baqe.onnx.writer import Writer

SMALLEST = float(np.finfo(np.float32).tiny)
LARGEST = 64


@dataclass(frozen=True, eq=False)
class OnnxWeights:
    """Constants of a layer; the real weight is ``scale * weight``, the real bias ``input_scale * scale * bias``.

    Args:
        weight: int8, the layer's shape.
        bias: int32, ``(channels,)``.
        scale: float32, ``(channels,)``, positive.
        input_scale: of the layer's input.
    """

    weight: np.ndarray
    bias: np.ndarray
    scale: np.ndarray
    input_scale: float

    @property
    def fits_int4(self) -> bool:
        return bool(self.weight.min() >= -8 and self.weight.max() <= 7)

    def write(self, writer: Writer, wish: str, int4: bool) -> list[str]:
        """Add the constants and what dequantizes them; returns the names of the real weight and bias."""
        # ONNX Runtime's exact mode makes copies of weights and their zero points, and stumbles over shared ones.
        scale = writer.own_constant(f"{wish}.weight_scale", self.scale)
        if int4:
            weight = writer.int4(f"{wish}.weight", self.weight)
            zero = writer.int4(f"{wish}.weight_zero_point", np.zeros(self.scale.shape, np.int8))
        else:
            weight = writer.own_constant(f"{wish}.weight", self.weight)
            zero = writer.own_constant(f"{wish}.weight_zero_point", np.zeros(self.scale.shape, np.int8))
        bias = writer.own_constant(f"{wish}.bias", self.bias)
        bias_scale = writer.own_constant(f"{wish}.bias_scale", np.float32(self.input_scale) * self.scale)
        bias_zero = writer.constant("bias_zero_point", np.zeros(self.scale.shape, np.int32))
        return [
            writer.node("DequantizeLinear", [weight, scale, zero], f"{wish}.weight_real", axis=0),
            writer.node("DequantizeLinear", [bias, bias_scale, bias_zero], f"{wish}.bias_real", axis=0),
        ]


def export_weights(
    node: ir.Conv | ir.Linear, scale: torch.Tensor, input_scale: float, input_zero_point: int, plain: bool
) -> OnnxWeights:
    """The constants of a layer.

    A channel of negative scale gets the opposite integers. A channel whose scale float32 does not hold is 0. Where a
    channel's weights are small they are multiplied by a power of two, up to 7 bits and a sign, and the scale divided by
    it: that changes no weight, but makes the steps finer in which the bias is counted, and so saves what rounding took
    from it. (7 bits, because two products of 8 bits by 8 overflow the 16 that some CPUs add them in.)

    Args:
        node: the layer.
        scale: float64, ``(channels,)``, what a step of the accumulator is worth, of any sign.
        input_scale, input_zero_point: of the layer's input; the zero point leaves the bias, where it was folded in.
        plain: leave the integers as they are but for their sign.

    Raises:
        UnsupportedModelError: weights or biases that do not fit their types.
    """
    by_weight = scale / input_scale
    dead = (scale.abs() < SMALLEST) | (by_weight.abs() < SMALLEST)
    sign = torch.where(dead, 0, torch.where(scale < 0, -1, 1))
    flat = node.weight.flatten(1)
    bias = node.bias + input_zero_point * flat.sum(1)
    exact = bias.double()
    factor = torch.ones_like(bias) if plain else _room(node, bias)
    if node.requant is not None and node.fraction is not None:
        multiplier = node.requant.multiplier.expand(len(bias))
        exact = exact + torch.where(multiplier == 0, 0.0, node.fraction.double() / multiplier.double())
    bias = torch.where(factor == 1, bias, torch.round(exact * factor).to(torch.int64)) * sign
    weight = node.weight * (sign * factor).reshape(-1, *[1] * (node.weight.ndim - 1))
    if int(weight.min()) < -128 or int(weight.max()) > 127:
        raise UnsupportedModelError(
            f"layer {node.layer!r} has weights within {int(weight.min())}..{int(weight.max())} once all scales are "
            "positive, int8 holds -128..127; quantize them to -127..127, as lightning_baqe.quantize does"
        )
    if int(bias.abs().max()) > INT32_MAX:
        raise UnsupportedModelError(
            f"layer {node.layer!r} has a bias of {int(bias.abs().max())} steps without its input's zero point, more "
            "than an int32 holds; keep the layer float (32)"
        )
    return OnnxWeights(
        weight.to(torch.int8).numpy(),
        bias.to(torch.int32).numpy(),
        torch.where(dead, 1.0, by_weight.abs() / factor).to(torch.float32).numpy(),
        input_scale,
    )


def _room(node: ir.Conv | ir.Linear, bias: torch.Tensor) -> torch.Tensor:
    """The power of two that each channel can be multiplied by, within 7 bits of weights and 32 of accumulators."""
    flat = node.weight.flatten(1).abs()
    reach = max(map(abs, node.input_range)) * flat.sum(1) + bias.abs() + node.bias.abs() + 1
    room = torch.minimum(LARGEST // flat.amax(1).clamp(min=1), INT32_MAX // reach).clamp(min=1)
    return 2 ** torch.floor(torch.log2(room.double())).to(torch.int64)
