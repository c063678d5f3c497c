"""The benchmarks of bit allocation in their smallest forms."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_baqe.benchmarks.bits import solver, traces


def test_the_solver(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver, "MOST_S", dict.fromkeys(solver.MOST_S, 60.0))  # a busy machine is no error here
    assert solver.main(["--instances", "10", "--seeds", "1"]) == 0
    shown = capsys.readouterr().out
    assert "10 random problems" in shown
    assert " 0 wrong" in shown
    monkeypatch.setattr(solver, "smallest", lambda problem: -1e9)
    assert solver.main(["--instances", "3", "--seeds", "1"]) == 1


def test_traces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--folder", str(tmp_path), "--images", "2", "--samples", "4", "--smallest", "--threads", "1"]
    assert traces.main(small) == 1  # four probes do not tell
    shown = capsys.readouterr().out
    assert "2 images, 4 probes" in shown
    assert "layer4.1.conv2" in shown
    assert "not known to 5%" in shown
    assert "ModelOpt's scores" in shown
