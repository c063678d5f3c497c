"""The knobs of dense and grouped convolutions and matrix products.

Knobs (in BAQE's terms, section III-B):

| knob | values | meaning |
| --- | --- | --- |
| tile | ``"oct x oht x owt"`` | tile sizes over output channels (in register widths), height and width |
| order | ``channels``, ``pixels`` | the outermost loop: a block's weights stay in cache, or a tile's inputs |
| unroll | 1, 2, 4 | steps of the reduction in one loop body; of a chain, in pairs |
| weights | ``bytes``, ``packed`` | 4-bit weights widened to bytes on load of the artifact, or expanded in registers |
| reduction | ``window``, ``channels/64`` | outermost in the sum: rows of the window, or tiles of 64 channels |
| intrinsic | ``on``, ``off`` | the dot-product instructions, or plain 32-bit arithmetic |

Two of BAQE's are missing. Data layout: kernels that read channels in blocks were tried and are no faster, with VNNI and
with AVX2, since a tile's inputs lie in the fastest cache either way. The place of padding: the producer's halo costs a
few stores; any other place is a copy before the kernel.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Mapping
from typing import Any

from lightning_baqe.errors import ConfigError
from lightning_baqe.kernels.x86.arithmetic import PLAIN
from lightning_baqe.kernels.x86.conv_spec import ConvSpec

Knobs = Mapping[str, Any]
BLOCKS, ROWS, COLUMNS = (1, 2, 3, 4, 6, 8), (1, 2, 4), (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14)  # of tiles
CHANNEL_TILES = (16, 32, 64, 128, 256)
FEW_PIXELS, MANY_WEIGHTS = 4, 64 * 1024  # of so few pixels, so many weights are read more slowly than multiplied
KNOBS = ("tile", "order", "unroll", "weights", "reduction", "intrinsic")
CHOICES = {"order": ("channels", "pixels"), "weights": ("bytes", "packed"), "intrinsic": ("on", "off")}


def channel_tiles(spec: ConvSpec) -> list[int]:
    """Tiles of input channels that an outer loop of the sum may take: whole ones, and more than one of them."""
    if spec.groups > 1 or spec.kernel == (1, 1):  # of one pixel, the order is the same
        return []
    return [inner for inner in CHANNEL_TILES if inner < spec.source.stored and spec.source.stored % inner == 0]


def sizes(knobs: Knobs) -> tuple[int, ...]:
    """The extents of a tile."""
    return tuple(map(int, knobs["tile"].split("x")))


def inner_channels(knobs: Knobs) -> int:
    """Input channels of a tile, 0 where the window's rows are the outer loop."""
    return 0 if knobs["reduction"] == "window" else int(knobs["reduction"].removeprefix("channels/"))


def with_intrinsic(spec: ConvSpec, knobs: Knobs) -> ConvSpec:
    """The spec whose dot product the knobs ask for."""
    return spec if knobs["intrinsic"] == "on" else dataclasses.replace(spec, dot=PLAIN, chain=1)


def _keeps_groups(spec: ConvSpec, packed: bool, inner: int) -> bool:
    """Whether tiles of input channels leave every group whole: its sum was proven exact as it is."""
    group = spec.group(packed) * spec.arithmetic.quad
    return inner % group == 0 and spec.source.stored % group == 0


def _unrolls(spec: ConvSpec, packed: bool, inner: int, unroll: int) -> bool:
    """Whether an unroll factor divides its loop: over the pairs of a chain, without one over groups."""
    if unroll == 1:
        return True
    if spec.chain > 1:
        return spec.chain % (2 * unroll) == 0
    return spec.steps(packed, inner) // spec.group(packed) % unroll == 0


def tiles(spec: ConvSpec) -> list[tuple[int, int, int]]:
    """Every tile that fits the registers: accumulators, one weight vector a channel block, one input word."""
    limits = (spec.blocks, spec.result.height, spec.result.width)
    return [
        tile
        for tile in itertools.product(BLOCKS, ROWS, COLUMNS)
        if all(map(operator.le, tile, limits)) and math.prod(tile) + tile[0] + 1 <= spec.registers
    ]


def knob_space(spec: ConvSpec, limit: int = 16) -> dict[str, list[Any]]:
    """The values of each knob, best guess first, with at most ``limit`` tiles, by estimated cost."""
    ranked = sorted(tiles(spec), key=lambda tile: (tile_cost(spec, tile), tile))
    inner = [tile for tile in channel_tiles(spec) if _keeps_groups(spec, False, tile)]
    return {
        "tile": ["x".join(map(str, tile)) for tile in ranked[:limit]],
        "order": ["channels", "pixels"],
        "unroll": [u for u in (1, 2, 4) if _unrolls(spec, False, 0, u)],
        "weights": ["bytes", "packed"] if _takes_nibbles(spec) else ["bytes"],
        "reduction": ["window", *(f"channels/{tile}" for tile in inner)],
        "intrinsic": ["on"] if spec.arithmetic.plain else ["on", "off"],
    }


def _takes_nibbles(spec: ConvSpec) -> bool:
    """Whether two weights fit a byte, and the instructions take them so."""
    return spec.weight_bits <= 4 and spec.arithmetic.nibbles


def tile_cost(spec: ConvSpec, tile: tuple[int, ...]) -> float:
    """Estimated cycles of one pass over the output: multiply steps against loads, recomputed edges counted."""
    oct_, oht, owt = tile
    pixels = oht * owt
    passes = -(-spec.blocks // oct_) * -(-spec.result.height // oht) * -(-spec.result.width // owt)
    outer = spec.result.channels // spec.groups
    shared = 1 if spec.groups == 1 or outer % (oct_ * spec.lanes) == 0 else oct_  # blocks of one group read the same
    return passes * spec.arithmetic.cost(oct_ * pixels, oct_, pixels * shared, spec.registers, spec.chain)


def default_knobs(spec: ConvSpec) -> dict[str, Any]:
    """Good knobs without tuning."""
    space = knob_space(spec, limit=1)
    unroll = max(unroll for unroll in space["unroll"] if unroll <= spec.arithmetic.unroll)
    fixed = {"order": "channels", "reduction": "window", "intrinsic": "on"}
    weights = "packed" if "packed" in space["weights"] and _reads_weights(spec) else "bytes"
    return {"tile": space["tile"][0], "unroll": unroll, "weights": weights, **fixed}


def _reads_weights(spec: ConvSpec) -> bool:
    """Whether the time goes into reading weights: half the bytes were half the time there (AVX512-VNNI, Zen 5)."""
    pixels = spec.result.height * spec.result.width
    return pixels <= FEW_PIXELS and spec.macs // pixels >= MANY_WEIGHTS


def check_knobs(spec: ConvSpec, knobs: Knobs) -> dict[str, Any]:
    """Knobs with the default for each one missing; all but ``tile`` and ``order`` fall to the next value that this
    kernel has, because the same knobs serve a layer at every bit-width. ConfigError for an unknown knob, or a tile that
    does not fit.
    """
    full = default_knobs(spec)
    unknown = set(knobs) - set(full)
    if unknown:
        raise ConfigError(f"unknown knob {sorted(unknown)}; a convolution has {sorted(full)}")
    full.update(knobs)
    allowed = {"x".join(map(str, tile)) for tile in tiles(spec)}
    if full["tile"] not in allowed:
        raise ConfigError(
            f"tile {full['tile']!r} does not fit {spec.blocks} blocks of {spec.lanes} channels, "
            f"{spec.result.height}x{spec.result.width} pixels and {spec.registers} registers; choose one of "
            f"{sorted(allowed)}"
        )
    for knob, values in CHOICES.items():
        if full[knob] not in values:
            raise ConfigError(f"{knob} is {' or '.join(values)}, got {full[knob]!r}")
    orders = ["window", *(f"channels/{tile}" for tile in channel_tiles(spec))]
    if full["reduction"] not in orders:
        raise ConfigError(
            f"reduction {full['reduction']!r} does not fit {spec.source.stored} stored input channels and a window of "
            f"{spec.kernel[0]}x{spec.kernel[1]}; choose one of {orders}"
        )
    if spec.arithmetic.plain:
        full["intrinsic"] = "on"
    spec = with_intrinsic(spec, full)
    if full["weights"] == "packed" and not _takes_nibbles(spec):
        full["weights"] = "bytes"
    packed = full["weights"] == "packed"
    if full["reduction"] != "window" and not _keeps_groups(spec, packed, inner_channels(full)):
        full["reduction"] = "window"
    if full["unroll"] not in (1, 2, 4):
        raise ConfigError(f"unroll is 1, 2 or 4, got {full['unroll']!r}")
    while not _unrolls(spec, packed, inner_channels(full), full["unroll"]):
        full["unroll"] //= 2
    return full
