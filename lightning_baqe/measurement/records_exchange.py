"""Records as JSON lines, so that people can share what they measured on a device.

Every line is an object with its ``kind`` and the ``version`` of the format, so that files may be joined, sorted and
filtered by lines. Kernels and models name their device and toolchain by id; the lines of those say what they are.

The other keys of a kind are its columns in :data:`~lightning_baqe.measurement.records_tables.KINDS`; what is JSON text
there is an object or a list here, and ``exact`` is true, false or null.

Records of other devices are kept under their own device and never taken for this one's.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lightning_baqe.errors import ConfigError, DataError
from lightning_baqe.files import MIB, parse_json, replace_file
from lightning_baqe.hardware.identity import device_key, digest
from lightning_baqe.measurement.database import KernelRecord, Records, check_latencies
from lightning_baqe.measurement.records_tables import KINDS, VERSION

_JSON_COLUMNS = ("info", "versions", "target", "spec", "knobs", "samples_us")
_MOST_BYTES = 16 * MIB  # of a line
_MEASURED = ("kernel", "model", "peak")
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("id", "device", "toolchain", "operator", "code", "plan", "dot"), (str,)),
    **dict.fromkeys(("info", "versions", "target", "spec", "knobs"), (dict,)),
    "latency_us": (int, float, type(None)),
    "samples_us": (list,),
    "exact": (bool, type(None)),
    "error": (str, type(None)),
    "measured_at": (int, float),
    "chain": (int,),
    "gmacs": (int, float),
}
_SCALARS = (str, int, float, bool)


@dataclass
class Imported:
    """What an import did, in lines.

    Args:
        added: records that were new.
        replaced: records that had fewer samples than the file's.
        kept: records that had at least as many, or whose result was found wrong; the file's differ and were left.
        same: records that the database already had.
    """

    added: int = 0
    replaced: int = 0
    kept: int = 0
    same: int = 0


def matching_devices(records: Records, text: str) -> list[str]:
    """Ids of the devices whose id begins with a text, or whose CPU's name holds it; ConfigError where there is none."""
    with records.reading() as connection:
        rows = connection.execute("SELECT id, info FROM devices ORDER BY id").fetchall()
    known = {key: json.loads(info)["cpu"] for key, info in rows}
    found = [key for key, cpu in known.items() if key.startswith(text) or text.lower() in cpu.lower()]
    if not found:
        names = "; ".join(f"{key} {cpu}" for key, cpu in known.items()) or "none"
        raise ConfigError(f"{records.path} knows no device {text!r}: give the beginning of an id, or of {names}")
    return found


def export_records(records: Records, path: Path, device: str | None = None) -> int:
    """Write records as JSON lines; the file is replaced in one step. Returns how many kernels, models and peaks were
    written.

    ``device``: only of devices that :func:`matching_devices` finds, ConfigError where there is none; None: of all.
    """
    devices = None if device is None else set(matching_devices(records, device))
    with records.reading() as connection:
        connection.execute("BEGIN")  # one state of the database, whoever writes meanwhile
        rows = [row for kind in _MEASURED for row in _rows(connection, kind)]
        rows = [row for row in rows if devices is None or row["device"] in devices]
        for kind in ("toolchain", "device"):
            used = {row[kind] for row in rows if kind in row}
            rows = [row for row in _rows(connection, kind) if row["id"] in used] + rows
    text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    replace_file(path, text.encode())
    return sum(row["kind"] in _MEASURED for row in rows)


def import_records(records: Records, path: Path) -> Imported:
    """Read what :func:`export_records` wrote, all of it or, if one line is wrong, nothing.

    A record is replaced only by one with more samples; one whose result was found wrong here stays.

    Raises:
        DataError: a line that is no record; the message names it.
        OSError: the file cannot be read.
    """
    if not path.is_file():
        raise DataError(f"{path} is no file: give one that export_records wrote")  # a pipe may have no end
    with path.open("rb") as file:
        rows = list(_parsed(file, path))
    done = Imported()
    with records.transaction() as connection:
        for kind in ("device", "toolchain"):
            for _, row in rows:
                if row["kind"] == kind:
                    KINDS[kind].insert(connection, _values(row, KINDS[kind].columns), "IGNORE")
        for number, row in rows:
            if row["kind"] in _MEASURED:
                _check_references(connection, row, f"{path}, line {number}")
                _merge(connection, row, done)
    return done


def _rows(connection: sqlite3.Connection, kind: str) -> Iterator[dict[str, Any]]:
    columns = KINDS[kind].columns
    query = f"SELECT {', '.join(columns)} FROM {KINDS[kind].table} ORDER BY {', '.join(KINDS[kind].key)}"
    for values in connection.execute(query):
        row = {"kind": kind, "version": VERSION, **dict(zip(columns, values, strict=True))}
        for name in _JSON_COLUMNS:
            if name in row:
                row[name] = json.loads(row[name])
        if row.get("exact") is not None:
            row["exact"] = bool(row["exact"])
        yield row


def _values(row: Mapping[str, Any], columns: Iterable[str]) -> tuple[Any, ...]:
    """A row's values as the database holds them."""
    texts = {name: json.dumps(row[name], sort_keys=True) for name in _JSON_COLUMNS if name in row}
    return tuple(texts.get(name, row[name]) for name in columns)


def _merge(connection: sqlite3.Connection, row: dict[str, Any], done: Imported) -> None:
    kind = KINDS[row["kind"]]
    known = kind.find(connection, _values(row, kind.key))
    if known == _values(row, kind.figures):
        done.same += 1
        return
    if known is None:
        done.added += 1
    else:
        here = dict(zip(kind.figures, known, strict=True))
        if here.get("exact") == 0 or len(json.loads(here.get("samples_us", "[]"))) >= len(row.get("samples_us", ())):
            done.kept += 1
            return
        done.replaced += 1
    kind.insert(connection, _values(row, kind.columns))


def _check_references(connection: sqlite3.Connection, row: Mapping[str, Any], where: str) -> None:
    for kind in ("device", "toolchain"):
        if KINDS[kind].find(connection, (row[kind],)) is None:
            raise DataError(f"{where}: there is no line for its {kind} {row[kind]!r}; export the records again")


# --- checks of one line -------------------------------------------------------------------------------------------


def _parsed(file: BinaryIO, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    while line := file.readline(_MOST_BYTES + 1):
        number += 1
        name = f"{path}, line {number}"
        if not line.strip():
            continue
        if len(line) > _MOST_BYTES:
            raise DataError(f"{name}: more than {_MOST_BYTES} bytes, no record has that many; nothing was imported")
        try:
            row = parse_json(line, f"{name}: it")
            _check(row)
        except (DataError, ConfigError, OverflowError) as error:  # of whole numbers beyond floats
            text = str(error) if isinstance(error, DataError) else f"{name}: {error}"
            raise DataError(f"{text}; nothing was imported") from error
        yield number, row


def _check(row: Any) -> None:
    """Check one line; ConfigError says what is wrong with it."""
    if not isinstance(row, dict) or row.get("kind") not in KINDS:
        raise ConfigError(f"a line is an object whose kind is one of {', '.join(KINDS)}")
    if row.get("version") != VERSION:
        raise ConfigError(f"it has version {row.get('version')!r} of the format, this package reads {VERSION}")
    columns = KINDS[row["kind"]].columns
    wrong = sorted(set(row) ^ {"kind", "version", *columns})
    if wrong:
        raise ConfigError(f"a {row['kind']} has the keys {', '.join(columns)}; missing or unknown: {', '.join(wrong)}")
    for name in columns:
        value = row[name]
        if not isinstance(value, _TYPES[name]) or (isinstance(value, bool) and bool not in _TYPES[name]):
            wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in _TYPES[name])
            raise ConfigError(f"{name} is {wanted}, got {value!r}")
    _check_content(row)


def _check_content(row: Mapping[str, Any]) -> None:
    """Check what a line with all keys and the right types says; raises as :func:`_check`."""
    match row["kind"]:
        case "device":
            info = row["info"]
            missing = {"cpu", "machine", "system", "flags_digest", "threads"} - set(info)
            if missing or not isinstance(info["cpu"], str):
                raise ConfigError(f"the info of a device lacks {sorted(missing) or 'a name of its CPU'}")
            if device_key(info) != row["id"]:
                raise ConfigError(f"the id {row['id']!r} is not that of this device, {device_key(info)!r}")
        case "toolchain":
            if not all(isinstance(value, str) for value in row["versions"].values()):
                raise ConfigError(f"versions are texts, got {row['versions']!r}")
            if digest(row["versions"]) != row["id"]:
                raise ConfigError(f"the id {row['id']!r} is not that of these versions, {digest(row['versions'])!r}")
        case "kernel":
            if not all(isinstance(value, _SCALARS) for value in row["knobs"].values()):
                raise ConfigError(f"knobs are texts and numbers, got {row['knobs']!r}")
            _check_samples(row)
            KernelRecord(row["knobs"], row["latency_us"], row["samples_us"], row["exact"], row["error"])
        case "model":
            if row["latency_us"] is None:
                raise ConfigError("latency_us is a number, got None")
            _check_samples(row)
            check_latencies(row["latency_us"], row["samples_us"])
        case "peak":
            if not (math.isfinite(row["gmacs"]) and row["gmacs"] > 0):
                raise ConfigError(f"gmacs is finite and positive, got {row['gmacs']}")


def _check_samples(row: Mapping[str, Any]) -> None:
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in row["samples_us"]):
        raise ConfigError(f"samples_us are numbers, got {row['samples_us']!r}")
