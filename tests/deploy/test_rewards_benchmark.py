"""``python -m lightning_baqe.benchmarks.rewards``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_graphs import Maker

from lightning_baqe.benchmarks import rewards
from lightning_baqe.deploy import kernel_bench
from lightning_baqe.integer.graph import IntegerGraph


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
    monkeypatch.setattr(kernel_bench, "worker", lambda threads: pytest.fail("measured again"))
    assert rewards.main(arguments) == 0
    assert capsys.readouterr().out == first


def test_wrong_widths(capsys: pytest.CaptureFixture[str]) -> None:
    assert rewards.main(["--bits", "1", "4"]) == 2
    assert "--bits are 2..8, got [1]" in capsys.readouterr().err
