"""Grouped and depthwise convolutions."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as B

from lightning_baqe.deploy.emit import clip, rounding_shift
from lightning_baqe.deploy.layout import Layout
from lightning_baqe.deploy.pixel_templates import PAD, PIXEL_PARAMS


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
        value = rounding_shift(product, params[0], "int64", 1)
        return T.Cast(result_dtype, clip(value + params[1], params, 2, "int64", 1))

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
