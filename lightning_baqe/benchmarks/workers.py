"""Several processes on one study: every trial finished once, none twice, also when one of them is killed.

    python -m lightning_baqe.benchmarks.workers                       # an SQLite file, four processes, one is killed
    python -m lightning_baqe.benchmarks.workers --storage postgres    # a PostgreSQL server, started for it
    python -m lightning_baqe.benchmarks.workers --storage postgresql://user@host/database

The processes do what :class:`~lightning_baqe.callbacks.BayesianSearch` does with a study in mode ``beyond``; training
and measuring are replaced by a pause, the figures by those of a landscape. One process alone does the same first, for
comparison.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from rich.console import Console

from lightning_baqe.benchmarks import postgres
from lightning_baqe.benchmarks.setups import table_of
from lightning_baqe.errors import BaqeError
from lightning_baqe.landscapes.measured import Landscape
from lightning_baqe.quantization.config import BitConfig, LayerBits
from lightning_baqe.runs.liveness import PREFIX
from lightning_baqe.runs.study import AGAIN, FLOAT_FIGURES, INTERRUPTED, OWNER, RESULT, SearchStudy, bits_entry
from lightning_baqe.runs.summary import Figures, Trial
from lightning_baqe.search import BaqeSampler
from lightning_baqe.search.study_lock import study_lock
from lightning_baqe.tuning.network_space import NetworkSpace

NAME = "workers"  # of the study
LAYERS = 5
BITS = (4, 6, 8)
TILES = (1, 2, 4, 8)
FLOAT = Figures(accuracy=0.95, latency_us=1000.0, size_bytes=4000, spread=0.0, noisy=False)


def made_up_space() -> NetworkSpace:
    """Bits and one knob for each of a few layers."""
    names = [f"layer{i}" for i in range(LAYERS)]
    base = BitConfig(dict.fromkeys(names, LayerBits(8, 8)))
    return NetworkSpace(
        base,
        {name: BITS for name in names[1:-1]},
        {name: {"tile": TILES} for name in names},
        {name: {bits: {"tile": 4} for bits in BITS} for name in names},
    )


def made_up_figures(bits: BitConfig, schedules: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What a trial would have measured; later layers are more sensitive, each has a best tile."""
    widths = [layer.activation for layer in bits.values()]
    drops = [0.02 * (1 + i) / LAYERS * (8 - width) / 4 for i, width in enumerate(widths)]
    tiles = [abs(np.log2(schedules[name]["tile"]) - 1 - i % 2) for i, name in enumerate(bits)]
    return {
        "accuracy": 0.95 - sum(drops),
        "latency_us": 20.0 * sum(width * (1 + tile / 4) for width, tile in zip(widths, tiles, strict=True)) / LAYERS,
        "size_bytes": 100 * sum(widths),
    }


Answer = Callable[[BitConfig, Mapping[str, Mapping[str, Any]]], dict[str, Any]]


def job_of(landscape: str | None, initial: int) -> tuple[NetworkSpace, BaqeSampler, Figures, Answer]:
    """What the workers search: the bits of a landscape; None: something made up and small.

    Args:
        landscape: a shipped one, or a path.
        initial: trials of the initial design.

    Returns:
        the space, the sampler, the float model's figures, and a function from bits and schedules to a trial's figures.
    """
    pool = max(200, initial)
    if landscape is None:
        space = made_up_space()
        sampler = BaqeSampler(0, "paper", space.distributions, space.candidates, initial, pool)
        return space, sampler, FLOAT, made_up_figures
    found = Landscape.load(landscape)
    space = NetworkSpace(found.space.base, found.space.bit_choices, {}, found.space.defaults)
    sampler = BaqeSampler(
        0, "beyond", space.distributions, space.candidates, initial, pool,
        reference_point=found.reference_point, knowledge=found.knowledge(),
    )  # fmt: skip

    def figures(bits: BitConfig, schedules: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        point = found.at({leader: bits[leader].activation for leader in space.bit_choices})
        return {
            "accuracy": 1.0 - found.error(point),
            "latency_us": found.latency_us(point),
            "size_bytes": found.size_bytes(point),
        }

    return space, sampler, FLOAT.model_copy(update=dict(found.reference)), figures


def work(folder: str, storage: str, trials: int, pause_s: float, initial: int, landscape: str | None) -> None:
    """Be one worker, to the end of the study; arguments as for :func:`run`."""
    rng = np.random.default_rng(os.getpid())
    space, sampler, reference, answer = job_of(landscape, initial)
    study = SearchStudy(Path(folder), storage, {"recipe": NAME, "model": "none", "dataset": "none"}, name=NAME)

    def prepare() -> None:
        study.known_space({"space": space.record()})
        study.open(space, sampler)
        if study.float_result is None:
            study.keep(FLOAT_FIGURES, reference.record())

    study.alone(prepare)
    waited = proposing = 0.0
    done = 0
    while study.complete_count < trials:
        start = time.perf_counter()
        asked = study.ask(trials)
        if asked is None:
            time.sleep(0.05)
            waited += time.perf_counter() - start
            continue
        proposing += time.perf_counter() - start
        trial, phase = asked
        bits, schedules = space.point(trial.params)
        time.sleep(pause_s * rng.uniform(0.5, 1.5))
        figures = answer(bits, schedules)
        found = Trial(number=trial.number, phase=phase, bits=bits_entry(bits), schedules=schedules, **figures)
        study.tell(trial, found)
        study.write()
        done += 1
    report = {"trials": done, "asking_s": proposing, "idle_s": waited}
    (Path(folder) / f"worker_{os.getpid()}.json").write_text(json.dumps(report))
    study.close()


def run(
    folder: Path,
    storage: str,
    processes: int = 4,
    trials: int = 40,
    pause_s: float = 1.0,
    kill: bool = True,
    initial: int = 10,
    landscape: str | None = None,
) -> dict[str, Any]:
    """Let several processes finish one study and tell what is in it afterwards.

    Args:
        folder: an empty run folder.
        storage: URL of the database; its study ``workers`` must not exist.
        processes: workers at once.
        trials: complete trials to reach.
        pause_s: mean length of a trial, seconds.
        kill: send SIGKILL to one that is in the middle of a trial, once a quarter of the trials is complete.
        initial, landscape: of :func:`job_of`.

    Raises:
        BaqeError: a process failed by itself.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__ if __name__ != "__main__" else "lightning_baqe.benchmarks.workers"])
    target: Any = work
    if __name__ == "__main__":
        from lightning_baqe.benchmarks.workers import work as target  # by a name that the others can import
    start = time.perf_counter()
    workers = [
        context.Process(target=target, args=(str(folder), storage, trials, pause_s, initial, landscape))
        for _ in range(processes)
    ]
    for worker in workers:
        worker.start()
    victim, study, database = None, None, None
    while any(worker.is_alive() for worker in workers):
        database = database or _database(storage)
        study = study or (_study(database) if kill and database is not None else None)
        if study is not None and victim is None:
            victim = _kill_one(study, trials // 4, workers)
        time.sleep(0.1)
    seconds = time.perf_counter() - start
    failed = [worker.exitcode for worker in workers if worker.exitcode and worker is not victim]
    if failed:
        raise BaqeError(f"{len(failed)} of {processes} workers failed by themselves, with {failed}")
    assert database is not None
    try:
        return {"processes": processes, "killed": victim is not None, "seconds": seconds, **_look(folder, database)}
    finally:
        database.engine.dispose()  # psycopg warns of connections that nobody closed


def _database(storage: str) -> RDBStorage | None:
    """The database, None as long as an SQLite file is not there."""
    if storage.startswith("sqlite:///") and not Path(storage.removeprefix("sqlite:///")).exists():
        return None
    with study_lock(storage, "tables"):  # a worker may be creating them
        return RDBStorage(storage)


def _study(database: RDBStorage) -> optuna.Study | None:
    """The workers' study, None as long as there is none; opened once, as it keeps the complete trials that it read."""
    if NAME not in [study.study_name for study in database.get_all_studies()]:
        return None
    return optuna.load_study(study_name=NAME, storage=database)


def _kill_one(study: optuna.Study, after: int, workers: Sequence[Any]) -> Any | None:
    """Kill a worker that is in the middle of a trial, if enough trials are complete."""
    if len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))) < after:
        return None
    attributes = study.user_attrs
    for trial in reversed(study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))):  # began last
        record = attributes.get(f"{PREFIX}{trial.user_attrs.get(OWNER)}")
        victim = next((w for w in workers if record is not None and w.pid == record["pid"]), None)
        if victim is not None:
            os.kill(victim.pid, signal.SIGKILL)
            victim.join()
            return victim
    return None


def _look(folder: Path, database: RDBStorage) -> dict[str, Any]:
    trials = optuna.load_study(study_name=NAME, storage=database).get_trials(deepcopy=False)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    interrupted = [t for t in trials if t.user_attrs.get(RESULT, {}).get("error") == INTERRUPTED]
    again = {trial.user_attrs[AGAIN] for trial in complete if AGAIN in trial.user_attrs}
    reports = [json.loads(path.read_text()) for path in folder.glob("worker_*.json")]
    return {
        "complete": len(complete),
        "duplicates": len(complete) - len({json.dumps(trial.params, sort_keys=True) for trial in complete}),
        "interrupted": len(interrupted),
        "lost": len({trial.number for trial in interrupted} - again),
        "others": len(trials) - len(complete) - len(interrupted),
        "gaps": len(trials) - 1 - max(trial.number for trial in trials),
        "by_worker": sorted((report["trials"] for report in reports), reverse=True),
        "asking_s": sum(report["asking_s"] for report in reports),
        "idle_s": sum(report["idle_s"] for report in reports),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what one and what several processes did. Returns the exit status: 1 if a trial was lost or done twice."""
    parser = argparse.ArgumentParser(prog="python -m lightning_baqe.benchmarks.workers")
    parser.add_argument("--storage", default="sqlite", help="sqlite, postgres (starts a server), or a URL")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--initial", type=int, default=10, help="trials of the initial design")
    parser.add_argument("--pause", type=float, default=2.0, help="mean length of a trial, seconds")
    parser.add_argument("--landscape", default="mobilenet_v2_glyphs", help="that answers: a shipped one, or a path")
    parser.add_argument("--json", type=Path, help="write the figures to a file")
    options = parser.parse_args(arguments)
    if options.storage not in ("sqlite", "postgres") and "://" not in options.storage:
        parser.error(f"--storage is sqlite, postgres or a database's URL, got {options.storage!r}")
    rows = []
    with ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for processes in (1, options.processes):
            folder = base / str(processes)
            storage = options.storage
            if storage == "postgres":
                storage = stack.enter_context(postgres.server()).url
            elif storage == "sqlite":
                folder.mkdir()
                storage = f"sqlite:///{folder / 'study.db'}"
            rows.append(
                run(folder, storage, processes, options.trials, options.pause, processes > 1, options.initial,
                    options.landscape)
            )  # fmt: skip
            if "://" in options.storage:
                optuna.delete_study(study_name=NAME, storage=storage)
    title = f"{options.trials} trials of {options.pause:g} s on {options.landscape}, {options.storage}"
    cells = ([f"{value:.1f}" if isinstance(value, float) else value for value in row.values()] for row in rows)
    Console(width=160).print(table_of(title, [name.replace("_", " ") for name in rows[0]], rows=cells))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return int(any(row["complete"] != options.trials or row["duplicates"] or row["lost"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
