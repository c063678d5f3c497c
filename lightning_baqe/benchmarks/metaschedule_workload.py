"""One convolution as TVM's MetaSchedule gets it: the same numbers in, the same numbers out as our kernel's.

The workload is an unscheduled loop nest: u8 x s8 into int32, then the kernel's epilogue (bias, dyadic requantization,
residual sum), all in integers. Nothing of our template is in it. Layouts are those that TVM itself uses for int8 on x86
(``NCHWc`` and ``OIHWio4i``), so that a register-wide dot product fits:

| tensor | dtype | shape |
| --- | --- | --- |
| input, with its halo | uint8 | ``(channels / block, rows, columns, block)`` |
| weights | int8 | ``(out / lanes, channels / block, kh, kw, block / 4, lanes, 4)`` |
| multipliers, terms | int32, int64 | ``(out / lanes, lanes)``; or one int32 bias where sums are the result |
| residual, result | of the layout | ``(out / lanes, height, width, lanes)`` |

What makes it easier than our kernel's job, all in MetaSchedule's favour: shifts, zero points and bounds are constants
of the code, biases are in the terms, and the halo of the result is not written.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import te, tirx

from lightning_baqe.errors import ConfigError
from lightning_baqe.kernels.sample import KernelSample
from lightning_baqe.kernels.x86.conv_epilogue import PARAMS
from lightning_baqe.kernels.x86.conv_spec import ConvSpec
from lightning_baqe.kernels.x86.layout import Layout

QUAD = 4  # input channels of one dot product
LARGEST_BLOCK = 64  # input channels that are innermost


def check_workload(spec: ConvSpec) -> None:
    """Check that a kernel has a workload.

    Raises:
        ConfigError: it is grouped, a float one, or has several threads.
    """
    if spec.arithmetic.is_float or spec.groups != 1 or spec.threads != 1:
        raise ConfigError(
            "MetaSchedule is compared on dense integer convolutions on one thread, got one with "
            f"{spec.groups} group(s), {spec.threads} thread(s) and the arithmetic {spec.dot!r}: choose another kernel"
        )


def input_block(spec: ConvSpec) -> int:
    """Input channels that are innermost in memory, a multiple of 4."""
    return min(-(-spec.source.channels // QUAD) * QUAD, LARGEST_BLOCK)


def _input_shape(spec: ConvSpec) -> tuple[int, int, int, int]:
    """Only what the window reaches."""
    rows, columns = (
        (size - 1) * stride + (kernel - 1) * dilation + 1
        for size, stride, kernel, dilation in zip(
            (spec.result.height, spec.result.width), spec.stride, spec.kernel, spec.dilation, strict=True
        )
    )
    return -(-spec.source.channels // input_block(spec)), rows, columns, input_block(spec)


def workload(spec: ConvSpec, params: np.ndarray) -> Any:
    """The convolution as a TIR function ``main`` of the tensors of the table above, in that order.

    Args:
        spec: the kernel; its ``dot`` and ``chain`` are not used.
        params: int64, by :data:`~lightning_baqe.kernels.x86.conv.PARAMS`.

    Raises:
        ConfigError: see :func:`check_workload`.
    """
    check_workload(spec)
    inputs = te.placeholder(_input_shape(spec), "uint8", "X")
    (kh, kw), block, lanes = spec.kernel, input_block(spec), spec.lanes
    outer = inputs.shape[0]
    weights = te.placeholder((spec.blocks, outer, kh, kw, block // QUAD, lanes, QUAD), "int8", "W")
    extents = {"outer": outer, "row": kh, "column": kw, "quad": block // QUAD, "inner": QUAD}
    axes = [te.reduce_axis((0, extent), name) for name, extent in extents.items()]
    shape = (spec.blocks, spec.result.height, spec.result.width, lanes)

    def product(k: Any, y: Any, x: Any, lane: Any) -> Any:
        c, i, j, quad, inner = axes
        at_row, at_column = y * spec.stride[0] + i * spec.dilation[0], x * spec.stride[1] + j * spec.dilation[1]
        value = inputs[c, at_row, at_column, quad * QUAD + inner].astype("int32")
        return te.sum(value * weights[k, c, i, j, quad, lane, inner].astype("int32"), axis=axes)

    sums = te.compute(shape, product, "sums")
    per_channel = (spec.blocks, lanes)
    if spec.epilogue == "acc":
        bias = te.placeholder(per_channel, "int32", "bias")
        result = te.compute(shape, lambda k, y, x, lane: sums[k, y, x, lane] + bias[k, lane], "Y")
        return _named([inputs, weights, bias, result])
    multipliers = te.placeholder(per_channel, "int32", "multipliers")
    terms = te.placeholder(per_channel, "int64", "terms")
    residual = None if spec.residual is None else te.placeholder(shape, spec.residual.dtype, "residual")
    p = {name: int(value) for name, value in zip(PARAMS, params, strict=True)}

    def finished(k: Any, y: Any, x: Any, lane: Any) -> Any:
        scaled = sums[k, y, x, lane].astype("int64") * multipliers[k, lane].astype("int64") + terms[k, lane]
        width = "int32" if spec.narrow else "int64"
        shifted = (scaled >> tirx.const(p["shift"], "int64")).astype(width)
        value = _clipped(shifted, width, p["zero_point"], p["low"], p["high"])
        if residual is not None:
            width = "int32" if spec.narrow_add else "int64"
            total = value.astype(width) * tirx.const(p["m_conv"], width)
            total += residual[k, y, x, lane].astype(width) * tirx.const(p["m_residual"], width)
            total += tirx.const(p["add_offset"] + (1 << (p["add_shift"] - 1)), width)
            total = total >> tirx.const(p["add_shift"], width)
            value = _clipped(total, width, p["add_zero_point"], p["add_low"], p["add_high"])
        return value.astype(spec.result.dtype)

    result = te.compute(shape, finished, "Y")
    others = [] if residual is None else [residual]
    return _named([inputs, weights, multipliers, terms, *others, result])


def _clipped(value: Any, width: str, zero_point: int, low: int, high: int) -> Any:
    """A value of this width plus the zero point, clipped."""
    return te.max(te.min(value + tirx.const(zero_point, width), tirx.const(high, width)), tirx.const(low, width))


def _named(tensors: list[Any]) -> Any:
    return te.create_prim_func(tensors).with_attr("global_symbol", "main")


def workload_arguments(sample: KernelSample) -> list[np.ndarray]:
    """A sample's data as the workload takes it, the result left out."""
    spec = sample.spec
    assert isinstance(spec, ConvSpec)
    source, lanes = spec.source, spec.lanes
    outer, rows, columns, block = _input_shape(spec)
    image = np.zeros((rows, columns, outer * block), np.uint8)
    (above, left), whole = source.halo, _image(source, sample.source)
    seen = whole[above - spec.top :, left - spec.left :, : source.channels]
    seen = seen[:rows, :columns]  # a kernel with a stride may leave out the last rows, or end where the halo does
    image[: seen.shape[0], : seen.shape[1], : source.channels] = seen
    weight = np.zeros((spec.result.stored, outer * block, *spec.kernel), np.int8)
    weight[: spec.result.channels, : source.channels] = sample.weight
    blocked = weight.reshape(spec.blocks, lanes, outer, block // QUAD, QUAD, *spec.kernel)
    found = [image.reshape(rows, columns, outer, block).transpose(2, 0, 1, 3), blocked.transpose(0, 2, 5, 6, 3, 1, 4)]
    bias = sample.bias.reshape(spec.blocks, lanes)
    if spec.epilogue == "acc":
        found.append(bias)
    else:
        # Undoes requant_numbers(): for each block multipliers, then terms, even lanes first.
        numbers = sample.numbers.reshape(spec.blocks, 2, 2, lanes // 2).transpose(1, 0, 3, 2)
        multipliers, terms = numbers.reshape(2, spec.blocks, lanes)
        found += [multipliers.astype(np.int32), terms + bias * multipliers]
    if spec.residual is not None:
        found.append(_blocked(spec.residual, sample.residual, lanes))
    return [np.ascontiguousarray(array) for array in found]


def workload_result(sample: KernelSample) -> np.ndarray:
    """What the workload must write for a sample: our reference's values, ``(out / lanes, height, width, lanes)``."""
    return _blocked(sample.spec.result, sample.result, sample.spec.lanes)


def _image(layout: Layout, buffer: np.ndarray) -> np.ndarray:
    """A buffer with its halo, ``(rows, columns, stored channels)``."""
    height, width = layout.full
    return buffer[: height * width * layout.stored].reshape(height, width, layout.stored)


def _blocked(layout: Layout, buffer: np.ndarray, lanes: int) -> np.ndarray:
    above, left = layout.halo
    inner = _image(layout, buffer)[above : above + layout.height, left : left + layout.width]
    return np.ascontiguousarray(inner.reshape(layout.height, layout.width, -1, lanes).transpose(2, 0, 1, 3))
