"""Which kernels have knobs, and what the tuner needs of their schedule templates: the only place that knows both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from lightning_baqe.kernels.sample import sample_kernel
from lightning_baqe.kernels.specs import TunableSpec
from lightning_baqe.kernels.x86.conv import build_conv
from lightning_baqe.kernels.x86.conv_knobs import (
    check_knobs,
    default_knobs,
    knob_space,
    tile_cost,
    tiles,
    with_intrinsic,
)
from lightning_baqe.kernels.x86.conv_spec import ConvSpec
from lightning_baqe.kernels.x86.depthwise import (
    DepthwiseSpec,
    build_depthwise,
    check_depthwise_knobs,
    default_depthwise_knobs,
    depthwise_cost,
    depthwise_knob_space,
)

Knobs = Mapping[str, Any]


class Sample(Protocol):
    """Random data for one kernel."""

    @property
    def result(self) -> np.ndarray:
        """What the kernel must write."""

    def arguments(self, knobs: Knobs) -> list[np.ndarray]:
        """Its arguments but the result, for these knobs."""


@dataclass(frozen=True)
class Template:
    """A schedule template with knobs. Each function takes the kernel's spec first.

    Args:
        knob_space: all values of each knob, best guess first.
        default_knobs: the shipped ones.
        check_knobs: knobs with the defaults for missing ones, in canonical form; ConfigError if they cannot be.
        cost: of knobs, estimated, in any positive unit.
        build: the kernel's TIR function.
        sample: random data and the right result.
        unsearched: knobs that a search over networks leaves as they are, because no device rewards another value; the
            tuner tries them.
    """

    knob_space: Callable[[Any], Mapping[str, list[Any]]]
    default_knobs: Callable[[Any], dict[str, Any]]
    check_knobs: Callable[[Any, Knobs], dict[str, Any]]
    cost: Callable[[Any, Knobs], float]
    build: Callable[[Any, Knobs], Any]
    sample: Callable[[Any], Sample]
    unsearched: frozenset[str] = frozenset()


_TEMPLATES: dict[type, Template] = {
    ConvSpec: Template(
        knob_space=lambda spec: knob_space(spec, limit=len(tiles(spec))),
        default_knobs=default_knobs,
        check_knobs=check_knobs,
        cost=lambda spec, knobs: _conv_cost(with_intrinsic(spec, knobs), knobs["tile"]),
        build=lambda spec, knobs: build_conv(spec, tuple(sorted(knobs.items()))),
        sample=sample_kernel,
        unsearched=frozenset({"intrinsic"}),
    ),
    DepthwiseSpec: Template(
        knob_space=depthwise_knob_space,
        default_knobs=default_depthwise_knobs,
        check_knobs=check_depthwise_knobs,
        cost=lambda spec, knobs: _depthwise_cost(spec, knobs["tile"]),
        build=lambda spec, knobs: build_depthwise(spec, tuple(sorted(knobs.items()))),
        sample=sample_kernel,
    ),
}


def _conv_cost(spec: ConvSpec, tile: str) -> float:
    oct_, oht, owt = map(int, tile.split("x"))
    return tile_cost(spec, (oct_, oht, owt))


def _depthwise_cost(spec: DepthwiseSpec, tile: str) -> float:
    height, width = map(int, tile.split("x"))
    return depthwise_cost(spec, (height, width))


def template_of(spec: TunableSpec) -> Template:
    """The template of a kernel with knobs."""
    return _TEMPLATES[type(spec)]
