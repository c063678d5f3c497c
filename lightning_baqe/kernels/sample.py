"""Random arguments for one convolution kernel, dense or depthwise, and what it must compute, by torch and numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from lightning_baqe.kernels.specs import packed_weights
from lightning_baqe.kernels.x86.conv_epilogue import PARAMS
from lightning_baqe.kernels.x86.conv_knobs import Knobs
from lightning_baqe.kernels.x86.conv_spec import ConvSpec
from lightning_baqe.kernels.x86.depthwise import DEPTHWISE_PARAMS, DepthwiseSpec, pack_depthwise
from lightning_baqe.kernels.x86.layout import SLACK, Layout
from lightning_baqe.kernels.x86.requantize import requant_numbers

_RANGES = {"uint8": (0, 255), "int8": (-128, 127), "int32": (-(2**15), 2**15)}


@dataclass(frozen=True, eq=False)
class KernelSample:
    """One call of a kernel.

    Args:
        spec: of the kernel.
        source: the input's buffer, flat.
        weight: logical weights ``(out, in, kh, kw)``.
        bias: by stored channel.
        numbers: of :func:`~lightning_baqe.kernels.x86.requantize.requant_numbers`.
        params: int64, by :data:`~lightning_baqe.kernels.x86.conv.PARAMS`.
        residual: the other operand's buffer; the source where there is none.
        result: the buffer that the kernel must write, halo and spare channels included, without the slack at its end.
    """

    spec: ConvSpec | DepthwiseSpec
    source: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    numbers: np.ndarray
    params: np.ndarray
    residual: np.ndarray
    result: np.ndarray

    def arguments(self, knobs: Knobs) -> list[np.ndarray]:
        """The kernel's arguments but the result, weights packed for these knobs."""
        if isinstance(self.spec, DepthwiseSpec):
            packed = pack_depthwise(self.spec, knobs, self.weight)
            numbers = [self.numbers] if self.spec.requantizes else []
            params = self.params[[PARAMS.index(name) for name in DEPTHWISE_PARAMS]]
            return [self.source, packed, self.bias, *numbers, params]
        packed = packed_weights(self.spec, knobs, self.weight)
        return [self.source, packed, self.bias, self.numbers, self.params, self.residual]


def sample_kernel(spec: ConvSpec | DepthwiseSpec, seed: int = 0) -> KernelSample:
    """Random data within what a kernel of this spec may be given: weights of its bits for which its chain is proven."""
    rng = np.random.default_rng(seed)
    shape = (spec.result.channels, spec.source.channels // _groups(spec), *spec.kernel)
    source = _buffer(spec.source, rng)
    other = spec.residual if isinstance(spec, ConvSpec) else None
    residual = source if other is None else _buffer(other, rng)
    params = np.zeros(len(PARAMS), np.int64)
    numbers = np.zeros((2, spec.result.stored), np.int32)
    weight: np.ndarray
    bias: np.ndarray
    is_float = spec.arithmetic.is_float
    if is_float:
        weight = rng.standard_normal(shape, np.float32)
        bias = rng.standard_normal(spec.result.stored, np.float32)
    else:
        weight = rng.integers(*_weight_range(spec), shape, np.int64, endpoint=True)
        bias = rng.integers(-1000, 1001, spec.result.stored, np.int32)
    acc = _accumulators(spec, source, weight) + bias.reshape(-1, 1, 1)
    low, high = _RANGES.get(spec.result.dtype, (0, 0))
    params[PARAMS.index("pad")] = 0 if is_float else rng.integers(max(low, 0), 100)
    if spec.requantizes:
        # Twice the range of the result, so that both ends are clipped somewhere.
        shift = 40 if spec.high else 24
        largest = (high - low) * 2.0**shift / max(1, int(np.abs(acc).max()))
        limit = max(2, min(int(largest), 2**30))
        numbers[0] = rng.integers(limit // 2, limit, spec.result.stored) * rng.choice([-1, 1], spec.result.stored)
        numbers[1] = numbers[0] * rng.uniform(-0.5, 0.5, spec.result.stored)
        params[:4] = shift, rng.integers(0, 100), low, high
        m = rng.integers(1, 2**12, 2) if other is not None else (0, 0)
        params[4:11] = *m, 12, -int(rng.integers(0, 1000)), 3, low, high
    result = _finished(spec, acc, numbers, params, residual)
    shift = max(int(params[0]), 1)
    packed = requant_numbers(numbers[0], numbers[1], shift, spec.result.stored, spec.lanes)
    return KernelSample(spec, source, weight, bias, packed, params, residual, result)


def _groups(spec: ConvSpec | DepthwiseSpec) -> int:
    return spec.groups if isinstance(spec, ConvSpec) else spec.source.channels


def _weight_range(spec: ConvSpec | DepthwiseSpec) -> tuple[int, int]:
    """What the weights of a kernel may be: a depthwise one takes any byte."""
    if isinstance(spec, DepthwiseSpec):
        return -128, 127
    reach = spec.arithmetic.reach(spec.chain)
    return max(-(2 ** (spec.weight_bits - 1)), -reach), min(2 ** (spec.weight_bits - 1) - 1, reach)


def _buffer(layout: Layout, rng: np.random.Generator) -> np.ndarray:
    if layout.dtype == "float32":
        return rng.standard_normal(layout.length, np.float32)
    return rng.integers(*_RANGES[layout.dtype], layout.length, endpoint=True).astype(layout.dtype)


def _image(layout: Layout, buffer: np.ndarray) -> np.ndarray:
    """A buffer with its halo, ``(stored, *layout.full)``."""
    h, w = layout.full
    return buffer[: h * w * layout.stored].reshape(h, w, layout.stored).transpose(2, 0, 1)


def _accumulators(spec: ConvSpec | DepthwiseSpec, source: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """``(stored out, height, width)`` without bias: int64, or float64 for float kernels."""
    (above, left), result = spec.source.halo, spec.result
    image = _image(spec.source, source)[: spec.source.channels, above - spec.top :, left - spec.left :]
    values = torch.from_numpy(image.astype(np.float64))[None]
    out = torch.nn.functional.conv2d(
        values, torch.from_numpy(weight.astype(np.float64)), None, spec.stride, 0, spec.dilation, _groups(spec)
    )[0, :, : result.height, : result.width].numpy()
    full = np.zeros((result.stored, result.height, result.width))
    full[: result.channels] = out  # sums of integers below 2^53: exact
    return full if spec.arithmetic.is_float else full.astype(np.int64)


def _finished(
    spec: ConvSpec | DepthwiseSpec, acc: np.ndarray, numbers: np.ndarray, params: np.ndarray, residual: np.ndarray
) -> np.ndarray:
    p = {name: int(value) for name, value in zip(PARAMS, params, strict=True)}
    result = spec.result
    value = acc
    if spec.epilogue == "float_relu":
        value = np.maximum(acc, 0)
    elif spec.requantizes:
        multipliers, fractions = numbers.astype(np.int64).reshape(2, -1, 1, 1)
        scaled = acc * multipliers + fractions
        value = np.clip(_rounded(scaled, p["shift"]) + p["zero_point"], p["low"], p["high"])
    if isinstance(spec, ConvSpec) and spec.residual is not None:
        inner, (above, left) = _image(spec.residual, residual), spec.residual.halo
        other = inner[:, above : above + result.height, left : left + result.width].astype(np.int64)
        total = _rounded(value * p["m_conv"] + other * p["m_residual"] + p["add_offset"], p["add_shift"])
        value = np.clip(total + p["add_zero_point"], p["add_low"], p["add_high"])
    padding = ((0, 0), *((width, width) for width in result.halo))
    full = np.pad(value, padding, constant_values=p["pad"]).transpose(1, 2, 0).reshape(-1)
    assert full.size + SLACK == result.length
    return np.ascontiguousarray(full, dtype=result.dtype)


def _rounded(value: np.ndarray, shift: int) -> np.ndarray:
    return (value + (1 << (shift - 1))) >> shift
