"""The records database."""

from __future__ import annotations

import dataclasses
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from small_graphs import Maker

from lightning_baqe.deploy.calls import Call
from lightning_baqe.deploy.plan import make_plan
from lightning_baqe.errors import ConfigError
from lightning_baqe.hardware import identity as device
from lightning_baqe.hardware.options import BuildOptions
from lightning_baqe.hardware.target import get_target
from lightning_baqe.kernels.specs import build_kernel
from lightning_baqe.kernels.x86.conv_knobs import check_knobs
from lightning_baqe.kernels.x86.conv_spec import ConvSpec
from lightning_baqe.measurement.database import (
    KernelRecord,
    Records,
    canonical,
    code_key,
    default_records_path,
    kernel_text,
)
from lightning_baqe.measurement.records_tables import VERSION

TARGET = get_target("vnni512")


@pytest.fixture
def spec() -> ConvSpec:
    maker = Maker(16, 8)
    maker.conv(out=64, padding=1)
    found = make_plan(maker.graph(), BuildOptions(TARGET)).calls[1].spec
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
    records.add_model("plan", 1, [1.0, 2.0, 3.0], 2.0)
    assert records.model("plan", 1) == (2.0, [1.0, 2.0, 3.0])
    assert records.model("plan", 2) is None


def test_the_path_follows_the_environment(own_records: Path) -> None:
    assert default_records_path() == own_records / "records.db"
    assert Records().path.exists()


_WRITER = """
import sys
from lightning_baqe.measurement.database import KernelRecord, Records
from lightning_baqe.hardware.target import get_target
from lightning_baqe.kernels.x86.conv_spec import ConvSpec
from lightning_baqe.kernels.x86.layout import Layout
layout = Layout(16, 4, 4, 16, (0, 0), "uint8")
spec = ConvSpec("vnni", 16, 32, layout, layout, (1, 1), (1, 1), (1, 1), 0, 0, "requant", chain=1)
records, me = Records(sys.argv[1]), sys.argv[2]
for i in range(1, 31):
    records.add_model(f"{me}-{i}", 1, [1.0] * 50, float(i))
    records.add_kernel(spec, get_target("avx2"), KernelRecord({"tile": f"{me}{i}"}, float(i), [float(i)], True))
"""


def test_processes_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "records.db"
    writers = [subprocess.Popen([sys.executable, "-c", _WRITER, path, name]) for name in "ab"]
    assert [writer.wait(timeout=300) for writer in writers] == [0, 0]
    records = Records(path)
    assert all(records.model(f"{name}-{i}", 1) == (float(i), [1.0] * 50) for name in "ab" for i in range(1, 31))
    with records.reading() as connection:
        rows = connection.execute("SELECT knobs, latency_us FROM kernels").fetchall()
    assert sorted(rows) == sorted((canonical({"tile": f"{n}{i}"}), float(i)) for n in "ab" for i in range(1, 31))


def test_code_that_changed_is_not_believed(spec: ConvSpec, records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    old = _record(spec, "1x1x1", 3.0)
    records.add_kernel(spec, TARGET, old)
    other = dataclasses.replace(spec, epilogue="acc")

    def edited(call: Call) -> Any:
        return build_kernel(other if call.spec == spec else call.spec, call.knobs)

    with monkeypatch.context() as patch:
        patch.setattr(Call, "function", edited)
        code_key.cache_clear()
        assert records.kernel(spec, TARGET, old.knobs) is None
        assert records.best_knobs(spec, TARGET) is None
        new = _record(spec, "1x1x1", 4.0)
        records.add_kernel(spec, TARGET, new)
        assert records.kernels(spec, TARGET) == [new]
    code_key.cache_clear()
    assert records.kernels(spec, TARGET) == [old]  # what was measured before the edit is still there


def test_an_edit_that_generates_the_same_code_forgets_nothing(
    spec: ConvSpec, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    records.add_kernel(spec, TARGET, _record(spec, "1x1x1", 3.0))
    monkeypatch.setattr("lightning_baqe.measurement.database.code_digest", lambda: "other sources")
    assert records.kernels(spec, TARGET)


@pytest.mark.parametrize("part", ["apache-tvm", "apache-tvm-ffi", "llvm"])
def test_another_toolchain_is_another_record(
    part: str, spec: ConvSpec, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    records.add_kernel(spec, TARGET, _record(spec, "1x1x1", 3.0))
    records.add_model("plan", 1, [1.0], 1.0)
    versions = device.toolchain()
    monkeypatch.setattr("lightning_baqe.measurement.database.toolchain", lambda: versions | {part: "0"})
    assert records.kernels(spec, TARGET) == []
    assert records.model("plan", 1) is None


def test_knobs_that_no_template_knows(spec: ConvSpec, records: Records) -> None:
    failed = KernelRecord({"no such knob": 1}, None, [], None, "unknown knob")
    records.add_kernel(spec, TARGET, failed)
    assert records.kernels(spec, TARGET) == [failed]
    assert records.best_knobs(spec, TARGET) is None


def test_a_new_field_with_a_default_keeps_the_text(spec: ConvSpec) -> None:
    grown = dataclasses.make_dataclass("ConvSpec", [("novel", int, 0)], bases=(ConvSpec,), frozen=True)
    values = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    assert kernel_text(grown(**values), TARGET) == kernel_text(spec, TARGET)
    assert kernel_text(grown(**values, novel=1), TARGET) != kernel_text(spec, TARGET)


@pytest.mark.parametrize("figure", [0.0, -1.0, float("nan"), float("inf")])
def test_no_latencies(figure: float, records: Records) -> None:
    with pytest.raises(ConfigError, match="finite positive"):
        KernelRecord({}, figure, [1.0], True)
    with pytest.raises(ConfigError, match="finite positive"):
        records.add_model("plan", 1, [figure], 1.0)
    with pytest.raises(ConfigError, match="neither"):
        KernelRecord({}, None, [], None)


_VERSION_1 = """
CREATE TABLE kernels (device TEXT, mcpu TEXT, spec TEXT, kernel TEXT, knobs TEXT, latency_us REAL, samples_us TEXT,
    exact INTEGER, error TEXT, measured_at REAL, PRIMARY KEY (device, mcpu, kernel));
CREATE INDEX kernels_by_spec ON kernels (device, mcpu, spec);
CREATE TABLE models (device TEXT, plan TEXT, latency_us REAL, samples_us TEXT, info TEXT, measured_at REAL,
    PRIMARY KEY (device, plan));
INSERT INTO models VALUES ('d', 'plan', 1.0, '[1.0]', '{}', 0.0);
"""


def test_a_database_of_version_1_is_set_aside(spec: ConvSpec, tmp_path: Path) -> None:
    path = tmp_path / "records.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(_VERSION_1)
    with pytest.warns(UserWarning, match="0 kernels and 1 models"):
        records = Records(path)
    assert records.model("plan", 1) is None
    records.add_kernel(spec, TARGET, _record(spec, "1x1x1", 3.0))
    assert len(Records(path).kernels(spec, TARGET)) == 1
    with records.reading() as connection:
        assert connection.execute("SELECT plan FROM models_v1").fetchall() == [("plan",)]


def test_files_that_are_no_records(tmp_path: Path) -> None:
    text, other, newer = (tmp_path / name for name in ("text", "other", "newer"))
    text.write_text("no database at all, but long enough to have a header" * 10)
    for path, script in ((other, "CREATE TABLE songs (name TEXT)"), (newer, f"PRAGMA user_version = {VERSION + 1}")):
        with closing(sqlite3.connect(path)) as connection:
            connection.executescript(script)
    for path, reason in ((text, "no SQLite"), (other, "songs"), (newer, "update the package")):
        before = path.read_bytes()
        with pytest.raises(ConfigError, match=reason):
            Records(path)
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection, suppress(sqlite3.DatabaseError):
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
            assert "kernels" not in tables
        assert path.stat().st_size == len(before)


def test_peaks(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    assert records.peak(TARGET, "vnni", 1) is None
    records.add_peak(TARGET, "vnni", 1, 500.0)
    records.add_peak(TARGET, "maddubs", 2, 100.0)
    assert records.peak(TARGET, "vnni", 1) == 500.0
    for gmacs in (510.0, 505.0):
        records.add_peak(TARGET, "vnni", 1, gmacs)  # the highest is kept
    assert records.peak(TARGET, "vnni", 1) == 510.0
    assert records.peak(get_target("avx2"), "maddubs", 2) is None
    with pytest.raises(ConfigError, match="finite positive"):
        records.add_peak(TARGET, "vnni", 1, 0.0)
    monkeypatch.setattr("lightning_baqe.measurement.database.code_digest", lambda: "other sources")
    assert records.peak(TARGET, "vnni", 1) is None


@pytest.mark.parametrize(
    ("latency_us", "exact", "error", "usable"),
    [(1.0, True, None, True), (1.0, None, None, True), (1.0, False, None, False), (1.0, True, "slow", False),
     (None, None, "crashed", False)],
)  # fmt: skip
def test_usable(latency_us: float | None, exact: bool | None, error: str | None, usable: bool) -> None:
    assert KernelRecord({}, latency_us, [], exact, error).usable == usable


def _spoil(path: Path) -> None:
    """Zeros behind the header, also of what is not yet in the file itself."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    content = path.read_bytes()
    path.write_bytes(content[:100] + bytes(len(content) - 100))


def test_a_damaged_database_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "records.db"
    records = Records(path)
    records.add_model("plan", 1, [1.0], 1.0)
    _spoil(path)
    with pytest.warns(UserWarning, match=r"damaged.*set aside as records\.db\.damaged-1"):
        assert records.model("plan", 1) is None
    records.add_model("plan", 1, [2.0], 2.0)
    assert Records(path).model("plan", 1) == (2.0, [2.0])
    _spoil(path)
    with pytest.warns(UserWarning, match=r"damaged-2"):
        assert Records(path).model("plan", 1) is None
    assert sorted(p.name for p in tmp_path.iterdir() if "damaged" in p.name and "-wal" not in p.name) == [
        "records.db.damaged-1",
        "records.db.damaged-2",
    ]


def test_a_table_that_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "records.db"
    Records(path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TABLE models")
    with pytest.warns(UserWarning, match="lacks the tables models"):
        assert Records(path).model("plan", 1) is None


def test_a_row_that_says_nothing(spec: ConvSpec, records: Records) -> None:
    records.add_model("plan", 1, [1.0], 1.0)
    records.add_kernel(spec, TARGET, _record(spec, "1x1x1", 3.0))
    with records.transaction() as connection:
        connection.execute("UPDATE models SET samples_us = 'none'")
        connection.execute("UPDATE kernels SET latency_us = 'fast'")
    with pytest.warns(UserWarning, match="a row of models"):
        assert records.model("plan", 1) is None
    with pytest.warns(UserWarning, match="a row of kernels"):
        assert records.kernels(spec, TARGET) == []


def test_a_locked_database_is_done_without_and_written_later(tmp_path: Path) -> None:
    path = tmp_path / "records.db"
    records = Records(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.warns(UserWarning, match=r"cannot be used now \(database is locked\)"):
            records.add_model("one", 1, [1.0], 1.0)
        assert records.model("one", 1) is None
    records.add_model("two", 1, [2.0], 2.0)
    assert [Records(path).model(name, 1) for name in ("one", "two")] == [(1.0, [1.0]), (2.0, [2.0])]


def test_what_could_not_be_written_is_written_or_told_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "records.db"
    records = Records(path)
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.warns(UserWarning, match="cannot be used now"):
            records.add_model("one", 1, [1.0], 1.0)
        records.add_model("two", 1, [2.0], 2.0)
        with pytest.warns(UserWarning, match="2 records could not be written"):
            records._end()
        assert records.flush() == 2
        freed = threading.Timer(0.2, other.close)  # is waited for, though nothing was for the last half minute
        freed.start()
        assert records.flush() == 0
        freed.join()
    assert [Records(path).model(name, 1) for name in ("one", "two")] == [(1.0, [1.0]), (2.0, [2.0])]
    records._end()


class Clock:
    """Time that passes while somebody sleeps or looks at it."""

    now, slept, time = 0.0, 0, staticmethod(time.time)

    def monotonic(self) -> float:
        self.now += 0.001
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += 1


def test_a_call_waits_for_less_than_a_second_in_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(sqlite3.connect(tmp_path / "records.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        clock = Clock()
        monkeypatch.setattr("lightning_baqe.measurement.database.time", clock)
        with pytest.warns(UserWarning, match="locked"):
            records = Records(tmp_path / "records.db")
        assert 0.7 < clock.now < 0.9
        assert clock.slept > 150  # not at SQLite's own long intervals
        clock.now, records._not_before = 0.0, 0.0
        records.add_model("one", 1, [1.0], 1.0)  # the tables, too, are not there yet
        assert 0.7 < clock.now < 0.9
        clock.now = 1.0
        records.add_model("two", 1, [1.0], 1.0)  # not again so soon
        assert clock.now < 1.1


def test_a_database_that_is_locked_from_the_beginning(tmp_path: Path) -> None:
    path = tmp_path / "records.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.warns(UserWarning, match="locked"):
            records = Records(path)
        assert records.model("one", 1) is None
    records.add_model("one", 1, [1.0], 1.0)
    assert Records(path).model("one", 1) == (1.0, [1.0])


def test_the_users_own_database_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LIGHTNING_BAQE_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be used now"):
        records = Records()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is said in other words where SQLite finds it out
        records.add_model("one", 1, [1.0], 1.0)
        assert records.model("one", 1) is None
    with pytest.raises(ConfigError, match="cannot be made or written"):
        Records(tmp_path / "file" / "records.db")
