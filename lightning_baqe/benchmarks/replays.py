"""Many runs in several processes, each kept as soon as it has ended."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import optuna
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lightning_baqe.files import Rows

Key = tuple[Any, ...]


def _start_worker() -> None:
    # One thread each: processes, not threads, fill the cores, and figures do not depend on how many there are.
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def fill(
    rows: Rows,
    names: Sequence[str],
    wanted: Sequence[Key],
    task: Callable[..., dict[str, Any]],
    jobs: int,
    console: Console,
    title: str,
) -> None:
    """Run what is not in the file yet, in the given order.

    Args:
        rows: the file.
        names: the fields of a row that tell runs apart.
        wanted: the values of these fields, one tuple a run.
        task: values of the fields -> the rest of the row; a function of a module, as other processes call it.
        jobs: processes; 1 is this one.
        console: for the progress bar.
        title: of the bar.
    """
    known = {tuple(row[name] for name in names) for row in rows.read()}
    missing = [key for key in wanted if key not in known]
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        shown = bar.add_task(title, total=len(wanted), completed=len(wanted) - len(missing))
        for key, rest in _here(missing, task) if jobs == 1 else _elsewhere(missing, task, jobs):
            rows.append({**dict(zip(names, key, strict=True)), **rest})
            bar.advance(shown)


def _here(missing: Sequence[Key], task: Callable[..., dict[str, Any]]) -> Iterator[tuple[Key, dict[str, Any]]]:
    threads, verbosity = torch.get_num_threads(), optuna.logging.get_verbosity()
    _start_worker()
    try:
        for key in missing:
            yield key, task(*key)
    finally:
        torch.set_num_threads(threads)
        optuna.logging.set_verbosity(verbosity)


def _elsewhere(
    missing: Sequence[Key], task: Callable[..., dict[str, Any]], jobs: int
) -> Iterator[tuple[Key, dict[str, Any]]]:
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _start_worker) as pool:
        futures = {pool.submit(task, *key): key for key in missing}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # an error or Ctrl-C: what has ended is in the file
