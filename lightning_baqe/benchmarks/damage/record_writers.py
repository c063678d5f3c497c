"""Several processes that write one records database as fast as they can, while another reads it.

Each adds records of networks, every one its own, and peaks of one kernel, of which the highest is to be kept. All of it
has to be there in the end, once, and no call may take longer than the second that a run waits for its records.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lightning_baqe.errors import BaqeError
from lightning_baqe.hardware.target import get_target
from lightning_baqe.measurement.database import Records

PATIENCE_S = 1.0  # that the records may delay a run by


def write(path: str, report: str, writer: int, writers: int, count: int) -> None:
    """Be one writer; tell its longest call, seconds, and what it could not write."""
    records, target, longest = Records(path), get_target("portable"), 0.0

    def timed(call: Callable[[], Any]) -> None:
        nonlocal longest
        start = time.perf_counter()
        call()
        longest = max(longest, time.perf_counter() - start)

    records.peak(target, "made up", 1)  # what is found out once in a process is not the database's delay
    for number in range(count):
        latency_us = float(1 + writer + writers * number)
        timed(partial(records.add_model, _name(writer, number), 1, [latency_us], latency_us))
        timed(partial(records.add_peak, target, "made up", 1, latency_us))
        timed(partial(records.model, _name(writer, number), 1))
    pending = records.flush()
    Path(report).write_text(json.dumps({"longest_s": longest, "pending": pending}))


def write_at_once(folder: Path, writers: int = 8, count: int = 50) -> dict[str, Any]:
    """Let several processes write, and tell what is there in the end.

    Args:
        folder: for the database and what they report.
        writers: processes.
        count: records of networks of each, and as many peaks.

    Raises:
        BaqeError: a process failed.
    """
    path = folder / "records.db"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning_baqe.measurement.database"])
    reports = [folder / f"writer_{writer}.json" for writer in range(writers)]
    start = time.perf_counter()
    processes = [
        context.Process(target=write, args=(str(path), str(report), writer, writers, count))
        for writer, report in enumerate(reports)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    seconds = time.perf_counter() - start
    if any(process.exitcode for process in processes):
        raise BaqeError(f"writers of records failed, with {[process.exitcode for process in processes]}")
    told = [json.loads(report.read_text()) for report in reports]
    records = Records(path)
    wanted = {_name(writer, n): float(1 + writer + writers * n) for writer in range(writers) for n in range(count)}
    with records.reading() as connection:
        rows = connection.execute("SELECT plan, latency_us FROM models").fetchall()
    found = dict(rows)
    return {
        "writers": writers,
        "seconds": round(seconds, 1),
        "wanted": len(wanted),
        "lost": sum(found.get(name) != latency for name, latency in wanted.items()),
        "doubled": len(rows) - len(found),
        "not written": sum(one["pending"] for one in told),
        "highest peak": records.peak(get_target("portable"), "made up", 1),
        "longest call s": round(max(one["longest_s"] for one in told), 3),
    }


def are_right(found: Mapping[str, Any]) -> bool:
    """Whether nothing was lost or is there twice, the highest peak was kept, and no call took too long."""
    right = not found["lost"] and not found["doubled"] and found["highest peak"] == float(found["wanted"])
    return right and found["longest call s"] <= PATIENCE_S


def _name(writer: int, number: int) -> str:
    return f"writer {writer}, network {number}"
