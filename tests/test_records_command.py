"""``python -m lightning_baqe.records``."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_baqe.hardware.identity import device_info
from lightning_baqe.hardware.target import get_target
from lightning_baqe.measurement.database import Records
from lightning_baqe.records import main


def test_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here, there, file = (str(tmp_path / name) for name in ("here.db", "there.db", "records.jsonl"))
    Records(here).add_model("plan", 1, [2.0], 2.0)
    assert main(["export", file, "--database", here, "--device", str(device_info()["cpu"])[:4]]) == 0
    assert "1 records written" in capsys.readouterr().out
    assert main(["import", file, "--database", there]) == 0
    assert "1 records added" in capsys.readouterr().out
    assert Records(there).model("plan", 1) == (2.0, [2.0])
    assert main(["show", "--database", there]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "whole models" in shown
    assert "this machine" in shown
    assert there in shown.replace(" ", "")


def test_peaks_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    database = str(tmp_path / "here.db")
    records = Records(database)
    records.add_peak(get_target("vnni512"), "vnni", 1, 508.25)
    records.add_peak(get_target("avx2"), "maddubs", 8, 151.5)
    assert main(["show", "--database", database]) == 0
    shown = capsys.readouterr().out
    rows = [line.replace("│", " ").split() for line in shown.splitlines() if line.startswith("│")]
    assert [row[:5] for row in rows] == [
        ["vnni", "llvm", "cascadelake", "1", "508.2"],
        ["maddubs", "llvm", "haswell", "8", "151.5"],
    ]
    assert "peaks of one core" in shown
    assert "operator" not in shown  # no table of what there is none


def test_errors_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    database = ["--database", str(tmp_path / "here.db")]
    (tmp_path / "wrong.jsonl").write_text("{}\n")
    assert main(["import", str(tmp_path / "wrong.jsonl"), *database]) == 2
    assert "line 1" in capsys.readouterr().err
    assert main(["import", str(tmp_path / "missing.jsonl"), *database]) == 2
    assert "missing.jsonl" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "out.jsonl"), "--device", "none such", *database]) == 2
    assert "knows no device" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()
