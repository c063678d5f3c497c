"""``python -m lightning_baqe.benchmarks.rewards``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from fake_device import FakeDevice, Refusing
from small_graphs import Maker

from lightning_baqe.benchmarks import rewards
from lightning_baqe.hardware.options import BuildOptions
from lightning_baqe.hardware.target import get_target
from lightning_baqe.integer.graph import IntegerGraph
from lightning_baqe.kernels.x86.conv_spec import ConvSpec
from lightning_baqe.kernels.x86.depthwise import DepthwiseSpec
from lightning_baqe.kernels.x86.layout import Layout
from lightning_baqe.measurement.device import REPEATS


def _graphs(*_: Any) -> dict[int, IntegerGraph]:
    found = {}
    for bits in (4, 8):
        maker = Maker(16, 8)
        maker.conv(out=32, padding=1, weight_bits=bits, name="middle")
        maker.conv(out=10, kernel=8, limits=None, weight_bits=8, name="last")
        found[bits] = maker.graph()
    return found


def test_what_is_missing_is_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rewards, "graphs_at", _graphs)
    arguments = ["--bits", "4", "--candidates", "1", "--database", str(tmp_path / "records.db")]
    assert rewards.main(arguments) == 0
    first = capsys.readouterr().out
    assert "16->32 3x3/1 8x8" in first
    assert "with size as an objective offers 4, 8 bit" in first
    assert rewards.main(arguments, Refusing(tmp_path / "records.db")) == 0
    assert capsys.readouterr().out == first


def test_bit_widths_are_compared_in_turns(tmp_path: Path) -> None:
    """One by one they were measured at different clocks; the table is of figures that were taken in turns."""
    target, device = get_target("avx2"), FakeDevice(tmp_path / "records.db")
    graphs = _graphs()
    rewards.measure_missing(graphs, target, 1, 1, device)
    ((_, specs),) = rewards.searched_kernels(graphs, BuildOptions(target))
    before = rewards.fastest_codes(specs, target, device.records)
    assert before[4].code != before[8].code
    device.kernels.clear()
    rewards.compare_widths(graphs, target, 1, device)
    assert [one.spec for one in device.kernels] == [specs[8], specs[4]] * rewards.ROUNDS
    after = rewards.fastest_codes(specs, target, device.records)
    assert {one.samples for one in after.values()} == {rewards.ROUNDS * REPEATS}
    device.kernels.clear()
    rewards.compare_widths(graphs, target, 1, device)
    assert not device.kernels


def test_names_of_kernels() -> None:
    source = Layout(32, 8, 8, 32, (1, 1), "uint8")
    shape = (source, source, (3, 3), (1, 1), (1, 1), 1, 1, "requant")
    dense = ConvSpec("vnni", 16, 32, *shape, chain=1)
    assert rewards.shape_text(dense) == "32->32 3x3/1 8x8"
    assert rewards.shape_text(dataclasses.replace(dense, groups=4)) == "32->32 3x3/1 8x8 4 groups"
    assert rewards.shape_text(DepthwiseSpec("vnni", 16, 32, *shape)) == "32->32 3x3/1 8x8 depthwise"


def test_wrong_widths(capsys: pytest.CaptureFixture[str]) -> None:
    assert rewards.main(["--bits", "1", "4"]) == 2
    assert "--bits are 2..8, got [1]" in capsys.readouterr().err
