"""Arithmetics: the instructions in which a kernel multiplies and adds, and all that follows from them.

A convolution's inner step multiplies groups of neighbouring input values (a *quad*: four unsigned bytes read as one
32-bit word and broadcast to all lanes) with the weights of as many output channels as a register has 32-bit lanes.

| name | where | step | quad | weights | rows of a depthwise step | exact because |
| --- | --- | --- | --- | --- | --- | --- |
| tiles | AMX | a product of tile registers, see :mod:`lightning_baqe.kernels.x86.tiles` | 4 | int8 | | as vnni |
| vnni | VNNI | ``vpdpbusd``: u8 x s8, four products into int32 | 4 | int8, nibbles | 4, bytes | it does not saturate |
| maddubs | AVX2 | a chain of ``vpmaddubsw`` in int16, ``vpmaddwd`` by ones | 4 | int8, nibbles | | weights prove it |
| madd16 | AVX2 | even and odd bytes as int16, two ``vpmaddwd`` | 4 | int16 | 2, words | 255 * 128 * 2 fits int32 |
| portable | all | one value at a time, widened to int32 | 1 | int8 | 1 | plain arithmetic |
| fma | all | one value at a time | 1 | float32 | 1 | (float) |

``tiles_vnni`` and ``tiles_plain`` stand for tiles on other CPUs, for tests.

A layer takes the first of its target that is exact for its weights. Another instruction set is another class, in
:data:`ARITHMETICS` before those that are slower. Specs and records keep the name.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, ClassVar, Literal, final

import numpy as np
from tvm.script import tirx as T

from lightning_baqe.hardware.target import VNNI_PATHS, CpuTarget

_VPDPBUSD = "llvm.x86.avx512.vpdpbusd.{bits}"  # of 256 bits AVX-VNNI's, too
_PMADDUBSW = "llvm.x86.avx2.pmadd.ub.sw"
_PMADDWD = "llvm.x86.avx2.pmadd.wd"
_VPERMI2B = "llvm.x86.avx512.vpermi2var.qi.512"
INT16_MAX = 2**15 - 1
CHAINS = (32, 16, 8, 4, 2, 1)


def intrinsic(name: str, *args: Any, dtype: str) -> Any:
    """A pure instruction by LLVM's name of it."""
    return T.call_llvm_pure_intrin(T.llvm_lookup_intrinsic_id(name), *args, dtype=dtype)


def look_up_64(table: list[Any], index: Any) -> Any:
    """``table[index]`` for 64 bytes: four vectors of 64 entries each, by AVX512-VBMI's ``vpermi2b``."""
    low, high = (intrinsic(_VPERMI2B, a, index, b, dtype="uint8x64") for a, b in (table[:2], table[2:]))
    return T.Select(index >= T.broadcast(T.uint8(128), 64), high, low)


def vpdpbusd(sums: Any, words: Any, weights: Any, lanes: int) -> Any:
    """VNNI's step, with input values as int32 words."""
    unsigned = T.reinterpret(words, dtype=f"int8x{4 * lanes}")
    return intrinsic(_VPDPBUSD.format(bits=32 * lanes), sums, unsigned, weights, dtype=f"int32x{lanes}")


def _vpmaddwd(a: Any, b: Any, lanes: int) -> Any:
    """The sums of the two products of each lane's int16; lanes must be 8."""
    return intrinsic(_PMADDWD, a, b, dtype=f"int32x{lanes}")


class Arithmetic(abc.ABC):
    """One row of the table above."""

    name: ClassVar[str]
    paths: ClassVar[tuple[str, ...]] = ()  # of the targets that have its instructions
    plain: ClassVar[bool] = False  # of every target, for signed input values, too; nothing plainer can replace it
    packs: ClassVar[bool] = True  # its targets have the instructions that pack four vectors of results to bytes
    quad: ClassVar[int] = 4  # input values of a step
    taps: ClassVar[int] = 0  # rows of a depthwise window that one word holds; 0: it has no depthwise kernels
    dtype: ClassVar[str] = "int32"  # of sums and of words of input values
    weight_dtype: ClassVar[str] = "int8"
    vectors: ClassVar[int] = 1  # of weights, in one step
    nibbles: ClassVar[bool] = False  # whether it also takes weights two to a byte
    unroll: ClassVar[int] = 2  # steps in one loop body, without tuning
    costs: ClassVar[tuple[float, float]] = (1.0, 0.1)  # of a multiplication, of a load: estimated cycles

    @property
    def is_float(self) -> bool:
        """Whether it computes floats."""
        return self.dtype == "float32"

    def chain(self, make_quads: Callable[[str], np.ndarray], activation_max: int) -> int:
        """Steps that are added before they are widened; 0 where it is not exact for these weights. See
        :func:`choose_dot`.
        """
        return 1

    def reach(self, chain: int) -> int:
        """The largest weight for which a chain is exact, whatever the input."""
        return 128

    def word(self, source: Any, offset: Any) -> Any:
        """The input values of one step, as one scalar."""
        return T.reinterpret(source[T.ramp(offset, 1, 4)], dtype="int32")

    def weights(self, buffer: Any, quad: Any, lanes: int) -> list[Any]:
        """The weight vectors of one step."""
        width = lanes * self.quad // self.vectors
        return [buffer[T.ramp(quad * (lanes * self.quad) + v * width, 1, width)] for v in range(self.vectors)]

    def pack(self, blocks: np.ndarray) -> np.ndarray:
        """Weights ``(blocks, segments, steps, lanes, quad)`` as :meth:`weights` reads them, flat."""
        return np.ascontiguousarray(blocks, dtype=self.weight_dtype).ravel()

    @abc.abstractmethod
    def add(self, acc: Any, words: Any, weights: Any, lanes: int) -> Any:
        """The sums and the products of a vector of words, all different, with one vector of weights."""

    def step(self, acc: Any, words: list[Any], weights: list[Any], lanes: int) -> Any:
        """The sums after one step, or one chain of them.

        Args:
            acc: a vector of :attr:`dtype`.
            words: one scalar a step, for all lanes.
            weights: as many times :attr:`vectors` vectors.
            lanes: 32-bit lanes of a register.
        """
        return self.add(acc, T.broadcast(words[0], lanes), weights[0], lanes)

    def short(self, words: Any, weights: Any, lanes: int) -> Any:
        """The products that a chain adds, ``int16 x 2 lanes``."""
        raise AssertionError(f"{self.name} has no chains")

    def widened(self, acc: Any, sums: Any, lanes: int) -> Any:
        """The sums and those of a chain."""
        raise AssertionError(f"{self.name} has no chains")

    def cost(self, sums: int, blocks: int, words: int, registers: int, chain: int) -> float:
        """Estimated cycles of one step of a tile: multiplications against loads.

        Args:
            sums, blocks, words: vectors of accumulators and of weights, scalars of input values.
            registers, chain: of the target, of the spec.
        """
        multiply, load = self.costs
        # Latency of a multiply-accumulate chain needs enough independent accumulators in flight.
        return max(multiply * sums, 8.0) + load * (blocks + words)


@final
class Vnni(Arithmetic):
    name, paths, taps, nibbles = "vnni", VNNI_PATHS, 4, True  # beside tiles, too

    def add(self, acc: Any, words: Any, weights: Any, lanes: int) -> Any:
        return vpdpbusd(acc, words, weights, lanes)


@final
class Maddubs(Arithmetic):
    name, paths, nibbles = "maddubs", ("avx2",), True

    def chain(self, make_quads: Callable[[str], np.ndarray], activation_max: int) -> int:
        quads = make_quads(self.name)
        length = quads.shape[2]  # of a run, which is filled up to whole chains: two instructions a quad, three a chain
        fits = exact_chains(quads, activation_max)
        return min(fits, key=lambda chain: (-(-length // chain) * (2 * chain + 3), -chain), default=0)

    def reach(self, chain: int) -> int:
        return INT16_MAX // (2 * chain * 255)

    def add(self, acc: Any, words: Any, weights: Any, lanes: int) -> Any:
        return self.widened(acc, self.short(words, weights, lanes), lanes)

    def step(self, acc: Any, words: list[Any], weights: list[Any], lanes: int) -> Any:
        products = [self.short(T.broadcast(a, lanes), w, lanes) for a, w in zip(words, weights, strict=True)]
        return self.widened(acc, sum(products[1:], products[0]), lanes)

    def short(self, words: Any, weights: Any, lanes: int) -> Any:
        unsigned = T.reinterpret(words, dtype=f"uint8x{4 * lanes}")
        return intrinsic(_PMADDUBSW, unsigned, weights, dtype=f"int16x{2 * lanes}")

    def widened(self, acc: Any, sums: Any, lanes: int) -> Any:
        return acc + _vpmaddwd(sums, T.broadcast(T.int16(1), 2 * lanes), lanes)

    def cost(self, sums: int, blocks: int, words: int, registers: int, chain: int) -> float:
        """Products and int16 sums; once a chain, the widening."""
        spilled = max(0, sums + blocks + 3 - registers)
        return sums * (2.0 + 3.0 / chain) + 0.5 * (blocks + words) + 2.0 * spilled


@final
class Madd16(Arithmetic):
    name, paths, taps, weight_dtype, vectors = "madd16", ("avx2",), 2, "int16", 2
    unroll = 1  # a second step in one body wants more registers than there are

    def pack(self, blocks: np.ndarray) -> np.ndarray:
        """The even pair of every lane, then the odd one."""
        return super().pack(np.stack([blocks[..., 0::2], blocks[..., 1::2]], axis=3))

    def add(self, acc: Any, words: Any, weights: Any, lanes: int) -> Any:
        return acc + _vpmaddwd(T.reinterpret(words, dtype=f"int16x{2 * lanes}"), weights, lanes)

    def step(self, acc: Any, words: list[Any], weights: list[Any], lanes: int) -> Any:
        word = T.broadcast(words[0], lanes)
        even = T.bitwise_and(word, T.broadcast(T.int32(0x00FF00FF), lanes))
        unsigned = T.reinterpret(word, dtype=f"uint16x{2 * lanes}")
        odd = T.shift_right(unsigned, T.broadcast(T.uint16(8), 2 * lanes))
        return self.add(self.add(acc, even, weights[0], lanes), odd, weights[1], lanes)

    def cost(self, sums: int, blocks: int, words: int, registers: int, chain: int) -> float:
        """Two products, two sums; each word becomes two vectors of int16."""
        spilled = max(0, sums + 2 * blocks + 4 - registers)
        return sums * 4.0 + blocks + 3.0 * words + 2.0 * spilled


class TileProducts(Arithmetic):
    """Of a template of its own, which knows how tiles lie; ``how`` as for :class:`~lightning_baqe.kernels.x86.tiles`.

    Where a layer is better off without, its template takes ``vectors``.
    """

    how: ClassVar[Literal["amx", "vnni", "plain"]]
    vectors_name: ClassVar[str]

    def add(self, acc: Any, words: Any, weights: Any, lanes: int) -> Any:
        raise AssertionError(f"{self.name} has no vectors")


@final
class AmxTiles(TileProducts):
    name, paths, how, vectors_name = "tiles", ("amx",), "amx", "vnni"


@final
class VnniTiles(TileProducts):
    name, paths, how, vectors_name = "tiles_vnni", ("amx_vnni",), "vnni", "vnni"


@final
class PlainTiles(TileProducts):
    name, paths, how, vectors_name, packs = "tiles_plain", ("amx_plain",), "plain", "portable", False


@final
class Portable(Arithmetic):
    name, plain, packs, quad, taps, costs = "portable", True, False, 1, 1, (2.0, 2.0)

    def word(self, source: Any, offset: Any) -> Any:
        return T.Cast("int32", source[offset])

    def add(self, acc: Any, words: Any, weights: Any, lanes: int) -> Any:
        return acc + words * T.Cast(f"int32x{lanes}", weights)


@final
class Fma(Arithmetic):
    name, plain, packs, quad, taps, dtype, weight_dtype = "fma", True, False, 1, 1, "float32", "float32"

    def word(self, source: Any, offset: Any) -> Any:
        return source[offset]

    def add(self, acc: Any, words: Any, weights: Any, lanes: int) -> Any:
        return intrinsic("llvm.fma", words, weights, acc, dtype=f"float32x{lanes}")


ARITHMETICS: dict[str, Arithmetic] = {
    a.name: a for a in (AmxTiles(), VnniTiles(), PlainTiles(), Vnni(), Maddubs(), Madd16(), Portable(), Fma())
}
PLAIN = Portable.name  # what computes integers on any CPU


def arithmetics(target: CpuTarget, is_float: bool = False) -> list[Arithmetic]:
    """Those that a CPU has, fastest first."""
    return [a for a in ARITHMETICS.values() if a.is_float == is_float and (a.plain or target.path in a.paths)]


def choose_dot(
    target: CpuTarget, make_quads: Callable[[str], np.ndarray], activation_max: int, is_float: bool = False
) -> tuple[str, int]:
    """The name of the fastest arithmetic that is exact for these weights, and its chain length.

    Args:
        make_quads: from an arithmetic's name to int weights by output channel and quad, ``(out, segments, quads, 4)``;
            asked for where they decide.
        activation_max: largest input value.
        is_float: of a layer of floats, which asks for no weights.

    Returns:
        ``(name, chain)``. A chain of k is used where for every output channel, every two-byte lane and every k
        consecutive quads, ``activation_max`` times the sum of the positive (and of the negative) weights fits int16.
    """
    found = ((a.name, a.chain(make_quads, activation_max)) for a in arithmetics(target, is_float))
    return next((name, chain) for name, chain in found if chain)


def exact_chains(quads: np.ndarray, activation_max: int) -> list[int]:
    """The chain lengths of :data:`CHAINS` that cannot overflow, shortest first; arguments as in :func:`choose_dot`."""
    length = quads.shape[2]
    padding = ((0, 0), (0, 0), (0, -length % CHAINS[0]), (0, 0))
    padded = np.pad(quads, padding).astype(np.int32) * activation_max
    first, second = padded[..., ::2], padded[..., 1::2]
    positive = np.maximum(first, 0) + np.maximum(second, 0)
    negative = np.minimum(first, 0) + np.minimum(second, 0)
    fits: list[int] = []
    for chain in reversed(CHAINS):
        if positive.max() > INT16_MAX or negative.min() < -INT16_MAX - 1:
            break  # longer sums of one sign only grow
        fits.append(chain)
        if chain < CHAINS[0]:
            positive, negative = (sums[:, :, ::2] + sums[:, :, 1::2] for sums in (positive, negative))
    return fits
