"""Peaks are kept, the highest of each arithmetic. (What is measured: test_benchmark.)"""

from __future__ import annotations

from pathlib import Path

from lightning_baqe.deploy.peak import Peaks
from lightning_baqe.deploy.records import Records
from lightning_baqe.deploy.target import get_target


def test_the_highest_is_kept(tmp_path: Path) -> None:
    target = get_target("vnni512")
    peaks = Peaks(Records(tmp_path / "records.db").path)
    assert peaks.get(target, "vnni", 1) is None
    for gmacs in (500.0, 510.0, 505.0):
        peaks.add(target, "vnni", 1, gmacs)
    peaks.add(target, "maddubs", 2, 100.0)
    assert Peaks(peaks.path).get(target, "vnni", 1) == 510.0
    assert peaks.get(target, "maddubs", 2) == 100.0
    assert peaks.get(get_target("avx2"), "maddubs", 2) is None
    Records(peaks.path)
