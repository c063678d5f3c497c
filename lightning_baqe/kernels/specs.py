"""The kernels there are: a spec says all that a kernel's code depends on, knobs apart."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any

import numpy as np
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as B

from lightning_baqe.kernels.islands import IslandSpec, build_island
from lightning_baqe.kernels.x86.conv import emit_conv
from lightning_baqe.kernels.x86.conv_knobs import check_knobs
from lightning_baqe.kernels.x86.conv_spec import ConvSpec
from lightning_baqe.kernels.x86.conv_weights import pack_weights
from lightning_baqe.kernels.x86.depthwise import DepthwiseSpec, check_depthwise_knobs, emit_depthwise
from lightning_baqe.kernels.x86.moves import MoveSpec, emit_move
from lightning_baqe.kernels.x86.pixels import PixelSpec, emit_byte_table, emit_pack, emit_pointwise, emit_unpack
from lightning_baqe.kernels.x86.pooling import PoolSpec, emit_pool
from lightning_baqe.kernels.x86.tile_conv import emit_tile_conv
from lightning_baqe.kernels.x86.tile_spec import TileSpec, check_tile_knobs, pack_tiles

TunableSpec = ConvSpec | DepthwiseSpec
Spec = ConvSpec | DepthwiseSpec | PixelSpec | PoolSpec | MoveSpec | IslandSpec


def build_kernel(spec: Spec, knobs: Mapping[str, Any]) -> Any:
    """A kernel's TIR function.

    Kernels are emitted with TVM's IR builder: TVMScript's parser would take 40 times as long, most of a build. Islands
    come from TVM's own lowering.
    """
    return _built(spec, tuple(sorted(knobs.items())))


@lru_cache(maxsize=8192)
def _built(spec: Spec, knobs: tuple[tuple[str, Any], ...]) -> Any:
    if isinstance(spec, IslandSpec):
        return build_island(spec)
    match spec:
        case TileSpec():
            emit = partial(_emit_tiles, spec, check_tile_knobs(spec, dict(knobs)))
        case ConvSpec():
            emit = partial(emit_conv, spec, check_knobs(spec, dict(knobs)))
        case DepthwiseSpec():
            emit = partial(emit_depthwise, spec, check_depthwise_knobs(spec, dict(knobs)))
        case PoolSpec():
            emit = partial(emit_pool, spec)
        case MoveSpec():
            emit = partial(emit_move, spec)
        case PixelSpec(op="pack"):
            emit = partial(emit_pack, spec)
        case PixelSpec(op="logits" | "unpack"):
            emit = partial(emit_unpack, spec)
        case PixelSpec(vbmi=True):
            emit = partial(emit_byte_table, spec)
        case PixelSpec():
            emit = partial(emit_pointwise, spec)
    with IRBuilder() as builder, B.prim_func(s_tir=True):
        emit()
    return builder.get()


def _emit_tiles(spec: TileSpec, knobs: Mapping[str, Any]) -> None:
    if knobs["unit"] == "tiles":
        emit_tile_conv(spec, knobs)
    else:
        emit_conv(spec.on_vectors, knobs)


def packed_weights(spec: ConvSpec, knobs: Mapping[str, Any], weight: np.ndarray) -> np.ndarray:
    """Weights ``(out, in / groups, kh, kw)`` as the kernel of checked knobs reads them, flat."""
    if isinstance(spec, TileSpec):
        if knobs["unit"] == "tiles":
            return pack_tiles(spec, knobs, weight)
        spec = spec.on_vectors
    return pack_weights(spec, knobs, weight)


def kernel_key(spec: Spec, knobs: Mapping[str, Any]) -> str:
    """A name for a kernel's code: its operator and a digest of all that the code depends on."""
    text = json.dumps([type(spec).__name__, dataclasses.asdict(spec), dict(knobs)], sort_keys=True)
    op = "conv" if isinstance(spec, ConvSpec) else "depthwise" if isinstance(spec, DepthwiseSpec) else spec.op
    return f"{op}_{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def alone(spec: TunableSpec) -> TunableSpec:
    """The same kernel on values that have buffers of their own: one set of measurements serves it wherever they lie."""
    spec = dataclasses.replace(spec, source=spec.source.alone, result=spec.result.alone)
    if isinstance(spec, ConvSpec) and spec.residual is not None:
        return dataclasses.replace(spec, residual=spec.residual.alone)
    return spec
