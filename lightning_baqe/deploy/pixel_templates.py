"""Kernels of all operators but dense convolutions: elementwise, pooling, quantize, dequantize, grouped convolutions.

They read and write the layouts of :mod:`lightning_baqe.deploy.layout`; each fills the halo that its readers want.
Numbers (scales, multipliers, ranges) come as data, so that one compiled kernel serves every layer of its shape.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from lightning_baqe.deploy.conv_template import fill_regions
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


@functools.lru_cache(maxsize=4096)
def build_pointwise(spec: PixelSpec) -> Any:
    """A TIR function of (source, other, factors, params, result), one value at a time."""
    source, result, other = spec.source, spec.result, spec.other or spec.source
    lanes = 16 if result.stored % 16 == 0 else 1
    vectors = result.stored // lanes
    (head, head_length, _), (side, side_length, side_repeats) = fill_regions(result)
    tail = (result.height + result.halo) * result.row - result.halo * result.stored if result.halo else 0
    result_dtype = result.dtype
    from_source, from_other, to_result = source.origin(), other.origin(), result.origin()

    def compute(a: Any, b: Any, factors: Any, params: Any) -> Any:
        return _pointwise(spec, a, b, factors, params, lanes)

    @T.prim_func(s_tir=True)
    def pointwise(
        X: T.Buffer((source.length,), source.dtype),
        Z: T.Buffer((other.length,), other.dtype),
        F: T.Buffer((1,), "float32"),
        P: T.Buffer((PIXEL_PARAMS,), "int64"),
        Y: T.Buffer((result.length,), result_dtype),
    ):
        T.func_attr({"tirx.noalias": True})
        if result.halo > 0:
            for i in T.serial(head_length):
                Y[head + i] = T.Cast(result_dtype, P[PAD])
            for y in T.serial(side_repeats):
                for i in T.serial(side_length):
                    Y[side + y * result.row + i] = T.Cast(result_dtype, P[PAD])
            for i in T.serial(head_length):
                Y[tail + i] = T.Cast(result_dtype, P[PAD])
        for y in T.serial(result.height):
            for i in T.serial(result.width * vectors):
                Y[T.ramp(to_result + y * result.row + i * lanes, 1, lanes)] = compute(
                    _at(X, from_source + y * source.row + i * lanes, lanes),
                    _at(Z, from_other + y * other.row + i * lanes, lanes),
                    F,
                    P,
                )

    return pointwise


@functools.lru_cache(maxsize=4096)
def build_pool(spec: PixelSpec) -> Any:
    """Max or average pooling, a TIR function of (source, other, factors, params, result).

    Windows of a max pool are clipped to the image by clamping indices: the clamped pixel lies in the window, so that
    taking it twice changes nothing.
    """
    source, result = spec.source, spec.result
    lanes = 16
    vectors = result.stored // lanes
    (head, head_length, _), (side, side_length, side_repeats) = fill_regions(result)
    tail = (result.height + result.halo) * result.row - result.halo * result.stored if result.halo else 0
    result_dtype, source_dtype = result.dtype, source.dtype
    from_source, to_result = source.origin(), result.origin()
    kh, kw = spec.kernel
    sh, sw = spec.stride
    ph, pw = spec.padding
    is_max = spec.op == "max_pool"
    kind = source_dtype if is_max else ("int32" if spec.op == "avg_pool" else "float32")

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

    @T.prim_func(s_tir=True)
    def pool(
        X: T.Buffer((source.length,), source_dtype),
        Z: T.Buffer((source.length,), source_dtype),
        F: T.Buffer((1,), "float32"),
        P: T.Buffer((PIXEL_PARAMS,), "int64"),
        Y: T.Buffer((result.length,), result_dtype),
    ):
        T.func_attr({"tirx.noalias": True})
        acc = T.alloc_buffer((1, lanes), kind, scope="local")
        if result.halo > 0:
            for i in T.serial(head_length):
                Y[head + i] = T.Cast(result_dtype, P[PAD])
            for y in T.serial(side_repeats):
                for i in T.serial(side_length):
                    Y[side + y * result.row + i] = T.Cast(result_dtype, P[PAD])
            for i in T.serial(head_length):
                Y[tail + i] = T.Cast(result_dtype, P[PAD])
        for y in T.serial(result.height):
            for x in T.serial(result.width):
                for v in T.serial(vectors):
                    acc[0, T.ramp(0, 1, lanes)] = initial(
                        X[
                            T.ramp(
                                from_source
                                + clamp(y * sh - ph, source.height, rows_clamped) * source.row
                                + clamp(x * sw - pw, source.width, columns_clamped) * source.stored
                                + v * lanes,
                                1,
                                lanes,
                            )
                        ]
                    )
                    for i in T.serial(kh):
                        for j in T.serial(kw):
                            acc[0, T.ramp(0, 1, lanes)] = accumulate(
                                acc[0, T.ramp(0, 1, lanes)],
                                X[
                                    T.ramp(
                                        from_source
                                        + clamp(y * sh - ph + i, source.height, rows_clamped) * source.row
                                        + clamp(x * sw - pw + j, source.width, columns_clamped) * source.stored
                                        + v * lanes,
                                        1,
                                        lanes,
                                    )
                                ],
                                P,
                            )
                    Y[T.ramp(to_result + y * result.row + x * result.stored + v * lanes, 1, lanes)] = finish(
                        acc[0, T.ramp(0, 1, lanes)], F, P
                    )

    return pool


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
    result_dtype = result.dtype
    to_result = result.origin()
    padded = -(-width // 16) * 16
    # Everything outside the image and every channel beyond the logical ones holds the pad value: one fill for all.
    fill_first = halo > 0 or stored > channels

    def convert(value: Any, factors: Any, params: Any) -> Any:
        return value if is_float else _quantized(spec, value, factors, params, 1)

    @T.prim_func(s_tir=True)
    def pack(
        X: T.Buffer((1, channels, height, width), "float32"),
        F: T.Buffer((1,), "float32"),
        P: T.Buffer((PIXEL_PARAMS,), "int64"),
        Y: T.Buffer((result.length,), result_dtype),
    ):
        T.func_attr({"tirx.noalias": True})
        line = T.alloc_buffer((padded,), result_dtype, scope="local")
        if fill_first:
            for i in T.serial(result.length):
                Y[i] = T.Cast(result_dtype, P[PAD])
        for y in T.serial(height):
            for c in T.serial(channels):
                for x in T.serial(width):
                    line[x] = convert(X[0, c, y, x], F, P)
                for x in T.serial(width):
                    Y[to_result + y * result.row + x * stored + c] = line[x]

    return pack


@functools.lru_cache(maxsize=256)
def build_unpack(spec: PixelSpec) -> Any:
    """A network's output as float32 ``(1, channels[, height, width])``, a TIR function of (source, factors, params, result).

    ``logits``: int32 (or narrower) values minus the zero point times one factor by channel; ``unpack``: floats as are.
    """
    source = spec.source
    channels, height, width = source.channels, source.height, source.width
    from_source = source.origin()
    dequantize = spec.op == "logits"
    source_dtype = source.dtype

    def convert(value: Any, factor: Any, params: Any) -> Any:
        if not dequantize:
            return value
        return T.Cast("float32", T.Cast("int32", value) - T.Cast("int32", params[0])) * factor

    @T.prim_func(s_tir=True)
    def unpack(
        X: T.Buffer((source.length,), source_dtype),
        F: T.Buffer((channels,), "float32"),
        P: T.Buffer((PIXEL_PARAMS,), "int64"),
        Y: T.Buffer((1, channels * height * width), "float32"),
    ):
        T.func_attr({"tirx.noalias": True})
        for c in T.serial(channels):
            for y in T.serial(height):
                for x in T.serial(width):
                    Y[0, (c * height + y) * width + x] = convert(
                        X[from_source + y * source.row + x * source.stored + c], F[c], P
                    )

    return unpack


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
    """A TIR function of (source, weights, bias, multipliers, params, result); weights ``(out, in / groups, kh, kw)``.

    params: shift, zero point, low, high as in the convolution template, the halo's value last.
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

    def finish(acc: Any, multiplier: Any, params: Any) -> Any:
        if spec.epilogue in ("acc", "float"):
            return acc
        if spec.epilogue == "float_relu":
            return T.max(acc, T.float32(0))
        value = _rounding_shift(T.Cast("int64", acc) * T.Cast("int64", multiplier), params, 0, "int64", 1)
        return T.Cast(result_dtype, _clip_to(value + params[1], params, 2, "int64", 1))

    @T.prim_func(s_tir=True)
    def grouped(
        X: T.Buffer((source.length,), source.dtype),
        W: T.Buffer((out_channels, inner, kh, kw), weights_dtype),
        B: T.Buffer((result.stored,), kind),
        M: T.Buffer((result.stored,), "int32"),
        P: T.Buffer((PIXEL_PARAMS,), "int64"),
        Y: T.Buffer((result.length,), result_dtype),
    ):
        T.func_attr({"tirx.noalias": True})
        acc = T.alloc_buffer((1,), kind, scope="local")
        for i in T.serial(result.length):
            Y[i] = T.Cast(result_dtype, P[PAD])
        for y in T.serial(result.height):
            for x in T.serial(result.width):
                for o in T.serial(out_channels):
                    acc[0] = B[o]
                    for i in T.serial(kh):
                        for j in T.serial(kw):
                            for c in T.serial(inner):
                                acc[0] = acc[0] + T.Cast(kind, W[o, c, i, j]) * T.Cast(
                                    kind,
                                    X[
                                        start
                                        + (y * sh + i * dh) * source.row
                                        + (x * sw + j * dw) * source.stored
                                        + T.floordiv(o, outer) * inner
                                        + c
                                    ],
                                )
                    Y[to_result + y * result.row + x * result.stored + o] = finish(acc[0], M[o], P)

    return grouped
