"""The proofs behind chained saturating instructions, and the instructions themselves."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from hypothesis import given
from hypothesis import strategies as st
from small_graphs import Maker, assert_exact, compiled, images

from lightning_baqe.hardware.target import get_target
from lightning_baqe.kernels.x86.arithmetic import CHAINS, INT16_MAX, choose_dot, exact_chains
from lightning_baqe.kernels.x86.conv_spec import ConvSpec
from lightning_baqe.measurement.peak import _peak_kernel


def _fits(sums: np.ndarray, chain: int, limit: int) -> bool:
    out, segments, length, lanes = sums.shape
    for o in range(out):
        for s in range(segments):
            for lane in range(lanes):
                for first in range(0, length, chain):
                    if sum(int(sums[o, s, q, lane]) for q in range(first, min(first + chain, length))) > limit:
                        return False
    return True


@given(st.integers(0, 2**32 - 1), st.integers(1, 70), st.integers(2, 8), st.integers(1, 8))
def test_exact_chains_are_right(seed: int, length: int, weight_bits: int, activation_bits: int) -> None:
    rng = np.random.default_rng(seed)
    high, amax = 2 ** (weight_bits - 1), 2**activation_bits - 1
    quads = rng.integers(-high, high, (2, 2, length, 4)) * rng.integers(0, 2, (2, 2, length, 4))
    pairs = quads.reshape(2, 2, length, 2, 2) * amax
    signs = np.maximum(pairs, 0).sum(-1), -np.minimum(pairs, 0).sum(-1)
    wanted = [c for c in CHAINS if _fits(signs[0], c, INT16_MAX) and _fits(signs[1], c, INT16_MAX + 1)]
    assert exact_chains(quads, amax) == sorted(wanted)


def _saturating(quads: np.ndarray, activations: np.ndarray, chain: int) -> np.ndarray:
    """vpmaddubsw chains as the CPU computes them: pair products and their sums in int16, pairs saturate, sums wrap."""
    pairs = (quads.astype(np.int64) * activations).reshape(*quads.shape[:-1], 2, 2).sum(-1)
    pairs = np.clip(pairs, -(2**15), 2**15 - 1)
    length = pairs.shape[2]
    total = np.zeros(pairs.shape[:2], np.int64)
    for first in range(0, length, chain):
        wrapped = pairs[:, :, first : first + chain].sum(2).astype(np.int16)
        total += wrapped.astype(np.int64).sum(-1)
    return total


@given(st.integers(0, 2**32 - 1), st.integers(2, 8), st.integers(2, 8), st.integers(1, 40))
def test_chosen_chains_never_overflow(seed: int, weight_bits: int, activation_bits: int, length: int) -> None:
    rng = np.random.default_rng(seed)
    high, amax = 2 ** (weight_bits - 1), 2**activation_bits - 1
    quads = rng.integers(-high, high, (3, 2, length, 4))
    dot, chain = choose_dot(get_target("avx2"), lambda _: quads, amax)
    if dot == "madd16":
        return
    extremes = [np.where(quads > 0, amax, 0), np.where(quads < 0, amax, 0), rng.integers(0, amax + 1, quads.shape)]
    for activations in (*extremes, np.full(quads.shape, amax)):
        exact = (quads * activations).sum((2, 3))
        assert (_saturating(quads, activations, chain) == exact).all()


@pytest.mark.parametrize(
    ("weight", "amax", "wanted"),
    [(127, 255, ("madd16", 1)), (-128, 255, ("madd16", 1)), (64, 255, ("maddubs", 1)), (65, 255, ("madd16", 1)),
     (-64, 255, ("maddubs", 1)), (127, 127, ("maddubs", 1)), (7, 255, ("maddubs", 8)), (1, 15, ("maddubs", 32)),
     (0, 255, ("maddubs", 32))],
)  # fmt: skip
def test_limits(weight: int, amax: int, wanted: tuple[str, int]) -> None:
    quads = np.full((2, 3, 32, 4), weight)
    assert choose_dot(get_target("avx2"), lambda _: quads, amax) == wanted
    assert choose_dot(get_target("vnni512"), lambda _: quads, amax)[0] == "vnni"
    assert choose_dot(get_target("portable"), lambda _: quads, amax)[0] == "portable"


@pytest.mark.parametrize("path", ["vnni512", "avxvnni", "avx2", "portable"])
def test_extreme_weights_are_exact(path: str) -> None:
    maker = Maker(16, 6, zero_point=0)
    for weight in (-128, 127, 64, 65, -64, -65):
        maker.conv(out=16, padding=1, weight=weight, limits=None)
    graph = maker.graph()
    artifact = compiled(graph, get_target(path))
    assert_exact(artifact, images(graph) * 0 + 100.0)  # every activation is 255
    dots = {call.spec.dot for call in artifact.plan.calls if isinstance(call.spec, ConvSpec)}
    assert (
        dots
        == {"vnni512": {"vnni"}, "avxvnni": {"vnni"}, "avx2": {"madd16", "maddubs"}, "portable": {"portable"}}[path]
    )


@pytest.mark.parametrize(
    ("path", "dot", "chain", "instruction"),
    [("vnni512", "vnni", 1, "vpdpbusd"), ("avxvnni", "vnni", 1, "{vex}\tvpdpbusd"),
     ("avx2", "maddubs", 4, "vpmaddubsw"), ("avx2", "madd16", 1, "vpmaddwd"),
     ("avx2", "fma", 1, "vfmadd"), ("vnni512", "fma", 1, "vfmadd"), ("portable", "portable", 1, "mul")],
)  # fmt: skip
def test_intrinsics_compile(path: str, dot: str, chain: int, instruction: str) -> None:
    """LLVM renames and retypes intrinsics between releases: those in use must become the instruction that is meant."""
    target = get_target(path)
    function = _peak_kernel(dot, chain, target.lanes, 4)
    library = tvm.compile(tvm.IRModule({"main": function}), target=tvm.target.Target(target.tvm))
    assert instruction in library.mod.inspect_source("asm")
