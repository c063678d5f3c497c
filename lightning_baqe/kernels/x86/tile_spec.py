"""Convolutions and matrix products on AMX's tiles: what their code depends on, their knobs, and their weights.

A tile of sums holds up to 16 output pixels x 16 output channels. A block of them is finished before the next begins;
one step multiplies 64 neighbouring input values of each pixel. Knobs:

| knob | values | meaning |
| --- | --- | --- |
| unit | ``tiles``, ``vectors`` | tile products, or the kernel of the CPU's vectors, with its knobs |
| block | ``"n x h x w"`` | tiles of a block: over output channels, below one another, side by side; 6 at most |
| pixels | ``rows``, ``flat`` | of a tile: of one row; or of all, the halo between included, whose results are dropped |
| order, unroll | as of :mod:`~lightning_baqe.kernels.x86.conv_knobs` | the outermost loop; steps in one loop body |
| epilogue | ``overlapped``, ``after`` | sums are requantized between the products of the next block, or at once |
| ahead | ``on``, ``off`` | the next channels' weights are fetched into the second-level cache while these are used |

Flat pixels want a stride of 1, and blocks without tiles below one another.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from lightning_baqe.errors import ConfigError
from lightning_baqe.kernels.x86 import conv_knobs
from lightning_baqe.kernels.x86.arithmetic import TileProducts
from lightning_baqe.kernels.x86.conv_knobs import Knobs
from lightning_baqe.kernels.x86.conv_spec import ConvSpec
from lightning_baqe.kernels.x86.conv_weights import weight_quads
from lightning_baqe.kernels.x86.tiles import BYTES, COLUMNS, QUAD, REGISTERS, ROWS

MOST_SUMS = 6  # tiles of a block: two registers are left for what is multiplied
SIDES = (1, 2, 3, 4, 5, 6)
CHOICES = {
    "unit": ("tiles", "vectors"),
    "pixels": ("rows", "flat"),
    "order": ("channels", "pixels"),
    "epilogue": ("overlapped", "after"),
    "ahead": ("on", "off"),
}
# Cycles, from the manuals and from kernels on a Xeon with AMX: of a product, of loading a tile, of finishing 16 sums.
_PRODUCT, _LOAD, _FINISH = 16.0, 6.0, 5.0


@dataclass(frozen=True)
class TileSpec(ConvSpec):
    """A :class:`ConvSpec` whose arithmetic are tile products."""

    @property
    def how(self) -> Any:
        """The instructions, or what stands for them."""
        return cast(TileProducts, self.arithmetic).how

    @property
    def on_vectors(self) -> ConvSpec:
        """The same layer without tiles."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return ConvSpec(**(fields | {"dot": cast(TileProducts, self.arithmetic).vectors_name, "chain": 1}))

    @property
    def tile_steps(self) -> int:
        """Steps of 64 input values of one run."""
        return -(-self.run() // BYTES)

    @property
    def across(self) -> int:
        """Pixels from one row of the input to the next, where a tile's pixels are flat."""
        return self.source.full[1]


@dataclass(frozen=True)
class Geometry:
    """Which pixels the tiles of a block hold.

    Args:
        channels, below, beside: tiles of a block: of output channels, below one another, side by side.
        flat: as the knob.
        rows: pixels of a tile.
        lines, columns: how many blocks there are below one another, and side by side; of flat ones ``(1, blocks)``.
        pixels: of the whole output, those of the halo between included; 0 where they are not flat.
    """

    channels: int
    below: int
    beside: int
    flat: bool
    rows: int
    lines: int
    columns: int
    pixels: int

    @property
    def tiles(self) -> int:
        """Tiles of a block that hold different pixels."""
        return self.below * self.beside

    @classmethod
    def of(cls, spec: TileSpec, block: tuple[int, int, int], flat: bool) -> Geometry:
        """With these knobs."""
        channels, below, beside = block
        height, width = spec.result.height, spec.result.width
        if flat:
            pixels = (height - 1) * spec.across + width
            rows = min(ROWS, pixels)
            return cls(channels, 1, beside, True, rows, 1, -(-pixels // (rows * beside)), pixels)
        rows = min(ROWS, width)
        return cls(channels, below, beside, False, rows, -(-height // below), -(-width // (rows * beside)), 0)


def blocks(spec: TileSpec, flat: bool) -> list[tuple[int, int, int]]:
    """Every block that fits the registers and the output."""
    height, width = (1, (spec.result.height - 1) * spec.across + spec.result.width) if flat else (
        spec.result.height, spec.result.width)  # fmt: skip
    most = -(-width // min(ROWS, width))
    allowed = spec.blocks if spec.groups == 1 else 1  # blocks of channels of one group read the same values
    return [
        (n, h, w)
        for n, h, w in itertools.product(SIDES, repeat=3)
        if n * h * w <= MOST_SUMS and h <= height and w <= most and allowed % n == 0
    ]


def cost(spec: TileSpec, block: tuple[int, int, int], flat: bool) -> float:
    """Estimated cycles: products and loads, or finishing the sums meanwhile, whichever takes longer."""
    at = Geometry.of(spec, block, flat)
    passes = spec.blocks // at.channels * at.lines * at.columns
    sums, steps = at.channels * at.tiles, spec.segments() * spec.tile_steps
    multiply = steps * (sums * _PRODUCT + len(loads(at.tiles, at.channels)) * _LOAD)
    finish = sums * at.rows * _FINISH
    return passes * (max(multiply, finish) + 0.2 * min(multiply, finish))


def loads(pixels: int, channels: int) -> list[tuple[str, int]]:
    """What one step of a block loads, in order."""
    return [(kind, index) for kind, index, _ in step(pixels, channels) if kind != "add"]


def registers(pixels: int, channels: int) -> tuple[list[int], list[int], list[int]]:
    """Of a block of tiles: those of sums, of input values, of weights. What varies faster in a step gets all that it
    can use, at most all but one.
    """
    sums = list(range(pixels * channels))
    free = list(range(len(sums), REGISTERS))
    fast = min(pixels if pixels >= channels else channels, len(free) - 1)
    first, second = free[:fast], free[fast:]
    return (sums, first, second) if pixels >= channels else (sums, second, first)


def step(pixels: int, channels: int) -> list[tuple[str, int, int]]:
    """Loads and products of one step: ``("values", tile, register)``, ``("weights", block, register)`` and
    ``("add", tile, block)``; whoever is loaded stays until its register is wanted.
    """
    _, values, weights = registers(pixels, channels)
    slots: dict[str, list[int]] = {"values": values, "weights": weights}
    held: dict[str, dict[int, int]] = {"values": {}, "weights": {}}
    found: list[tuple[str, int, int]] = []

    def load(kind: str, index: int) -> None:
        if index in held[kind]:
            return
        register = slots[kind].pop(0)
        slots[kind].append(register)
        held[kind] = {i: r for i, r in held[kind].items() if r != register} | {index: register}
        found.append((kind, index, register))

    if pixels >= channels:
        pairs = [(tile, block) for block in range(channels) for tile in range(pixels)]
    else:
        pairs = [(tile, block) for tile in range(pixels) for block in range(channels)]
    for tile, block in pairs:
        load("weights", block)
        load("values", tile)
        found.append(("add", tile, block))
    return found


def _text(block: tuple[int, int, int]) -> str:
    return "x".join(map(str, block))


def block_of(knobs: Knobs) -> tuple[int, int, int]:
    """The extents of a block."""
    n, h, w = map(int, knobs["block"].split("x"))
    return n, h, w


def _flats(spec: TileSpec) -> list[bool]:
    """Whether pixels may be flat: neighbours of a tile are neighbours in memory."""
    return [False, True] if spec.stride == (1, 1) and spec.result.height > 1 else [False]


@functools.lru_cache(maxsize=1024)
def _ranked(spec: TileSpec) -> list[tuple[bool, tuple[int, int, int]]]:
    """Blocks with their kind of pixels, best guess first."""
    every = [(flat, block) for flat in _flats(spec) for block in blocks(spec, flat)]
    return sorted(every, key=lambda at: (cost(spec, at[1], at[0]), at))


def _unrolls(spec: TileSpec) -> list[int]:
    return [unroll for unroll in (1, 2, 4) if spec.tile_steps % unroll == 0]


def tile_knob_space(spec: TileSpec) -> dict[str, list[Any]]:
    """The values of each knob, best guess first."""
    ranked = _ranked(spec)
    vectors = conv_knobs.knob_space(spec.on_vectors, limit=len(conv_knobs.tiles(spec.on_vectors)))
    unroll = list(dict.fromkeys([*_unrolls(spec), *vectors["unroll"]]))
    return vectors | {
        "unit": list(_units(spec)),
        "block": list(dict.fromkeys(_text(block) for _, block in ranked)),
        "pixels": list(dict.fromkeys("flat" if flat else "rows" for flat, _ in ranked)),
        "unroll": unroll,
        "epilogue": list(CHOICES["epilogue"]),
        "ahead": ["off", "on"],
    }


def _units(spec: TileSpec) -> tuple[str, ...]:
    flat, block = _ranked(spec)[0]
    vectors = tile_knobs_cost(spec, {"unit": "vectors", **conv_knobs.default_knobs(spec.on_vectors)})
    return CHOICES["unit"] if cost(spec, block, flat) <= vectors else CHOICES["unit"][::-1]


def tile_knobs_cost(spec: TileSpec, knobs: Knobs) -> float:
    """Of knobs, estimated cycles."""
    if knobs["unit"] == "tiles":
        return cost(spec, block_of(knobs), knobs["pixels"] == "flat")
    plain = conv_knobs.with_intrinsic(spec.on_vectors, knobs)
    height, width = spec.kernel
    steps = -(-spec.span * height * width // plain.arithmetic.quad)
    finish = spec.blocks * spec.result.height * spec.result.width * _FINISH
    return conv_knobs.tile_cost(plain, conv_knobs.sizes(knobs)) * steps / 2 + finish  # two instructions a cycle


def check_tile_knobs(spec: TileSpec, knobs: Knobs) -> dict[str, Any]:
    """Knobs with the default for each one missing. Those that the unit does not have are the defaults; ``pixels``,
    ``unroll`` and a block's shape fall to what this kernel has, because the same knobs serve a layer at every
    bit-width. ConfigError for an unknown knob or value, or a block that does not fit.
    """
    defaults = _defaults(spec)
    unknown = set(knobs) - set(defaults)
    if unknown:
        raise ConfigError(f"unknown knob {sorted(unknown)}; a convolution on tiles has {sorted(defaults)}")
    full = {**defaults, **knobs}
    for knob, values in CHOICES.items():
        if full[knob] not in values:
            raise ConfigError(f"{knob} is {' or '.join(values)}, got {full[knob]!r}")
    if full["pixels"] == "flat" and True not in _flats(spec):
        full["pixels"] = "rows"
    full["block"] = _fitting(spec, full["block"], full["pixels"] == "flat")
    vectors = conv_knobs.check_knobs(spec.on_vectors, {name: full[name] for name in conv_knobs.KNOBS})
    if full["unit"] == "vectors":
        return {**defaults, "unit": "vectors", **vectors}
    while full["unroll"] not in _unrolls(spec):
        full["unroll"] //= 2
    return full | {name: defaults[name] for name in conv_knobs.KNOBS if name not in ("order", "unroll")}


@functools.lru_cache(maxsize=1024)
def _defaults(spec: TileSpec) -> Mapping[str, Any]:
    flat, block = _ranked(spec)[0]
    own = {"unit": _units(spec)[0], "block": _text(block), "pixels": "flat" if flat else "rows", "unroll": 1}
    return conv_knobs.default_knobs(spec.on_vectors) | own | {"epilogue": "overlapped", "ahead": "off"}


def _fitting(spec: TileSpec, text: str, flat: bool) -> str:
    """The block, or where its shape is not of these pixels, the one with as many tiles side by side."""
    every = {_text(block) for other in _flats(spec) for block in blocks(spec, other)}
    if text not in every:
        raise ConfigError(
            f"block {text!r} does not fit {spec.blocks} blocks of {COLUMNS} channels and {spec.result.height}x"
            f"{spec.result.width} pixels; choose one of {sorted(every)}"
        )
    fitting = blocks(spec, flat)
    n, h, w = map(int, text.split("x"))
    if (n, h, w) in fitting:
        return text
    most = max(beside for channels, below, beside in fitting if (channels, below) == (n, 1))
    return _text((n, 1, min(h * w, most)))


def pack_tiles(spec: TileSpec, knobs: Knobs, weight: np.ndarray) -> np.ndarray:
    """Weights ``(out, in / groups, kh, kw)`` in the order in which they are read, int8, flat: channel tiles, runs,
    steps, blocks of a tile, and of each 16 quads x 16 channels.
    """
    quads, n = weight_quads(spec, weight), block_of(knobs)[0]
    segments, steps = spec.segments(), spec.tile_steps
    full = np.zeros((spec.result.stored, segments, steps * BYTES // QUAD, QUAD), np.int8)
    full[:, :, : quads.shape[2]] = quads
    shaped = full.reshape(spec.blocks // n, n, COLUMNS, segments, steps, BYTES // QUAD, QUAD)
    return np.ascontiguousarray(shaped.transpose(0, 3, 4, 1, 5, 2, 6)).ravel()


def packed_length(spec: TileSpec) -> int:
    """Values of the packed weights."""
    return math.prod((spec.blocks, spec.segments(), spec.tile_steps, ROWS, BYTES))
