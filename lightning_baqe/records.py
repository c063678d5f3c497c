"""Share what was measured on a device: the records database as JSON lines.

    python -m lightning_baqe.records show
    python -m lightning_baqe.records export records.jsonl [--device "EPYC"]
    python -m lightning_baqe.records import records.jsonl

Kernels that somebody measured on the same device, with the same versions and the same generated code, are then not
measured again here; those of other devices are kept apart.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lightning_baqe.errors import BaqeError
from lightning_baqe.hardware.identity import device_info, device_key
from lightning_baqe.measurement.database import Records
from lightning_baqe.measurement.records_exchange import export_records, import_records

_OPERATORS = """
    SELECT operator, target, count(DISTINCT spec), sum(error IS NULL), sum(error IS NOT NULL), max(measured_at)
    FROM kernels WHERE device = ? AND toolchain = ? GROUP BY operator, target ORDER BY operator, target"""
_MODELS = "SELECT count(*), max(measured_at) FROM models WHERE device = ? AND toolchain = ?"
_PEAKS = """
    SELECT target, dot, chain, gmacs, max(measured_at) FROM peaks WHERE device = ? AND toolchain = ?
    GROUP BY target, dot, chain ORDER BY target, dot, chain"""  # SQLite: gmacs is of the row with the maximum
_PAIRS = """
    SELECT DISTINCT d.id, d.info, t.id, t.versions FROM devices d, toolchains t WHERE EXISTS
        (SELECT 1 FROM kernels WHERE device = d.id AND toolchain = t.id
         UNION ALL SELECT 1 FROM models WHERE device = d.id AND toolchain = t.id
         UNION ALL SELECT 1 FROM peaks WHERE device = d.id AND toolchain = t.id)
    ORDER BY d.id, t.id"""


def tables(records: Records) -> list[Table]:
    """For each device and toolchain one table of operators with their numbers of kernels, and models; and one of peaks.

    A peak is what one core's arithmetic reaches, in 1e9 multiply-accumulates a second; of those that were measured by
    several versions of this package the last one is shown. What is empty is left out.
    """
    found = []
    with records.reading() as connection:
        for device, info, chain, versions in connection.execute(_PAIRS).fetchall():
            about, key = json.loads(info), (device, chain)
            mark = ", this machine" if device == device_key(device_info(about["threads"])) else ""
            title = f"{about['cpu']}, {about['threads']} thread(s){mark}\n{device}; " + ", ".join(
                f"{name} {version}" for name, version in json.loads(versions).items()
            )
            kernels = _table(title, ("operator", "target"), ("shapes", "measured", "failed", "latest"))
            for operator, target, shapes, good, bad, latest in connection.execute(_OPERATORS, key):
                kernels.add_row(operator, _names(target), str(shapes), str(good), str(bad), _day(latest))
            models, latest = connection.execute(_MODELS, key).fetchone()
            if models:
                kernels.add_row("whole models", "", "", str(models), "", _day(latest))
            peaks = _table(f"{title}\npeaks of one core", ("arithmetic", "target"), ("chain", "GMAC/s", "latest"))
            for target, dot, steps, gmacs, latest in connection.execute(_PEAKS, key):
                peaks.add_row(dot, _names(target), str(steps), f"{gmacs:.1f}", _day(latest))
            found += [table for table in (kernels, peaks) if table.row_count]
    return found


def _table(title: str, texts: Sequence[str], figures: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in texts:
        table.add_column(column)
    for column in figures:
        table.add_column(column, justify="right")
    return table


def _names(target: str) -> str:
    return " ".join(map(str, json.loads(target).values()))


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0, or 2 when a file or the database cannot be read."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_baqe.records",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    database = argparse.ArgumentParser(add_help=False)
    database.add_argument("--database", type=Path, metavar="records.db", help="default: the user's")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("show", parents=[database], help="what there is")
    exporting = commands.add_parser("export", parents=[database], help="write records as JSON lines")
    exporting.add_argument("file", type=Path)
    exporting.add_argument("--device", metavar="TEXT", help="the beginning of a device's id, or part of its CPU's name")
    importing = commands.add_parser("import", parents=[database], help="read records, all of the file or nothing")
    importing.add_argument("file", type=Path)
    options = parser.parse_args(arguments)
    console = Console(highlight=False)
    try:
        records = Records(options.database)
        match options.command:
            case "show":
                for table in tables(records):
                    console.print(table)
                console.print(str(records.path), markup=False, soft_wrap=True)
            case "export":
                count = export_records(records, options.file, options.device)
                console.print(f"{count} records written to {options.file}", markup=False, soft_wrap=True)
            case "import":
                done = import_records(records, options.file)
                console.print(
                    f"{done.added} records added, {done.same} known already, {done.replaced} replaced by ones with "
                    f"more samples, {done.kept} left as they were: yours have as many samples or more",
                    soft_wrap=True,
                )
    except (BaqeError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
