"""Which kernels have knobs, and what the tuner needs of their schedule templates: the only place that knows both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_baqe.kernels.specs import TunableSpec
from lightning_baqe.kernels.x86.conv_knobs import (
    Knobs,
    check_knobs,
    knob_space,
    sizes,
    tile_cost,
    tiles,
    with_intrinsic,
)
from lightning_baqe.kernels.x86.conv_spec import ConvSpec
from lightning_baqe.kernels.x86.depthwise import (
    DepthwiseSpec,
    check_depthwise_knobs,
    depthwise_cost,
    depthwise_knob_space,
)
from lightning_baqe.kernels.x86.tile_spec import TileSpec, check_tile_knobs, tile_knob_space, tile_knobs_cost


@dataclass(frozen=True)
class Template:
    """The knobs of a schedule template. Each function takes the kernel's spec first.

    Args:
        knob_space: all values of each knob, best guess first.
        check_knobs: knobs with the defaults for missing ones, in canonical form; ConfigError if they cannot be.
        cost: of knobs, estimated, in any positive unit.
        unsearched: knobs that a search over networks leaves as they are, because no device rewards another value; the
            tuner tries them.
    """

    knob_space: Callable[[Any], Mapping[str, list[Any]]]
    check_knobs: Callable[[Any, Knobs], dict[str, Any]]
    cost: Callable[[Any, Knobs], float]
    unsearched: frozenset[str] = frozenset()


_TEMPLATES: dict[type, Template] = {
    ConvSpec: Template(
        knob_space=lambda spec: knob_space(spec, limit=len(tiles(spec))),
        check_knobs=check_knobs,
        cost=lambda spec, knobs: tile_cost(with_intrinsic(spec, knobs), sizes(knobs)),
        unsearched=frozenset({"intrinsic"}),
    ),
    TileSpec: Template(tile_knob_space, check_tile_knobs, tile_knobs_cost, frozenset({"intrinsic"})),
    DepthwiseSpec: Template(
        knob_space=depthwise_knob_space,
        check_knobs=check_depthwise_knobs,
        cost=lambda spec, knobs: depthwise_cost(spec, sizes(knobs)),
    ),
}


def template_of(spec: TunableSpec) -> Template:
    """The template of a kernel with knobs."""
    return _TEMPLATES[type(spec)]
