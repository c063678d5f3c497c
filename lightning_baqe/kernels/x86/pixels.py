"""Elementwise kernels, and those at both ends of a network: the image into our layout, the values out of it.

They read and write the layouts of :mod:`lightning_baqe.kernels.x86.layout`; each fills the halo that its readers want.
Numbers (scales, multipliers, ranges) come as data, so that one compiled kernel serves every layer of its shape.

Every kernel takes its values first, then the constants of its operator, then ``params``, then its result:

| op | constants | params |
| --- | --- | --- |
| requantize | | input zero point, multiplier, shift, zero point, low, high |
| add | | multiplier a, multiplier b, offset, shift, zero point, low, high |
| mul | | zero point a, zero point b, multiplier, shift, zero point, low, high |
| affine | int32 multipliers, int64 offsets by stored channel (below) | input zero point, shift, zero point, low, high |
| prelu | int32 multipliers by stored channel, of positive and of negative values | input zero point, shifts of \
both, zero point, low, high |
| table | entries of the result's type (below) | lowest input |
| clip | | low, high |
| pack, quantize | float32 inverse scale (where the result is an integer) | zero point, low, high |
| dequantize | float32 scales by stored channel | zero point |
| logits | float32 scales by channel | zero point |
| float_affine | float32 gains, then shifts by stored channel | |
| float_prelu | float32 slopes by stored channel | |
| float_function, float_add, float_mul, unpack | | |

Of each 16 offsets of an affine operator the even ones come first. A table has an entry for each integer of its input's
range; but 256 in the order of the byte's value where its input is stored in one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T
from tvm.tirx.script.builder import ir as B

from lightning_baqe.kernels.x86 import float_functions
from lightning_baqe.kernels.x86.arithmetic import look_up_64
from lightning_baqe.kernels.x86.emit import arguments, at, cast, fill_halo, fill_spare, param, put, splat, tile_start
from lightning_baqe.kernels.x86.layout import VECTOR, Layout
from lightning_baqe.kernels.x86.requantize import clip, clipped, requantized_high, rescaled, rounding_shift

PIXEL_PARAMS = 8  # int64: meaning by operator, the last is the halo's value
PAD = PIXEL_PARAMS - 1
MOST_SHUFFLED = 4  # channels of an image


@dataclass(frozen=True)
class PixelSpec:
    """Everything that the code of such a kernel depends on.

    Args:
        op: a name of the table above.
        source, result: layouts.
        other: layout of the second operand of a sum or a product; one row, column or channel of an operand is taken for
            all of the result's.
        narrow: products and sums fit 32 bits.
        high: what is requantized fits 32 bits, and every shift is 32 or more.
        relu: of float sums.
        entries: of a table.
        function: a float function as text; see :func:`float_functions.encode`.
        vbmi: of a table from bytes to bytes, with these instructions.
        flat: what is packed has the shape ``(1, values)``, as islands leave it.
    """

    op: str
    source: Layout
    result: Layout
    other: Layout | None = None
    narrow: bool = True
    high: bool = False
    relu: bool = False
    entries: int = 0
    function: str = ""
    vbmi: bool = False
    flat: bool = False


def _limits(params: Any, first: int) -> tuple[Any, Any, Any]:
    """Zero point, low and high, which stand together in the params."""
    return params[first], params[first + 1], params[first + 2]


def _rescaled(spec: PixelSpec, value: Any, params: Any, first: int, lanes: int) -> Any:
    """The value times one factor, onto the result's grid; params from ``first`` on: multiplier, shift, and the rest."""
    width = "int32" if spec.narrow or spec.high else "int64"
    factor, limits = param(params, first, width, lanes), _limits(params, first + 2)
    return cast(spec.result.dtype, lanes, rescaled(value, factor, params[first + 1], limits, width, spec.high, lanes))


def _requantized(spec: PixelSpec, value: Any, params: Any, lanes: int) -> Any:
    width = "int32" if spec.narrow or spec.high else "int64"
    return _rescaled(spec, cast(width, lanes, value) - param(params, 0, width, lanes), params, 1, lanes)


def _added(spec: PixelSpec, a: Any, b: Any, params: Any, lanes: int) -> Any:
    width = "int32" if spec.narrow else "int64"
    total = (
        cast(width, lanes, a) * param(params, 0, width, lanes)
        + cast(width, lanes, b) * param(params, 1, width, lanes)
        + param(params, 2, width, lanes)
    )
    shifted = rounding_shift(total, params[3], width, lanes)
    return cast(spec.result.dtype, lanes, clipped(shifted, *_limits(params, 4), width, lanes))


def _multiplied(spec: PixelSpec, a: Any, b: Any, params: Any, lanes: int) -> Any:
    width = "int32" if spec.high else "int64"
    first = cast(width, lanes, a) - param(params, 0, width, lanes)
    product = first * (cast(width, lanes, b) - param(params, 1, width, lanes))
    return _rescaled(spec, product, params, 2, lanes)


def _affine(spec: PixelSpec, value: Any, constants: list[Any], channel: Any, params: Any, lanes: int) -> Any:
    multipliers, offsets = constants
    wide = "int32" if spec.high else "int64"
    shifted = cast(wide, lanes, value) - param(params, 0, wide, lanes)
    factors = at(multipliers, channel, lanes)
    half = lanes // 2
    terms = at(offsets, channel, half), at(offsets, channel + half, half)
    if spec.high:
        scaled = requantized_high(shifted, factors, terms, params[1], lanes)
    else:
        order = [index for lane in range(half) for index in (lane, half + lane)]
        total = shifted * cast("int64", lanes, factors) + T.Shuffle(list(terms), order)
        scaled = rounding_shift(total, params[1], "int64", lanes)
    return cast(spec.result.dtype, lanes, clipped(scaled, *_limits(params, 2), wide, lanes))


def _prelu(spec: PixelSpec, value: Any, constants: list[Any], channel: Any, params: Any, lanes: int) -> Any:
    """Both products, and the one of the value's sign."""
    wide = "int32" if spec.high else "int64"
    shifted = cast(wide, lanes, value) - param(params, 0, wide, lanes)
    parts = []
    for factors, shift in zip(constants, (params[1], params[2]), strict=True):
        factor = at(factors, channel, lanes)
        if spec.high:
            parts.append(requantized_high(shifted, factor, None, shift, lanes))
        else:
            parts.append(rounding_shift(shifted * cast(wide, lanes, factor), shift, wide, lanes))
    scaled = T.Select(shifted >= splat(T.int32(0) if spec.high else T.int64(0), lanes), *parts)
    return cast(spec.result.dtype, lanes, clipped(scaled, *_limits(params, 3), wide, lanes))


def _quantized(spec: PixelSpec, value: Any, factor: Any, params: Any, lanes: int) -> Any:
    """Rounds half to even, clips before the cast."""
    low = splat(T.Cast("float32", params[1] - params[0]), lanes)
    high = splat(T.Cast("float32", params[2] - params[0]), lanes)
    clipped = T.min(T.max(T.nearbyint(value * splat(factor, lanes)), low), high)
    return cast(spec.result.dtype, lanes, cast("int32", lanes, clipped) + param(params, 0, "int32", lanes))


def _looked_up(spec: PixelSpec, value: Any, table: Any, params: Any) -> Any:
    if spec.source.dtype == "int32":
        index = T.min(T.max(T.Cast("int64", value) - params[0], T.int64(0)), T.int64(spec.entries - 1))
        return table[T.Cast("int32", index)]
    return table[T.Cast("int32", T.reinterpret(value, dtype="uint8"))]


def _rounded(value: Any, lanes: int) -> Any:
    """The float32 product as torch rounds it: LLVM must not join it with the sum that follows."""
    name = T.llvm_lookup_intrinsic_id("llvm.arithmetic.fence")
    return T.call_llvm_pure_intrin(name, value, dtype=f"float32x{lanes}" if lanes > 1 else "float32")


def _constants(spec: PixelSpec) -> list[tuple[int, str]]:
    """Lengths and types of the operator's constant arguments."""
    stored = spec.result.stored
    if spec.op in ("affine", "prelu"):
        return [(stored, "int32"), (stored, "int64" if spec.op == "affine" else "int32")]
    if spec.op == "table":
        return [(spec.entries, spec.result.dtype)]
    sizes = {"quantize": 1, "dequantize": stored, "float_affine": 2 * stored, "float_prelu": stored}
    return [(sizes[spec.op], "float32")] if spec.op in sizes else []


def _value(spec: PixelSpec, values: list[Any], constants: list[Any], params: Any, channel: Any, lanes: int) -> Any:
    """The result for one vector of channels."""
    a, b = values[0], values[-1]
    match spec.op:
        case "requantize":
            return _requantized(spec, a, params, lanes)
        case "add":
            return _added(spec, a, b, params, lanes)
        case "mul":
            return _multiplied(spec, a, b, params, lanes)
        case "affine":
            return _affine(spec, a, constants, channel, params, lanes)
        case "prelu":
            return _prelu(spec, a, constants, channel, params, lanes)
        case "table":
            return _looked_up(spec, a, constants[0], params)
        case "clip":
            return cast(spec.result.dtype, lanes, clip(cast("int32", lanes, a), params[0], params[1], "int32", lanes))
        case "quantize":
            return _quantized(spec, a, constants[0][0], params, lanes)
        case "dequantize":
            shifted = cast("int32", lanes, a) - param(params, 0, "int32", lanes)
            return cast("float32", lanes, shifted) * at(constants[0], channel, lanes)
        case "float_function":
            return float_functions.apply(spec.function, a, lanes)
        case "float_affine":
            product = _rounded(a * at(constants[0], channel, lanes), lanes)
            return product + at(constants[0], spec.result.stored + channel, lanes)
        case "float_prelu":
            zero = splat(T.float32(0), lanes)
            return T.Select(a < zero, a * at(constants[0], channel, lanes), a)
        case "float_mul":
            return a * b
        case "float_add":
            return T.max(a + b, splat(T.float32(0), lanes)) if spec.relu else a + b
    raise AssertionError(spec.op)


def emit_pointwise(spec: PixelSpec) -> None:
    """Emit a function of (values, constants, params, result), one value at a time."""
    result = spec.result
    by_value = spec.op == "table" or (spec.op == "float_function" and not float_functions.is_vector(spec.function))
    lanes = 1 if by_value else VECTOR
    steps = result.channels if by_value else result.stored // VECTOR

    layouts = [spec.source, *([] if spec.other is None else [spec.other])]
    *buffers, P, Y = arguments("pointwise", *layouts, *_constants(spec), (PIXEL_PARAMS, "int64"), result)
    operands, constants = list(zip(layouts, buffers, strict=False)), buffers[len(layouts) :]
    fill_halo(result, Y, P[PAD])
    with B.serial(result.height) as y, B.serial(result.width) as x:
        to = result.origin() + y * result.row + x * result.pitch
        with B.serial(steps) as v:
            values = []
            for layout, buffer in operands:
                pixel = layout.origin()  # of one row or column there is no other
                pixel += (y * layout.row if layout.height > 1 else 0) + (x * layout.pitch if layout.width > 1 else 0)
                one = layout.channels == 1 < result.channels
                values.append(splat(buffer[pixel], lanes) if one else at(buffer, pixel + v * lanes, lanes))
            put(Y, _value(spec, values, constants, P, v * lanes, lanes), to + v * lanes, lanes)
        fill_spare(result, Y, to)


def emit_byte_table(spec: PixelSpec) -> None:
    """A table from bytes to bytes, 64 at once: rows of both images are alike, but for their halos; or, in slices of
    larger images, pixels are.
    """
    source, result = spec.source, spec.result
    by_pixel = bool(source.shared or result.shared)
    values = result.stored if by_pixel else result.width * result.stored
    lanes = 64

    X, table, P, Y = arguments("byte_table", source, (256, result.dtype), (PIXEL_PARAMS, "int64"), result)
    fill_halo(result, Y, P[PAD])
    parts = [B.Bind(T.reinterpret(at(table, lanes * i, lanes), dtype=f"uint8x{lanes}")) for i in range(4)]

    def look_up(read: Any, write: Any) -> None:
        with B.serial(-(-values // lanes)) as v:
            first = tile_start(v, values, lanes)
            index = T.reinterpret(at(X, read + first, lanes), dtype=f"uint8x{lanes}")
            found = T.reinterpret(look_up_64(parts, index), dtype=f"{result.dtype}x{lanes}")
            put(Y, found, write + first, lanes)

    with B.serial(result.height) as y:
        read, write = source.origin() + y * source.row, result.origin() + y * result.row
        if by_pixel:
            with B.serial(result.width) as x:
                look_up(read + x * source.pitch, write + x * result.pitch)
        else:
            look_up(read, write)


def emit_pack(spec: PixelSpec) -> None:
    """The network's input, ``(1, channels, height, width)`` float32, or a flat value into our layout; quantized if the
    layout is.

    An image of few channels, stored without spare ones, is shuffled together in vectors; a single pixel lies as it is
    wanted; of any other image, one row of one channel at a time is converted, then spread over the pixels.
    """
    result = spec.result
    is_float = result.dtype == "float32"

    shape = (result.channels, result.height, result.width)
    image = (1, math.prod(shape)) if spec.flat else (1, *shape)
    X, *factor, P, Y = arguments(
        "pack", (image, "float32"), *([] if is_float else [(1, "float32")]), (PIXEL_PARAMS, "int64"), result
    )

    def read(channel: Any, row: Any, column: Any) -> Any:
        if spec.flat:
            return X[0, (channel * result.height + row) * result.width + column]
        return X[0, channel, row, column]

    def convert(value: Any, lanes: int) -> Any:
        return _quantized(spec, value, factor[0][0], P, lanes) if factor else value

    if result.stored == result.channels <= MOST_SHUFFLED:
        fill_halo(result, Y, P[PAD])
        _pack_dense(result, read, Y, convert)
    else:
        _pack_spread(result, read, Y, P, convert)


def _pack_dense(result: Layout, read: Any, out: Any, convert: Any) -> None:
    channels, width, lanes = result.channels, result.width, VECTOR
    with B.serial(result.height) as y:
        to = result.origin() + y * result.row
        if width >= lanes:
            with B.serial(-(-width // lanes)) as v:
                first = tile_start(v, width, lanes)
                parts = [B.Bind(convert(read(c, y, T.ramp(first, 1, lanes)), lanes)) for c in range(channels)]
                for turn in range(channels):
                    order = [i % channels * lanes + i // channels for i in range(turn * lanes, (turn + 1) * lanes)]
                    value = T.Shuffle(parts, order) if channels > 1 else parts[0]
                    put(out, value, to + first * channels + turn * lanes, lanes)
        else:
            with B.serial(width) as x, B.serial(channels) as c:
                put(out, convert(read(c, y, x), 1), to + x * channels + c, 1)


def _pack_spread(result: Layout, read: Any, out: Any, params: Any, convert: Any) -> None:
    line = B.alloc_buffer((-(-result.width // VECTOR) * VECTOR,), result.dtype)
    # Everything outside the image and every channel beyond the logical ones holds the pad value: one fill for all.
    with B.serial(result.length) as i:
        B.buffer_store(out, T.Cast(result.dtype, params[PAD]), [i])
    if result.height == result.width == 1:
        _pack_pixel(result, read, out, convert)
        return
    with B.serial(result.height) as y, B.serial(result.channels) as c:
        if result.width >= VECTOR:
            with B.serial(-(-result.width // VECTOR)) as v:
                first = tile_start(v, result.width, VECTOR)
                put(line, convert(read(c, y, T.ramp(first, 1, VECTOR)), VECTOR), first, VECTOR)
        else:
            with B.serial(result.width) as x:
                B.buffer_store(line, convert(read(c, y, x), 1), [x])
        with B.serial(result.width) as x:
            B.buffer_store(out, line[x], [result.origin() + y * result.row + x * result.pitch + c])


def _pack_pixel(result: Layout, read: Any, out: Any, convert: Any) -> None:
    """A vector, whose values already lie side by side."""
    whole = result.channels // VECTOR
    with B.serial(whole) as v, B.vectorized(VECTOR) as lane:
        c = v * VECTOR + lane
        put(out, convert(read(c, 0, 0), 1), result.origin() + c, 1)
    with B.serial(result.channels - whole * VECTOR) as i:
        c = whole * VECTOR + i
        put(out, convert(read(c, 0, 0), 1), result.origin() + c, 1)


def emit_unpack(spec: PixelSpec) -> None:
    """A network's output, or what an island reads, as float32 ``(1, values)``.

    ``logits``: integers minus the zero point times one factor by channel; ``unpack``: floats as are.
    """
    source = spec.source
    channels, height, width = source.channels, source.height, source.width

    scales = [(channels, "float32")] if spec.op == "logits" else []
    out = (1, channels * height * width), "float32"
    X, *factors, P, Y = arguments("unpack", source, *scales, (PIXEL_PARAMS, "int64"), out)
    with B.serial(channels) as c, B.serial(height) as y, B.serial(width) as x:
        value = X[source.origin() + y * source.row + x * source.pitch + c]
        if factors:
            value = T.Cast("float32", T.Cast("int32", value) - T.Cast("int32", P[0])) * factors[0][c]
        B.buffer_store(Y, value, [0, (c * height + y) * width + x])
