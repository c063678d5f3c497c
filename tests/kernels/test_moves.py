"""Any rearrangement of elements: where runs of channels are copied at once, and where they are not."""

from __future__ import annotations

import math

import pytest
import torch
from small_graphs import INT8, UINT8, WIDE, Maker, assert_exact, compiled, images

from lightning_baqe.deploy.plan import make_plan
from lightning_baqe.hardware.options import BuildOptions
from lightning_baqe.hardware.target import CpuTarget, get_target
from lightning_baqe.kernels.x86.moves import MoveSpec


@pytest.fixture(params=["vnni512", "avx2", "portable"])
def target(request: pytest.FixtureRequest) -> CpuTarget:
    return get_target(request.param)


def numbers(*shape: int) -> torch.Tensor:
    return torch.arange(math.prod(shape)).reshape(shape)


def moves(maker: Maker, path: str = "native") -> list[MoveSpec]:
    calls = make_plan(maker.graph(), BuildOptions(get_target(path))).calls
    return [call.spec for call in calls if isinstance(call.spec, MoveSpec) and call.spec.op == "move"]


@pytest.mark.parametrize("channels", [3, 24])
def test_rearrangements(channels: int, target: CpuTarget) -> None:
    maker = Maker(channels, (4, 6), seed=channels)
    index = numbers(channels, 4, 6)
    holes = index.clone()
    holes[maker.integers(0, 3, *holes.shape) == 0] = -1
    wanted = [
        index.permute(2, 1, 0), index.permute(0, 2, 1), index.flip(0, 2), index.reshape(channels, 24, 1),
        index.reshape(channels, 2, 2, 3, 2).permute(2, 4, 0, 1, 3).reshape(4 * channels, 2, 3),  # pixels to channels
        index[:, 1:3, 2:], index.flatten(), index[:, 0, 0].flip(0), holes, torch.full((5, 2, 1), -1),
        torch.nn.functional.pad(index, (2, 0, 1, 0), value=-1),
    ]  # fmt: skip
    for value in ("x", *(maker.conv(out=channels, padding=1, limits=limits) for limits in (INT8, None))):
        for each in wanted:
            maker.move(value, each)
    for each in wanted[:3]:
        moved = maker.move("x", each)
        maker.conv(moved, out=9, padding=1)
        maker.linear(maker.flatten(moved), 4)
    flat = maker.linear(maker.flatten("x"), 12, UINT8)
    maker.conv(maker.move(flat, numbers(3, 2, 2)), out=5, padding=1)
    maker.move(flat, numbers(12).flip(0))
    one = maker.move(maker.flatten(flat), numbers(12, 1, 1).permute(2, 1, 0))
    maker.linear(maker.flatten(one), 3)
    real = maker.float_conv("input", channels, padding=1)
    for value in ("input", real):
        for each in (*wanted[:5], holes):
            maker.float_conv(maker.move(value, each), 3, 1)
    graph = maker.graph()
    assert_exact(compiled(graph, target), images(graph, 2))


def test_runs_of_channels_are_copied_at_once() -> None:
    maker = Maker(48, (4, 4))
    value = maker.conv(out=48, padding=1)
    index = numbers(48, 4, 4)
    maker.move(value, index.permute(0, 2, 1))
    maker.move(value, torch.cat([index[24:], torch.full_like(index, -1), index[:24]]))
    maker.move(value, index.permute(1, 2, 0))
    maker.move(maker.requantize(value, WIDE), index.flip(1))
    assert [(spec.run, spec.absent) for spec in moves(maker)] == [(16, False), (8, True), (1, False), (16, False)]


def test_a_concatenation_takes_them_in_place(target: CpuTarget) -> None:
    maker = Maker(32, (4, 4))
    moved = maker.move(maker.conv(out=32, kernel=1), numbers(32, 4, 4).permute(0, 2, 1))
    maker.conv(maker.concat(moved, "x", moved, maker.conv(out=16, kernel=1)), out=9, padding=1)
    graph = maker.graph()
    artifact = compiled(graph, target)
    assert moved in artifact.plan.buffers
    assert_exact(artifact, images(graph))
