"""What damaged and hostile files do: ``python -m lightning_baqe.benchmarks.damage.malformed``.

Each format that the package reads is written once, as a run writes it, and then spoiled in many ways: bytes, values of
JSON, entries of archives, pickles that would run a command. Each spoiled file is read as users' code reads it, in a
process of its own format that another watches.

| outcome | means |
| --- | --- |
| refused | one of our errors, naming the file |
| read | no error: what was changed has another meaning, or none |
| traceback | another exception |
| signal | the process died |
| hang | no answer in half a minute, or more than 4 GiB taken |
| executed | code of the file ran, a program was started, or a file outside of the folder was written |
| differs | a graph that was let in computes one thing interpreted and another compiled |

Only the first two are right.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from collections import Counter
from pathlib import Path

import numpy as np

from lightning_baqe.benchmarks.damage.formats import FORMATS
from lightning_baqe.benchmarks.damage.watched import LIMIT_S, OUTCOMES, RIGHT, limit_memory, outcome_of, start_watch
from lightning_baqe.benchmarks.setups import console_of, parser_of, table_of
from lightning_baqe.hardware.identity import device_info

START_S = 300  # to import, and to write the format's files
_RESULT = "row: "

Row = tuple[str, str, str]  # what was done, outcome, what was said


def run_format(name: str, first: int, most: int | None, seed: int) -> None:
    """Print a row for each spoiled file from the ``first`` on; ends with the process if a file kills it."""
    warnings.simplefilter("ignore")
    sys.dont_write_bytecode = True  # what imports write is not the file's doing
    form = FORMATS[name]
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        good = Path(scratch, "good")
        good.mkdir()
        form.write(good)
        kept = sorted(path.name for path in Path(scratch).iterdir())
        form.read(Path(shutil.copytree(good, Path(scratch, "once"))))  # what is imported then may start what it likes
        shutil.rmtree(Path(scratch, "once"))
        start_watch()
        undamaged = outcome_of(form.read, Path(shutil.copytree(good, Path(scratch, "first"))))
        if undamaged != ("read", ""):
            raise RuntimeError(f"{name}: an undamaged file is not read: {undamaged}")
        shutil.rmtree(Path(scratch, "first"))
        limit_memory()
        ways = list(form.spoil((good / form.file).read_bytes(), np.random.default_rng(seed)))
        chosen = range(len(ways)) if most is None else np.linspace(0, len(ways) - 1, min(most, len(ways)), dtype=int)
        for number in (int(n) for n in chosen if n >= first):
            what, spoil = ways[number]
            print(f"{_RESULT}{json.dumps([number, what, 'signal', ''])}", flush=True)  # until it is known better
            folder = Path(shutil.copytree(good, Path(scratch, "spoiled")))
            spoil(folder / form.file)
            form.repair(folder)
            found, said = outcome_of(form.read, folder)
            shutil.rmtree(folder)
            if sorted(path.name for path in Path(scratch).iterdir()) != kept:
                found, said = "executed", "there is a file that was not there"
            print(f"{_RESULT}{json.dumps([number, what, found, said[:400]])}", flush=True)


def _go_on(name: str, most: int | None, seed: int, rows: dict[int, Row]) -> bool:
    """Add the rows of one process, to the end or to the file that ended it; says whether it came to the end.

    This process keeps the time: the other's alarm is not heard in native code.
    """
    first = max(rows, default=-1) + 1
    call = f"run_format({name!r}, {first}, {most}, {seed})"
    code = f"from lightning_baqe.benchmarks.damage.malformed import run_format; {call}"
    command = [sys.executable, "-c", code]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        lines: queue.Queue[str | None] = queue.Queue()

        def collect() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=collect, daemon=True).start()
        number, hangs = None, False
        while (line := _next(lines, START_S if number is None else 2 * LIMIT_S)) is not None:
            if line == "":
                process.kill()
                hangs = True
            elif line.startswith(_RESULT):
                number, *row = json.loads(line.removeprefix(_RESULT))
                rows[number] = tuple(row)
        if process.wait() == 0:
            return True
        errors.seek(0)
        if number is None:
            raise RuntimeError(f"{name}: {errors.read()[-2000:]}")
        if hangs:
            rows[number] = (rows[number][0], "hang", f"no answer in {2 * LIMIT_S} s, in native code")
        return False


def _next(lines: queue.Queue[str | None], most_s: float) -> str | None:
    """The next line, None at the end, empty where none came in time."""
    try:
        return lines.get(timeout=most_s)
    except queue.Empty:
        return ""


def rows_of(name: str, most: int | None, seed: int) -> list[Row]:
    """All spoiled files of a format, or ``most`` of them, spread over all."""
    rows: dict[int, Row] = {}
    while not _go_on(name, most, seed, rows):
        pass
    return list(rows.values())


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status: 1 unless all outcomes are right."""
    parser = parser_of(__doc__)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--most", type=int, help="spoiled files of each format, spread over all; default: all")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    console = console_of(160)
    console.print(device_info()["cpu"])
    cells, wrong = [], 0
    for name in options.formats:
        rows = rows_of(name, options.most, options.seed)
        counts = Counter(outcome for _, outcome, _ in rows)
        cells.append([name, len(rows), *(counts[outcome] or "" for outcome in OUTCOMES)])
        for what, outcome, said in rows:
            if outcome not in RIGHT:
                wrong += 1
                console.print(f"{name}: {what}: {outcome}: {said}", markup=False)
        console.print(f"{name}: {len(rows)} files, {sum(counts[outcome] for outcome in RIGHT)} right")
    total = sum(int(row[1]) for row in cells)
    console.print(table_of(f"{total} spoiled files", ("format", "files", *OUTCOMES), ("format",), cells))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
