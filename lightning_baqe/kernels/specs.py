"""The kernels there are: a spec says all that a kernel's code depends on, knobs apart."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from lightning_baqe.kernels.x86.conv import build_conv
from lightning_baqe.kernels.x86.conv_spec import ConvSpec
from lightning_baqe.kernels.x86.depthwise import DepthwiseSpec, build_depthwise
from lightning_baqe.kernels.x86.moves import MoveSpec, build_move
from lightning_baqe.kernels.x86.pixels import PixelSpec, build_byte_table, build_pack, build_pointwise, build_unpack
from lightning_baqe.kernels.x86.pooling import PoolSpec, build_pool

TunableSpec = ConvSpec | DepthwiseSpec
Spec = ConvSpec | DepthwiseSpec | PixelSpec | PoolSpec | MoveSpec


def build_kernel(spec: Spec, knobs: Mapping[str, Any]) -> Any:
    """A kernel's TIR function."""
    match spec:
        case ConvSpec():
            return build_conv(spec, tuple(sorted(knobs.items())))
        case DepthwiseSpec():
            return build_depthwise(spec, tuple(sorted(knobs.items())))
        case PoolSpec():
            return build_pool(spec)
        case MoveSpec():
            return build_move(spec)
        case PixelSpec(op="pack"):
            return build_pack(spec)
        case PixelSpec(op="logits" | "unpack"):
            return build_unpack(spec)
        case PixelSpec(vbmi=True):
            return build_byte_table(spec)
        case PixelSpec():
            return build_pointwise(spec)


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
