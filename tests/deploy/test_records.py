"""The records database."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from small_graphs import Maker

from lightning_baqe.deploy.conv_template import ConvSpec, check_knobs
from lightning_baqe.deploy.plan import make_plan
from lightning_baqe.deploy.records import KernelRecord, Records, default_records_path
from lightning_baqe.deploy.target import get_target

TARGET = get_target("vnni512")


@pytest.fixture
def spec() -> ConvSpec:
    maker = Maker(16, 8)
    maker.conv(out=64, padding=1)
    found = make_plan(maker.graph(), TARGET).calls[1].spec
    assert isinstance(found, ConvSpec)
    return found


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return Records(tmp_path / "deep" / "records.db")


def _record(
    spec: ConvSpec, tile: str, latency_us: float | None, exact: bool | None = True, error: str | None = None
) -> KernelRecord:
    samples = [] if latency_us is None else [latency_us] * 3
    return KernelRecord(check_knobs(spec, {"tile": tile}), latency_us, samples, exact, error)


def test_the_best_is_the_fastest_that_is_right(spec: ConvSpec, records: Records) -> None:
    assert records.best_knobs(spec, TARGET) is None
    for record in (
        _record(spec, "1x1x1", 9.0),
        _record(spec, "2x1x1", 1.0, exact=False),
        _record(spec, "1x1x2", None, None, "crashed"),
        _record(spec, "1x1x4", 2.0, True, "differs"),
        _record(spec, "2x1x2", 5.0),
    ):
        records.add_kernel(spec, TARGET, record)
    best = records.best_knobs(spec, TARGET)
    assert best is not None
    assert best["tile"] == "2x1x2"
    assert [r.latency_us for r in records.kernels(spec, TARGET)] == [1.0, 2.0, 5.0, 9.0, None]


def test_a_record_comes_back_as_it_was(spec: ConvSpec, records: Records) -> None:
    record = _record(spec, "1x1x1", 3.25)
    records.add_kernel(spec, TARGET, record)
    assert records.kernel(spec, TARGET, record.knobs) == record
    assert records.kernel(spec, get_target("avx2"), record.knobs) is None
    newer = _record(spec, "1x1x1", 4.5)
    records.add_kernel(spec, TARGET, newer)
    assert records.kernels(spec, TARGET) == [newer]


def test_models(records: Records) -> None:
    assert records.model("plan", 1) is None
    records.add_model("plan", 1, [1.0, 2.0, 3.0], 2.0, {"cpu": "x"})
    assert records.model("plan", 1) == (2.0, [1.0, 2.0, 3.0])
    assert records.model("plan", 2) is None


def test_the_path_follows_the_environment(own_records: Path) -> None:
    assert default_records_path() == own_records / "records.db"
    assert Records().path.exists()


_WRITER = """
import sys
from lightning_baqe.deploy.records import Records
records = Records(sys.argv[1])
for i in range(60):
    records.add_model(f"{sys.argv[2]}-{i}", 1, [1.0] * 50, float(i), {})
"""


def test_two_processes_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "records.db"
    writers = [subprocess.Popen([sys.executable, "-c", _WRITER, str(path), name]) for name in "ab"]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    records = Records(path)
    assert all(records.model(f"{name}-{i}", 1) == (float(i), [1.0] * 50) for name in "ab" for i in range(60))
