"""What the checks of an artifact cost is told."""

from __future__ import annotations

import pytest

from lightning_baqe.benchmarks.damage.loading import main


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--rounds", "1"]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in ("load without the proof", "digests of all files"))
