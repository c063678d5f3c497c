"""Records as JSON lines: what is exported comes back, what is wrong is refused with its line."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_baqe.errors import ConfigError, DataError
from lightning_baqe.hardware.identity import device_info
from lightning_baqe.hardware.target import get_target
from lightning_baqe.kernels.x86.conv_spec import ConvSpec
from lightning_baqe.kernels.x86.layout import Layout
from lightning_baqe.measurement.database import KernelRecord, Records
from lightning_baqe.measurement.records_exchange import Imported, export_records, import_records

LAYOUT = Layout(16, 4, 4, 16, (0, 0), "uint8")
SPEC = ConvSpec("vnni", 16, 32, LAYOUT, LAYOUT, (1, 1), (1, 1), (1, 1), 0, 0, "requant", chain=1)
TARGET = get_target("vnni512")
KNOBS = {"tile": "1x1x1"}

latencies = st.floats(1e-6, 1e9)
knobs = st.dictionaries(st.text(max_size=5), st.one_of(st.text(max_size=5), st.integers(-9, 9), st.booleans()))
good = st.builds(KernelRecord, knobs, latencies, st.lists(latencies, max_size=4), st.sampled_from([True, None]))
bad = st.builds(
    KernelRecord, knobs, st.none(), st.just([]), st.sampled_from([False, None]), st.text(min_size=1, max_size=9)
)


def _on(cpu: str, records: Records) -> Records:
    """The same database, opened for another device."""
    return Records(records.path, lambda threads: {**device_info(threads), "cpu": cpu})


def _content(records: Records) -> dict[str, list[Any]]:
    with records.reading() as connection:
        return {
            table: sorted(connection.execute(f"SELECT * FROM {table}").fetchall(), key=repr)
            for table in ("devices", "toolchains", "kernels", "models", "peaks")
        }


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["one", "two"]), st.one_of(good, bad)), max_size=6),
    st.dictionaries(st.text(max_size=5), st.tuples(latencies, st.lists(latencies, max_size=3)), max_size=3),
)
def test_export_then_import_is_the_identity(
    tmp_path_factory: pytest.TempPathFactory,
    kernels: list[tuple[str, KernelRecord]],
    models: dict[str, tuple[float, list[float]]],
) -> None:
    folder = tmp_path_factory.mktemp("exchange")
    first, second = Records(folder / "first.db"), Records(folder / "second.db")
    for cpu, record in kernels:
        _on(cpu, first).add_kernel(SPEC, TARGET, record)
    for plan, (latency_us, samples_us) in models.items():
        first.add_model(plan, 1, samples_us, latency_us)
        first.add_peak(TARGET, plan, len(samples_us), latency_us)
    count = export_records(first, folder / "a.jsonl")
    done = import_records(second, folder / "a.jsonl")
    assert _content(second) == _content(first)
    assert done == Imported(added=count)
    assert import_records(second, folder / "a.jsonl") == Imported(same=count)
    assert export_records(second, folder / "b.jsonl") == count
    assert (folder / "a.jsonl").read_bytes() == (folder / "b.jsonl").read_bytes()


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    records = Records(tmp_path / "source.db")
    records.add_kernel(SPEC, TARGET, KernelRecord(KNOBS, 2.0, [2.0, 2.0, 3.0], True))
    records.add_kernel(SPEC, TARGET, KernelRecord({"tile": "1x1x2"}, None, [], None, "crashed"))
    records.add_model("plan", 1, [5.0], 5.0)
    records.add_peak(TARGET, "vnni", 1, 500.0)
    export_records(records, tmp_path / "records.jsonl")
    return tmp_path / "records.jsonl"


def test_order_and_joining_do_not_matter(exported: Path, tmp_path: Path) -> None:
    lines = exported.read_text().splitlines() * 2
    random.Random(0).shuffle(lines)
    (tmp_path / "mixed.jsonl").write_text("\n".join(lines) + "\n\n")
    records = Records(tmp_path / "target.db")
    assert import_records(records, tmp_path / "mixed.jsonl") == Imported(added=4, same=4)
    assert records.kernel(SPEC, TARGET, KNOBS) == KernelRecord(KNOBS, 2.0, [2.0, 2.0, 3.0], True)


def test_records_of_another_device_stay_there(tmp_path: Path) -> None:
    theirs, ours = Records(tmp_path / "theirs.db"), Records(tmp_path / "ours.db")
    _on("another CPU", theirs).add_kernel(SPEC, TARGET, KernelRecord(KNOBS, 1.0, [1.0], True))
    export_records(theirs, tmp_path / "a.jsonl")
    assert import_records(ours, tmp_path / "a.jsonl").added == 1
    assert ours.best_knobs(SPEC, TARGET) is None
    assert _on("another CPU", ours).best_knobs(SPEC, TARGET) == KNOBS


@pytest.mark.parametrize(
    ("here", "there", "kept"),
    [
        (KernelRecord(KNOBS, 5.0, [5.0] * 3, True), KernelRecord(KNOBS, 1.0, [1.0] * 2, True), True),
        (KernelRecord(KNOBS, 5.0, [5.0] * 3, True), KernelRecord(KNOBS, 1.0, [1.0] * 3, True), True),
        (KernelRecord(KNOBS, 5.0, [5.0] * 3, True), KernelRecord(KNOBS, 1.0, [1.0] * 4, True), False),
        (KernelRecord(KNOBS, 5.0, [5.0] * 3, True), KernelRecord(KNOBS, None, [], None, "crashed"), True),
        (KernelRecord(KNOBS, None, [], None, "crashed"), KernelRecord(KNOBS, 1.0, [1.0], True), False),
        (KernelRecord(KNOBS, 5.0, [5.0], False, "differs"), KernelRecord(KNOBS, 1.0, [1.0] * 9, True), True),
    ],
)
def test_a_worse_founded_record_replaces_none(
    here: KernelRecord, there: KernelRecord, kept: bool, tmp_path: Path
) -> None:
    ours, theirs = Records(tmp_path / "ours.db"), Records(tmp_path / "theirs.db")
    ours.add_kernel(SPEC, TARGET, here)
    theirs.add_kernel(SPEC, TARGET, there)
    export_records(theirs, tmp_path / "a.jsonl")
    assert import_records(ours, tmp_path / "a.jsonl") == (Imported(kept=1) if kept else Imported(replaced=1))
    assert ours.kernel(SPEC, TARGET, KNOBS) == (here if kept else there)


def _changed(line: str, **changes: Any) -> str:
    return json.dumps({**json.loads(line), **changes})


WRONG: dict[str, tuple[str, Callable[[str], str], str]] = {
    "no JSON": ("kernel", lambda line: line[:-2], "delimiter|Expecting"),
    "no object": ("kernel", lambda line: "[1]", "kind is one of"),
    "unknown kind": ("kernel", lambda line: _changed(line, kind="song"), "kind is one of"),
    "old version": ("kernel", lambda line: _changed(line, version=1), "version 1"),
    "unknown key": ("kernel", lambda line: _changed(line, colour="red"), "colour"),
    "missing key": ("kernel", lambda line: line.replace('"code"', '"cod"'), "cod, code"),
    "text as latency": ("kernel", lambda line: _changed(line, latency_us="2"), "latency_us is int or float or null"),
    "true as latency": ("model", lambda line: _changed(line, latency_us=True), "latency_us is"),
    "model without latency": ("model", lambda line: _changed(line, latency_us=None), "latency_us is a number"),
    "negative sample": ("kernel", lambda line: _changed(line, samples_us=[1.0, -1.0]), "finite positive"),
    "zero latency": ("model", lambda line: _changed(line, latency_us=0), "finite positive"),
    "infinite": ("model", lambda line: line.replace("5.0", "1e999"), "larger than any float"),
    "infinite time": (
        "model",
        lambda line: _changed(line, measured_at=1).replace(": 1}", ": 1e999}"),
        "larger than any float",
    ),
    "huge": ("model", lambda line: line.replace("5.0", "9" * 400), "too large"),
    "not a number": ("model", lambda line: line.replace("5.0", "NaN"), "NaN"),
    "sample of text": ("model", lambda line: _changed(line, samples_us=["1"]), "samples_us are numbers"),
    "chain of text": ("peak", lambda line: _changed(line, chain="1"), "chain is int"),
    "no peak": ("peak", lambda line: _changed(line, gmacs=0), "gmacs is finite and positive"),
    "nothing measured": ("kernel", lambda line: _changed(line, latency_us=None, error=None), "neither"),
    "knob of lists": ("kernel", lambda line: _changed(line, knobs={"tile": [1]}), "knobs are"),
    "lone surrogate": ("kernel", lambda line: _changed(line, operator="\ud800"), "surrogate"),
    "device changed": (
        "device",
        lambda line: line.replace('"cpu": "', '"cpu": "Better '),
        "is not that of this device",
    ),
    "device without flags": ("device", lambda line: line.replace("flags_digest", "digest"), "flags_digest"),
    "versions changed": ("toolchain", lambda line: line.replace('"llvm": "', '"llvm": "1'), "of these versions"),
    "number as version": ("toolchain", lambda line: _changed(line, versions={"llvm": 22}), "texts"),
}


@pytest.mark.parametrize("name", WRONG)
def test_one_wrong_line_imports_nothing(name: str, exported: Path, tmp_path: Path) -> None:
    kind, spoil, reason = WRONG[name]
    lines = exported.read_text().splitlines()
    index = max(i for i, line in enumerate(lines) if json.loads(line)["kind"] == kind)
    spoiled = spoil(lines[index])
    assert spoiled != lines[index]
    (tmp_path / "wrong.jsonl").write_text("\n".join([*lines[:index], spoiled, *lines[index + 1 :]]))
    records = Records(tmp_path / "target.db")
    empty = _content(records)
    with pytest.raises(DataError, match=reason) as caught:
        import_records(records, tmp_path / "wrong.jsonl")
    assert f"line {index + 1}:" in str(caught.value)
    assert _content(records) == empty


@pytest.mark.parametrize("kind", ["device", "toolchain"])
def test_a_record_of_nowhere(kind: str, exported: Path, tmp_path: Path) -> None:
    lines = [line for line in exported.read_text().splitlines() if json.loads(line)["kind"] != kind]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    records = Records(tmp_path / "target.db")
    empty = _content(records)
    with pytest.raises(DataError, match=f"line 2: there is no line for its {kind}"):
        import_records(records, tmp_path / "a.jsonl")
    assert _content(records) == empty


def test_export_of_one_device(tmp_path: Path) -> None:
    records = Records(tmp_path / "records.db")
    for cpu in ("Fast 1", "Fast 2", "Slow 1"):
        _on(cpu, records).add_kernel(SPEC, TARGET, KernelRecord(KNOBS, 1.0, [1.0], True))
    assert export_records(records, tmp_path / "a.jsonl", "fast") == 2
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert {row["info"]["cpu"] for row in rows if row["kind"] == "device"} == {"Fast 1", "Fast 2"}
    one = next(row["id"] for row in rows if row["kind"] == "device")
    assert export_records(records, tmp_path / "b.jsonl", one) == 1
    with pytest.raises(ConfigError, match="Slow 1"):
        export_records(records, tmp_path / "c.jsonl", "quick")


def test_what_somebody_made_up_does_not_break_a_build(exported: Path, tmp_path: Path) -> None:
    lines = exported.read_text().splitlines()
    index = next(i for i, line in enumerate(lines) if '"crashed"' in line)
    lines[index] = _changed(lines[index], knobs={"tile": "9x9x9"}, latency_us=0.1, samples_us=[0.1], error=None)
    (tmp_path / "made_up.jsonl").write_text("\n".join(lines))
    records = Records(tmp_path / "target.db")
    import_records(records, tmp_path / "made_up.jsonl")
    assert records.best_knobs(SPEC, TARGET) == KNOBS
