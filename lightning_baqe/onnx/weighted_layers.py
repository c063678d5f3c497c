"""Weights of integer layers as ONNX has them: int8 or int4 with a positive scale by channel, biases int32."""

from __future__ import annotations

import numpy as np
import torch

from lightning_baqe.errors import UnsupportedModelError
from lightning_baqe.integer import nodes as ir
from lightning_baqe.integer.nodes import INT32_MAX, TensorType
from lightning_baqe.onnx.ranges import storage_of
from lightning_baqe.onnx.writer import Writer

SMALLEST = float(np.finfo(np.float32).tiny)
LARGEST = 64
INT16_MAX = 2**15 - 1


def write_weights(
    writer: Writer, node: ir.Layer, scale: torch.Tensor, source: TensorType, pack_int4: bool, signed: bool
) -> tuple[list[str], bool]:
    """Add the constants of a layer and what dequantizes them.

    The weights are int8 (or int4) with a positive float32 scale by channel, the bias is int32 of scale
    ``source.scale * scale``. A channel of negative scale gets the opposite integers. A channel whose scale float32 does
    not hold is 0. Where a channel's weights are small they are multiplied by a power of two, up to 7 bits and a sign,
    and the scale divided by it: that changes no weight, but makes the steps finer in which the bias is counted, and so
    saves what rounding took from it. (7 bits, because two products of 8 bits by 8 overflow the 16 that some CPUs add
    them in. Where the weights themselves are that large, they are stored as uint8 with the zero point 128.)

    Args:
        scale: float64, ``(channels,)``, what a step of the accumulator is worth, of any sign.
        source: of the layer's input; its zero point leaves the bias, where it was folded in.
        pack_int4: store weights of at most 4 bits as they are but for their sign, as INT4 if they fit it.
        signed: no uint8.

    Returns:
        the names of the real weight and bias, and whether the weights are INT4.

    Raises:
        UnsupportedModelError: weights or biases that do not fit their types.
    """
    plain = pack_int4 and node.widest_weight_bits <= 4
    by_weight = scale / source.scale
    dead = (scale.abs() < SMALLEST) | (by_weight.abs() < SMALLEST)
    sign = torch.where(dead, 0, torch.where(scale < 0, -1, 1))
    flat = node.weight.flatten(1)
    bias = node.bias + source.zero_point * flat.sum(1)
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
    packed = plain and int(weight.min()) >= -8 and int(weight.max()) <= 7
    stored = torch.where(dead, 1.0, by_weight.abs() / factor).to(torch.float32).numpy()
    # ONNX Runtime's exact mode makes copies of weights and their zero points, and stumbles over shared ones.
    scale_name = writer.own_constant(f"{node.name}.weight_scale", stored)
    write = writer.int4 if packed else writer.own_constant
    largest = max(0, source.limits[1]) * 2 * int(weight.abs().max())
    is_unsigned = not signed and storage_of(source) is np.uint8 and largest > INT16_MAX
    middle, kind = (128, torch.uint8) if is_unsigned else (0, torch.int8)
    weights = [
        write(f"{node.name}.weight", (weight + middle).to(kind).numpy()),
        scale_name,
        write(f"{node.name}.weight_zero_point", torch.full(stored.shape, middle, dtype=kind).numpy()),
    ]
    biases = [
        writer.own_constant(f"{node.name}.bias", bias.to(torch.int32).numpy()),
        writer.own_constant(f"{node.name}.bias_scale", np.float32(source.scale) * stored),
        writer.constant("bias_zero_point", np.zeros(stored.shape, np.int32)),
    ]
    names = [
        writer.node("DequantizeLinear", weights, f"{node.name}.weight_real", axis=0),
        writer.node("DequantizeLinear", biases, f"{node.name}.bias_real", axis=0),
    ]
    return names, packed


def _room(node: ir.Layer, bias: torch.Tensor) -> torch.Tensor:
    """The power of two that each channel can be multiplied by, within 7 bits of weights and 32 of accumulators."""
    flat = node.weight.flatten(1).abs()
    reach = max(map(abs, node.input_range)) * flat.sum(1) + bias.abs() + node.bias.abs() + 1
    room = torch.minimum(LARGEST // flat.amax(1).clamp(min=1), INT32_MAX // reach).clamp(min=1)
    return 2 ** torch.floor(torch.log2(room.double())).to(torch.int64)
