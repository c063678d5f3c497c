"""The weights of dense and grouped convolutions in the order in which their kernels read them."""

from __future__ import annotations

import numpy as np

from lightning_baqe.kernels.x86.conv_knobs import Knobs, inner_channels, with_intrinsic
from lightning_baqe.kernels.x86.conv_spec import ConvSpec


def weight_quads(spec: ConvSpec, weight: np.ndarray, channels: int = 0) -> np.ndarray:
    """Weights ``(out, in / groups, kh, kw)`` by channel, run and quad: ``(stored out, segments, quads, quad)``.
    ``channels`` are the input channels of a tile, if tiles are the outer loop of the sum.
    """
    quad = spec.arithmetic.quad
    out, inner, kh, kw = weight.shape
    full = np.zeros((spec.result.stored, kh, kw, spec.span), dtype=weight.dtype)
    if spec.groups == 1:
        full[:out, :, :, :inner] = weight.transpose(0, 2, 3, 1)
    else:
        for channel in range(out):
            first = channel // (out // spec.groups) * inner - spec.first_channel(channel // spec.lanes)
            full[channel, :, :, first : first + inner] = weight[channel].transpose(1, 2, 0)
    if channels:
        tiled = full.reshape(spec.result.stored, kh * kw, spec.span // channels, channels)
        full = tiled.transpose(0, 2, 1, 3)
    segments, run = spec.segments(channels), spec.run(channels)
    quads = -(-run // quad)
    padded = np.zeros((spec.result.stored, segments, quads * quad), dtype=weight.dtype)
    padded[:, :, :run] = full.reshape(spec.result.stored, segments, run)
    return padded.reshape(spec.result.stored, segments, quads, quad)


def pack_weights(spec: ConvSpec, knobs: Knobs, weight: np.ndarray) -> np.ndarray:
    """Weights in the order in which the kernel reads them, flat."""
    spec, packed, inner = with_intrinsic(spec, knobs), knobs["weights"] == "packed", inner_channels(knobs)
    quads = weight_quads(spec, weight, inner)
    segments, steps = spec.segments(inner), spec.steps(packed, inner)
    full = np.zeros((*quads.shape[:2], steps, quads.shape[3]), dtype=weight.dtype)
    full[:, :, : quads.shape[2]] = quads
    blocks = full.reshape(spec.blocks, spec.lanes, segments, steps, -1).transpose(0, 2, 3, 1, 4)
    if packed:  # the nibbles of one byte belong to two consecutive quads, offset by 8
        shifted = np.ascontiguousarray(blocks).reshape(spec.blocks, segments, steps // 2, 2, spec.lanes * 4) + 8
        return np.ascontiguousarray(shifted[..., 0, :] | (shifted[..., 1, :] << 4)).astype(np.uint8).ravel()
    return spec.arithmetic.pack(blocks)
