"""The kernel calls that a network is compiled to."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_baqe.deploy.constants import Constants
from lightning_baqe.deploy.digest import code_digest
from lightning_baqe.deploy.options import BuildOptions
from lightning_baqe.kernels.x86.conv import build_conv
from lightning_baqe.kernels.x86.conv_spec import ConvSpec
from lightning_baqe.kernels.x86.depthwise import DepthwiseSpec, build_depthwise
from lightning_baqe.kernels.x86.layout import Layout
from lightning_baqe.kernels.x86.moves import MoveSpec, build_move
from lightning_baqe.kernels.x86.pixels import PixelSpec, build_byte_table, build_pack, build_pointwise, build_unpack
from lightning_baqe.kernels.x86.pooling import PoolSpec, build_pool

TunableSpec = ConvSpec | DepthwiseSpec
Spec = ConvSpec | DepthwiseSpec | PixelSpec | PoolSpec | MoveSpec


@dataclass(frozen=True, eq=False)
class Call:
    """One kernel call.

    Args:
        nodes: the graph's nodes that it computes; the last one's value is its result.
        layer: the layer whose knobs it takes, if any.
        spec, knobs: what its code depends on.
        arguments: its arguments but the result: names of values, or of the plan's constants.
    """

    nodes: tuple[str, ...]
    layer: str | None
    spec: Spec
    knobs: Mapping[str, Any]
    arguments: tuple[str, ...]

    @property
    def result(self) -> str:
        return self.nodes[-1]

    def function(self) -> Any:
        """The kernel's TIR."""
        spec = self.spec
        match spec:
            case ConvSpec():
                return build_conv(spec, tuple(sorted(self.knobs.items())))
            case DepthwiseSpec():
                return build_depthwise(spec, tuple(sorted(self.knobs.items())))
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

    @property
    def key(self) -> str:
        """Identifies the kernel's code among kernels of one target."""
        return kernel_key(self.spec, self.knobs)


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


@dataclass(frozen=True, eq=False)
class Plan:
    """The kernel calls of one network, in order.

    Args:
        calls: the last one writes the float32 output, ``(1, features)``.
        layouts: of every value but the network's input and output.
        buffers: ``{value: the value whose buffer it lies in}``, of those that have none of their own.
        schedules: the knobs that every tunable layer got.
        options: that it was made with.
        constants: what calls take besides values, by name.
    """

    calls: tuple[Call, ...]
    layouts: Mapping[str, Layout]
    buffers: Mapping[str, str]
    schedules: dict[str, dict[str, Any]]
    options: BuildOptions
    constants: Constants

    def tunable(self) -> dict[str, TunableSpec]:
        """``{layer: its kernel}`` of those with knobs, on buffers of their own, as they are measured and kept."""
        return {c.layer: alone(c.spec) for c in self.calls if c.layer is not None and isinstance(c.spec, TunableSpec)}

    def buffer(self, name: str) -> str:
        """The value whose buffer a value lies in: itself, or a concatenation."""
        return self.buffers.get(name, name)

    @property
    def digest(self) -> str:
        """Identifies all code of the network and what generated it: equal digests run equally fast."""
        keys = [call.key for call in self.calls]
        text = json.dumps([keys, dataclasses.asdict(self.options.target), self.options.threads, code_digest()])
        return hashlib.sha256(text.encode()).hexdigest()
