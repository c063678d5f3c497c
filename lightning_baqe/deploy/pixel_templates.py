"""Kernels of all operators but dense convolutions: elementwise, pooling, quantize, dequantize, grouped convolutions.

They read and write the layouts of :mod:`lightning_baqe.deploy.layout`; each fills the halo that its readers want.
Numbers (scales, multipliers, ranges) come as data, so that one compiled kernel serves every layer of its shape.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as B  # the same names as T's, as functions that build; no source is parsed

from lightning_baqe.deploy.conv_template import fill_halo
from lightning_baqe.deploy.layout import Layout

PIXEL_PARAMS = 8  # int64: meaning by operator, the last is the halo's value
PAD = PIXEL_PARAMS - 1


@dataclass(frozen=True)
class PixelSpec:
    """Everything that the code of such a kernel depends on.

    Args:
        op: ``pack``, ``quantize``, ``dequantize``, ``requantize``, ``add``, ``clip``, ``max_pool``, ``avg_pool``,
            ``float_add``, ``float_relu``, ``float_avg_pool``, ``logits``, ``unpack``.
        source, result: layouts.
        other: layout of the second operand of a sum.
        kernel, stride, padding: of pooling, ``(height, width)``.
        narrow: products and sums fit 32 bits.
        relu: of float sums.
    """

    op: str
    source: Layout
    result: Layout
    other: Layout | None = None
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    narrow: bool = True
    relu: bool = False


def _cast(dtype: str, lanes: int, value: Any) -> Any:
    return T.Cast(f"{dtype}x{lanes}" if lanes > 1 else dtype, value)


def _splat(value: Any, lanes: int) -> Any:
    return T.broadcast(value, lanes) if lanes > 1 else value


def _param(params: Any, index: int, dtype: str, lanes: int) -> Any:
    return _splat(T.Cast(dtype, params[index]), lanes)


def _rounding_shift(value: Any, params: Any, index: int, dtype: str, lanes: int) -> Any:
    amount = T.Cast(dtype, params[index])
    one = T.int64(1) if dtype == "int64" else T.int32(1)
    half = _splat(T.shift_left(one, amount - one), lanes)
    return T.shift_right(value + half, _splat(amount, lanes))


def _clip_to(value: Any, params: Any, low: int, dtype: str, lanes: int) -> Any:
    return T.min(T.max(value, _param(params, low, dtype, lanes)), _param(params, low + 1, dtype, lanes))


def _requantized(spec: PixelSpec, value: Any, params: Any, lanes: int) -> Any:
    """params: input zero point, multiplier, shift, zero point, low, high."""
    width = "int32" if spec.narrow else "int64"
    shifted = _cast(width, lanes, value) - _param(params, 0, width, lanes)
    scaled = _rounding_shift(shifted * _param(params, 1, width, lanes), params, 2, width, lanes)
    out = _clip_to(scaled + _param(params, 3, width, lanes), params, 4, width, lanes)
    return _cast(spec.result.dtype, lanes, out)


def _added(spec: PixelSpec, a: Any, b: Any, params: Any, lanes: int) -> Any:
    """params: multiplier a, multiplier b, offset, shift, zero point, low, high."""
    width = "int32" if spec.narrow else "int64"
    total = (
        _cast(width, lanes, a) * _param(params, 0, width, lanes)
        + _cast(width, lanes, b) * _param(params, 1, width, lanes)
        + _param(params, 2, width, lanes)
    )
    out = _rounding_shift(total, params, 3, width, lanes) + _param(params, 4, width, lanes)
    return _cast(spec.result.dtype, lanes, _clip_to(out, params, 5, width, lanes))


def _quantized(spec: PixelSpec, value: Any, factors: Any, params: Any, lanes: int) -> Any:
    """factors: inverse scale; params: zero point, low, high. Rounds half to even, clips before the cast."""
    low = _splat(T.Cast("float32", params[1] - params[0]), lanes)
    high = _splat(T.Cast("float32", params[2] - params[0]), lanes)
    rounded = T.nearbyint(value * _splat(factors[0], lanes))
    clipped = T.min(T.max(rounded, low), high)
    return _cast(spec.result.dtype, lanes, _cast("int32", lanes, clipped) + _param(params, 0, "int32", lanes))


def _pointwise(spec: PixelSpec, a: Any, b: Any, factors: Any, params: Any, lanes: int) -> Any:
    if spec.op == "requantize":
        return _requantized(spec, a, params, lanes)
    if spec.op == "add":
        return _added(spec, a, b, params, lanes)
    if spec.op == "quantize":
        return _quantized(spec, a, factors, params, lanes)
    if spec.op == "dequantize":
        shifted = _cast("int32", lanes, a) - _param(params, 0, "int32", lanes)
        return _cast("float32", lanes, shifted) * _splat(factors[0], lanes)
    if spec.op == "clip":
        return _cast(spec.result.dtype, lanes, _clip_to(_cast("int32", lanes, a), params, 0, "int32", lanes))
    total = a + b if spec.op == "float_add" else a
    if spec.relu or spec.op == "float_relu":
        total = T.max(total, _splat(T.float32(0), lanes))
    return total


def _at(buffer: Any, index: Any, lanes: int) -> Any:
    return buffer[T.ramp(index, 1, lanes)] if lanes > 1 else buffer[index]


def _number_arguments() -> tuple[Any, Any]:
    """The arguments factors and params."""
    return B.arg("F", B.buffer((1,), "float32")), B.arg("P", B.buffer((PIXEL_PARAMS,), "int64"))


@functools.lru_cache(maxsize=4096)
def build_pointwise(spec: PixelSpec) -> Any:
    """A TIR function of (source, other, factors, params, result), one value at a time."""
    source, result, other = spec.source, spec.result, spec.other or spec.source
    lanes = 16 if result.stored % 16 == 0 else 1
    vectors = result.stored // lanes
    from_source, from_other, to_result = source.origin(), other.origin(), result.origin()

    with IRBuilder() as builder, B.prim_func(s_tir=True):
        B.func_name("pointwise")
        X = B.arg("X", B.buffer((source.length,), source.dtype))
        Z = B.arg("Z", B.buffer((other.length,), other.dtype))
        F, P = _number_arguments()
        Y = B.arg("Y", B.buffer((result.length,), result.dtype))
        B.func_attr({"tirx.noalias": True})
        fill_halo(result, Y, P[PAD])
        with B.serial(result.height) as y, B.serial(result.width * vectors) as i:
            a = _at(X, from_source + y * source.row + i * lanes, lanes)
            b = _at(Z, from_other + y * other.row + i * lanes, lanes)
            to = T.ramp(to_result + y * result.row + i * lanes, 1, lanes)
            B.buffer_store(Y, _pointwise(spec, a, b, F, P, lanes), [to])
    return builder.get()


@functools.lru_cache(maxsize=4096)
def build_pool(spec: PixelSpec) -> Any:
    """Max or average pooling, a TIR function of (source, other, factors, params, result).

    Windows of a max pool are clipped to the image by clamping indices: the clamped pixel lies in the window, so that
    taking it twice changes nothing.
    """
    source, result = spec.source, spec.result
    lanes = 16
    vectors = result.stored // lanes
    result_dtype = result.dtype
    from_source, to_result = source.origin(), result.origin()
    kh, kw = spec.kernel
    sh, sw = spec.stride
    ph, pw = spec.padding
    is_max = spec.op == "max_pool"
    kind = source.dtype if is_max else ("int32" if spec.op == "avg_pool" else "float32")

    def clamp(index: Any, size: int, padded: int) -> Any:
        return T.max(T.min(index, T.int32(size - 1)), T.int32(0)) if padded else index

    rows_clamped = ph > 0 or (result.height - 1) * sh + kh > source.height
    columns_clamped = pw > 0 or (result.width - 1) * sw + kw > source.width

    def initial(first: Any) -> Any:
        return first if is_max else _splat(T.int32(0) if kind == "int32" else T.float32(0), lanes)

    def accumulate(acc: Any, value: Any, params: Any) -> Any:
        if is_max:
            return T.max(acc, value)
        if kind == "float32":
            return acc + value
        return acc + _cast("int32", lanes, value) - _param(params, 0, "int32", lanes)

    def finish(acc: Any, factors: Any, params: Any) -> Any:
        if is_max:
            return acc
        if kind == "float32":
            return acc * _splat(factors[0], lanes)
        # params: input zero point (already taken), multiplier, shift, zero point, low, high
        scaled = _cast("int64", lanes, acc) * _param(params, 1, "int64", lanes)
        out = _rounding_shift(scaled, params, 2, "int64", lanes) + _param(params, 3, "int64", lanes)
        return _cast(result_dtype, lanes, _clip_to(out, params, 4, "int64", lanes))

    with IRBuilder() as builder, B.prim_func(s_tir=True):
        B.func_name("pool")
        X = B.arg("X", B.buffer((source.length,), source.dtype))
        B.arg("Z", B.buffer((source.length,), source.dtype))
        F, P = _number_arguments()
        Y = B.arg("Y", B.buffer((result.length,), result.dtype))
        B.func_attr({"tirx.noalias": True})
        acc = B.alloc_buffer((1, lanes), kind, scope="local")
        at = [0, T.ramp(0, 1, lanes)]
        fill_halo(result, Y, P[PAD])
        with B.serial(result.height) as y, B.serial(result.width) as x, B.serial(vectors) as v:

            def pixel(row: Any, column: Any) -> Any:
                rows = clamp(row, source.height, rows_clamped) * source.row
                columns = clamp(column, source.width, columns_clamped) * source.stored
                return X[T.ramp(from_source + rows + columns + v * lanes, 1, lanes)]

            B.buffer_store(acc, initial(pixel(y * sh - ph, x * sw - pw)), at)
            with B.serial(kh) as i, B.serial(kw) as j:
                B.buffer_store(acc, accumulate(acc[tuple(at)], pixel(y * sh - ph + i, x * sw - pw + j), P), at)
            to = T.ramp(to_result + y * result.row + x * result.stored + v * lanes, 1, lanes)
            B.buffer_store(Y, finish(acc[tuple(at)], F, P), [to])
    return builder.get()


@functools.lru_cache(maxsize=256)
def build_pack(spec: PixelSpec) -> Any:
    """The network's input, ``(1, channels, height, width)`` float32, into our layout; quantized if the layout is.

    A TIR function of (source, factors, params, result). One row of one channel at a time is converted in vectors, then
    spread over the pixels.
    """
    result = spec.result
    channels, height, width = result.channels, result.height, result.width
    stored, halo = result.stored, result.halo
    is_float = result.dtype == "float32"
    to_result = result.origin()
    padded = -(-width // 16) * 16
    # Everything outside the image and every channel beyond the logical ones holds the pad value: one fill for all.
    fill_first = halo > 0 or stored > channels

    with IRBuilder() as builder, B.prim_func(s_tir=True):
        B.func_name("pack")
        X = B.arg("X", B.buffer((1, channels, height, width), "float32"))
        F, P = _number_arguments()
        Y = B.arg("Y", B.buffer((result.length,), result.dtype))
        B.func_attr({"tirx.noalias": True})
        line = B.alloc_buffer((padded,), result.dtype, scope="local")
        if fill_first:
            with B.serial(result.length) as i:
                B.buffer_store(Y, T.Cast(result.dtype, P[PAD]), [i])
        with B.serial(height) as y, B.serial(channels) as c:
            with B.serial(width) as x:
                value = X[0, c, y, x]
                B.buffer_store(line, value if is_float else _quantized(spec, value, F, P, 1), [x])
            with B.serial(width) as x:
                B.buffer_store(Y, line[x], [to_result + y * result.row + x * stored + c])
    return builder.get()


@functools.lru_cache(maxsize=256)
def build_unpack(spec: PixelSpec) -> Any:
    """A network's output as float32 ``(1, values)``, a TIR function of (source, factors, params, result).

    ``logits``: int32 (or narrower) values minus the zero point times one factor by channel; ``unpack``: floats as are.
    """
    source = spec.source
    channels, height, width = source.channels, source.height, source.width
    from_source = source.origin()
    dequantize = spec.op == "logits"

    def convert(value: Any, factor: Any, params: Any) -> Any:
        if not dequantize:
            return value
        return T.Cast("float32", T.Cast("int32", value) - T.Cast("int32", params[0])) * factor

    with IRBuilder() as builder, B.prim_func(s_tir=True):
        B.func_name("unpack")
        X = B.arg("X", B.buffer((source.length,), source.dtype))
        F = B.arg("F", B.buffer((channels,), "float32"))
        P = B.arg("P", B.buffer((PIXEL_PARAMS,), "int64"))
        Y = B.arg("Y", B.buffer((1, channels * height * width), "float32"))
        B.func_attr({"tirx.noalias": True})
        with B.serial(channels) as c, B.serial(height) as y, B.serial(width) as x:
            value = X[from_source + y * source.row + x * source.stored + c]
            B.buffer_store(Y, convert(value, F[c], P), [0, (c * height + y) * width + x])
    return builder.get()


@dataclass(frozen=True)
class GroupedSpec:
    """A grouped or depthwise convolution: exact, plain loops over one output value at a time.

    Args:
        source, result: layouts.
        kernel, stride, dilation: ``(height, width)``.
        top, left: padding.
        groups: of channels.
        epilogue: ``acc``, ``requant``, ``float`` or ``float_relu``.
    """

    source: Layout
    result: Layout
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    top: int
    left: int
    groups: int
    epilogue: str


@functools.lru_cache(maxsize=256)
def build_grouped(spec: GroupedSpec) -> Any:
    """A TIR function of (source, weights, bias, numbers, params, result); weights ``(out, in / groups, kh, kw)``.

    Numbers are the multipliers of all stored channels, then their fractions.

    Params: shift, zero point, low, high as in the convolution template, the halo's value last.
    """
    source, result = spec.source, spec.result
    kh, kw = spec.kernel
    inner, outer = source.channels // spec.groups, result.channels // spec.groups
    is_float = spec.epilogue.startswith("float")
    kind = "float32" if is_float else "int32"
    weights_dtype = "float32" if is_float else "int8"
    start, to_result = source.origin(spec.top, spec.left), result.origin()
    sh, sw = spec.stride
    dh, dw = spec.dilation
    result_dtype = result.dtype
    out_channels = result.channels

    def finish(acc: Any, multiplier: Any, fraction: Any, params: Any) -> Any:
        if spec.epilogue in ("acc", "float"):
            return acc
        if spec.epilogue == "float_relu":
            return T.max(acc, T.float32(0))
        product = T.Cast("int64", acc) * T.Cast("int64", multiplier) + T.Cast("int64", fraction)
        value = _rounding_shift(product, params, 0, "int64", 1)
        return T.Cast(result_dtype, _clip_to(value + params[1], params, 2, "int64", 1))

    with IRBuilder() as builder, B.prim_func(s_tir=True):
        B.func_name("grouped")
        X = B.arg("X", B.buffer((source.length,), source.dtype))
        W = B.arg("W", B.buffer((out_channels, inner, kh, kw), weights_dtype))
        bias = B.arg("B", B.buffer((result.stored,), kind))
        M = B.arg("M", B.buffer((2 * result.stored,), "int32"))
        P = B.arg("P", B.buffer((PIXEL_PARAMS,), "int64"))
        Y = B.arg("Y", B.buffer((result.length,), result_dtype))
        B.func_attr({"tirx.noalias": True})
        acc = B.alloc_buffer((1,), kind, scope="local")
        with B.serial(result.length) as i:
            B.buffer_store(Y, T.Cast(result_dtype, P[PAD]), [i])
        with B.serial(result.height) as y, B.serial(result.width) as x, B.serial(out_channels) as o:
            B.buffer_store(acc, bias[o], [0])
            with B.serial(kh) as i, B.serial(kw) as j, B.serial(inner) as c:
                row, column = (y * sh + i * dh) * source.row, (x * sw + j * dw) * source.stored
                value = X[start + row + column + T.floordiv(o, outer) * inner + c]
                B.buffer_store(acc, acc[0] + T.Cast(kind, W[o, c, i, j]) * T.Cast(kind, value), [0])
            to = to_result + y * result.row + x * result.stored + o
            B.buffer_store(Y, finish(acc[0], M[o], M[result.stored + o], P), [to])
    return builder.get()
