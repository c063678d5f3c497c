"""Concatenations in place: where the copies vanish, where they stay, and that nothing else ever changes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from small_graphs import INT8, UINT8, WIDE, Maker, assert_exact, compiled, images

from lightning_baqe.deploy.artifact import Artifact
from lightning_baqe.deploy.plan import make_plan
from lightning_baqe.hardware.options import BuildOptions
from lightning_baqe.hardware.target import CpuTarget, can_run, get_target
from lightning_baqe.integer import nodes as ir
from lightning_baqe.integer.graph import IntegerGraph
from lightning_baqe.kernels.x86.conv_spec import ConvSpec
from lightning_baqe.kernels.x86.depthwise import DepthwiseSpec
from lightning_baqe.kernels.x86.layout import Layout
from lightning_baqe.kernels.x86.moves import MoveSpec
from lightning_baqe.measurement.profile import KernelProfile
from lightning_baqe.tuning.tuner import tunable_layers

PATHS = ("native", "portable")


@pytest.fixture(params=PATHS)
def target(request: pytest.FixtureRequest) -> CpuTarget:
    return get_target(request.param)


def copies(graph: IntegerGraph, fuse: bool = True, path: str = "native") -> int:
    """Kernels that only move values."""
    return sum(
        isinstance(call.spec, MoveSpec) for call in make_plan(graph, BuildOptions(get_target(path)), fuse=fuse).calls
    )


def inception(maker: Maker, source: str, branches: Sequence[int] = (64, 48, 32)) -> str:
    """A block as InceptionV3's last ones: branches of several sizes, one of them a concatenation itself."""
    split = maker.conv(source, out=32, kernel=1)
    inner = maker.concat(
        maker.conv(split, out=16, kernel=(1, 3), padding=(0, 0, 1, 1)),
        maker.conv(split, out=32, kernel=(3, 1), padding=(1, 1, 0, 0)),
    )
    outputs = [maker.conv(source, out=out, padding=1) for out in branches]
    return maker.concat(outputs[0], inner, *outputs[1:], maker.max_pool(source, 3, 1, 1))


def check(maker: Maker, target: CpuTarget, wanted: int | None = None) -> Artifact:
    """Exact, node by node and end to end, with the number of copies that is wanted, and as without slices."""
    graph = maker.graph()
    artifact = compiled(graph, target)
    assert_exact(artifact, images(graph))
    found = [call.result for call in artifact.plan.calls if isinstance(call.spec, MoveSpec)]
    assert wanted is None or len(found) == wanted, found
    return artifact


def test_no_copy_is_left_in_inception_blocks(target: CpuTarget) -> None:
    maker = Maker(16, (6, 5))
    maker.conv(inception(maker, inception(maker, maker.conv(out=64, padding=1))), out=10, kernel=1)
    assert copies(maker.graph(), fuse=False) == 4
    artifact = check(maker, target, 0)
    assert_exact(compiled(artifact.graph, target, fuse=False), images(artifact.graph))
    profile = KernelProfile(artifact.plan, tuple(artifact.graph.input_shape))
    if can_run(target.path):
        x = images(artifact.graph)
        assert torch.equal(torch.from_numpy(profile.run(x.numpy())).reshape(-1), artifact.graph.run(x).reshape(-1))


def test_a_dense_block_is_one_buffer(target: CpuTarget) -> None:
    """Each layer reads all values before it: every concatenation but the last is the beginning of the last."""
    maker = Maker(16, 5)
    features = [maker.conv(out=32, padding=1)]
    for _ in range(3):
        joined = maker.concat(*features) if len(features) > 1 else features[0]
        features.append(maker.conv(maker.affine(joined), out=16, padding=1))
    maker.affine(maker.concat(*features))
    artifact = check(maker, target, 0)
    assert set(artifact.plan.buffers.values()) == {maker.nodes[-2].name}


def test_channels_that_are_no_whole_vectors(target: CpuTarget) -> None:
    maker = Maker(17, 5)
    a, b, c = (maker.conv(out=out, padding=1) for out in (17, 32, 19))
    maker.conv(maker.concat(b, b, c), out=8, padding=1)  # the last may be odd
    maker.conv(maker.concat(maker.conv(out=16), maker.concat(maker.conv(out=32), maker.conv(out=3))), out=8, padding=1)
    maker.conv(maker.concat(a, maker.conv(out=32, kernel=1, padding=0)), out=8, padding=1)
    assert copies(maker.graph()) == 2
    check(maker, target, 2)


def test_other_readers_of_a_slice(target: CpuTarget) -> None:
    """They read it where it lies: dense, grouped and depthwise kernels, pools, sums, products, tables, selections."""
    maker = Maker(16, (7, 6))
    a, b = maker.conv(out=32, padding=1), maker.conv(out=80, padding=1)
    maker.concat(a, b, maker.conv(out=32, padding=1))
    for value, channels in ((a, 32), (b, 80)):
        maker.conv(value, out=20, padding=2, kernel=5, stride=2)
        maker.conv(value, out=channels, padding=1, dilation=2, groups=2)
        maker.conv(value, out=channels, padding=1, groups=channels)
        maker.conv(value, out=4, kernel=1)
        maker.max_pool(value, 3, 2, 1)
        gate = maker.avg_windows(value, [(0, 7)], [(0, 6)])
        maker.mul(value, gate)
        maker.affine(value, INT8)
        maker.clip(value, (3, 90))
        maker.add(value, maker.conv(out=channels, padding=1))
        maker.add(value, value, WIDE)
        maker.gather(value, [-1, *range(channels - 1, 3, -1)], [0, -1, 3], None)
        maker.gather(value, list(range(5, channels)))
        maker.linear(maker.flatten(value), 7)
    maker.table(b)
    maker.requantize(b, INT8)
    check(maker, target, None)
    places = make_plan(maker.graph(), BuildOptions(target)).buffers
    assert {a, b} <= set(places)


def test_what_small_tables_read_or_write_keeps_its_rows() -> None:
    maker = Maker(16, 5)
    a, b = maker.conv(out=16, padding=1), maker.table(maker.conv(out=16, padding=1))
    maker.table(a)
    maker.concat(a, b, maker.conv(out=16, padding=1), maker.table(maker.conv(out=96, padding=1)))
    plan = check(maker, get_target()).plan
    assert ({a, b} & set(plan.buffers) == set()) == plan.options.target.vbmi


def test_other_halos(target: CpuTarget) -> None:
    """One number pads the whole buffer; a value that is padded with another, or two, stays where it is."""
    maker = Maker(16, 6)
    same, other, both, none = (maker.conv(out=16, kernel=1) for _ in range(4))
    joined = maker.concat(same, other, both, none)
    maker.conv(joined, out=8, padding=1, pad_value=5)
    maker.conv(joined, out=8, padding=2, pad_value=77)
    maker.conv(same, out=8, padding=3, pad_value=77)
    maker.conv(other, out=8, padding=1, pad_value=5)
    for pad_value in (5, 77):
        maker.conv(both, out=8, padding=1, pad_value=pad_value)
    artifact = check(maker, target)
    assert {name for name in (same, other, both, none) if name in artifact.plan.buffers} == {same, none}
    layouts = artifact.plan.layouts
    assert layouts[same].halo == layouts[none].halo == layouts[joined].halo == (3, 3)


def test_a_reader_of_a_part_decides_on_the_halo(target: CpuTarget) -> None:
    maker = Maker(16, (4, 6))
    a, b = maker.conv(out=16, kernel=1), maker.conv(out=48, kernel=1)
    maker.conv(a, out=8, padding=2, pad_value=9)
    maker.conv(maker.concat(b, a), out=8, kernel=1)
    check(maker, target, 0)


def test_values_that_are_wanted_twice(target: CpuTarget) -> None:
    maker = Maker(16, 6)
    a, b = maker.conv(out=16, padding=1), maker.conv(out=16, padding=1)
    first = maker.concat(a, b, a)
    second = maker.concat(b, a, first)
    maker.conv(maker.concat(second, first), out=8, padding=1)
    check(maker, target)


def test_the_image_is_copied(target: CpuTarget) -> None:
    maker = Maker(16, 6)
    maker.conv(maker.concat("x", maker.conv(out=16, padding=1), "x"), out=8, padding=1)
    check(maker, target, 2)


def test_types_that_differ_are_copied(target: CpuTarget) -> None:
    maker = Maker(16, 6)
    values = [maker.conv(out=16, padding=1, limits=limits) for limits in (UINT8, INT8, WIDE, None)]
    maker.concat(*values)
    artifact = check(maker, target, 2)
    assert set(artifact.plan.buffers) >= {values[2], values[3]}


def test_residual_sums_and_the_output(target: CpuTarget) -> None:
    maker = Maker(16, 6)
    trunk = maker.conv(out=32, padding=1)
    total = maker.add(trunk, maker.conv(trunk, out=32, padding=1))
    maker.concat(total, trunk)
    check(maker, target, 0)


def test_vectors(target: CpuTarget) -> None:
    maker = Maker(16, 4)
    hidden = maker.linear(maker.flatten(maker.avg_pool("x", 4, 4)), 32, UINT8)
    other = maker.linear(hidden, 16, UINT8)
    maker.linear(maker.flatten(maker.flatten(maker.concat(hidden, other))), 5)
    check(maker, target, 0)


def test_floats(target: CpuTarget) -> None:
    maker = Maker(16, 6)
    a, b = (maker.float_conv("input", out, padding=1, relu=True) for out in (32, 21))
    maker.float_conv(a, 8, 5, padding=2)
    maker.float_conv(maker.float_node(ir.Concat, a, b), 5, padding=2)
    check(maker, target, 0)


def test_kernels_are_measured_as_if_they_had_their_own_buffers() -> None:
    maker = Maker(16, 6)
    inception(maker, maker.conv(out=64, padding=1))
    graph = maker.graph()
    assert all(
        not (spec.source.shared or spec.result.shared) for spec in tunable_layers(graph, BuildOptions(get_target()))
    )
    asked: list[Layout] = []

    def known(spec: ConvSpec | DepthwiseSpec) -> None:
        asked.append(spec.result)

    make_plan(graph, BuildOptions(get_target()), best=known)
    assert asked
    assert not any(layout.shared for layout in asked)
