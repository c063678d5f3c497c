"""Several processes on one study: every trial finished once, none twice, whatever befalls them.

    python -m lightning_baqe.benchmarks.workers                       # an SQLite file, four processes
    python -m lightning_baqe.benchmarks.workers --storage postgres    # a PostgreSQL server, started for it
    python -m lightning_baqe.benchmarks.workers --storage postgresql://user@host/database
    python -m lightning_baqe.benchmarks.workers --trouble stop clock  # some of the troubles; by default all

The processes do what :class:`~lightning_baqe.callbacks.BayesianSearch` does with a study in mode ``beyond``; training
and measuring are replaced by a pause, the figures by those of a landscape. ``none`` is one process alone, for
comparison; :mod:`~lightning_baqe.benchmarks.damage.troubles` says what the others are. ``records`` is another
question: eight processes write one records database.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
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
from lightning_baqe.benchmarks.damage import troubles
from lightning_baqe.benchmarks.damage.record_writers import are_right as records_are_right
from lightning_baqe.benchmarks.damage.record_writers import write_at_once
from lightning_baqe.benchmarks.setups import parser_of, table_of
from lightning_baqe.errors import BaqeError
from lightning_baqe.landscapes.measured import Landscape
from lightning_baqe.quantization.config import BitConfig, LayerBits
from lightning_baqe.runs.study import AGAIN, FLOAT_FIGURES, INTERRUPTED, RESULT, SearchStudy, bits_entry
from lightning_baqe.runs.study_storage import open_storage
from lightning_baqe.runs.summary import Figures, Trial
from lightning_baqe.search import BaqeSampler
from lightning_baqe.search.patience import watch
from lightning_baqe.search.study_sampler import POINT_KEY
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
    troubles.follow_the_clock()
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
        troubles.stop_where_asked(Path(folder), study.alone)
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
    folder: Path | str,
    storage: str,
    trouble: str | None = None,
    processes: int = 4,
    trials: int = 40,
    pause_s: float = 1.0,
    initial: int = 10,
    landscape: str | None = None,
    stop_s: float = 60.0,
    server: postgres.Server | None = None,
) -> dict[str, Any]:
    """Let several processes finish one study and tell what is in it afterwards.

    Args:
        folder: an empty run folder.
        storage: URL of the database; its study ``workers`` must not exist.
        trouble: what befalls them, of :data:`~lightning_baqe.benchmarks.damage.troubles.TROUBLES`; None: nothing.
        processes: workers at once.
        trials: complete trials to reach.
        pause_s: mean length of a trial, seconds.
        initial, landscape: of :func:`job_of`.
        stop_s: seconds that a worker is stopped for.
        server: of the storage, where it is to be restarted.

    Raises:
        BaqeError: a process failed by itself.
        ConfigError: the trouble ``clock`` wants libfaketime, which is not installed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if trouble == "clock" and not troubles.is_under_another_clock():
        arguments: dict[str, Any] = {
            "folder": str(folder), "storage": storage, "trouble": trouble, "processes": processes, "trials": trials,
            "pause_s": pause_s, "initial": initial, "landscape": landscape,
        }  # fmt: skip
        row: dict[str, Any] = troubles.under_another_clock("lightning_baqe.benchmarks.workers.run", **arguments)
        return row
    troubles.follow_the_clock()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning_baqe.runs.study", "lightning_baqe.benchmarks.damage.troubles"])
    start = time.perf_counter()
    workers = [
        context.Process(target=work, args=(str(folder), storage, trials, pause_s, initial, landscape))
        for _ in range(processes)
    ]
    for worker in workers:
        worker.start()
    scene, goes_on, database = None, None, None
    try:
        while any(worker.is_alive() for worker in workers):
            database = database or _database(storage)
            study = _study(database) if scene is None and database is not None else None
            if study is not None:
                scene = troubles.Scene(folder, study, trials, workers, stop_s, server)
                goes_on = troubles.TROUBLES[trouble](scene) if trouble is not None else None
            if goes_on is not None:
                next(goes_on, None)
            time.sleep(0.1)
        seconds = time.perf_counter() - start
        killed = [] if scene is None else scene.killed
        failed = [worker.exitcode for worker in workers if worker.exitcode and worker not in killed]
        if failed:
            raise BaqeError(f"{len(failed)} of {processes} workers failed by themselves, with {failed}")
        assert database is not None
        assert scene is not None
        return {
            "trouble": trouble or "none",
            "processes": processes,
            "happened": scene.happened,
            "seconds": seconds,
            **_look(folder, database),
        }
    finally:
        if goes_on is not None:
            goes_on.close()  # nobody stays stopped
        if database is not None:
            database.engine.dispose()  # psycopg warns of connections that nobody closed


def _database(storage: str) -> RDBStorage | None:
    """The database, None as long as an SQLite file is not there."""
    if storage.startswith("sqlite:///") and not Path(storage.removeprefix("sqlite:///")).exists():
        return None
    database = open_storage(storage)
    watch(database.engine)
    return database


def _study(database: RDBStorage) -> optuna.Study | None:
    """The workers' study, None as long as there is none; opened once, as it keeps the complete trials that it read."""
    if NAME not in [study.study_name for study in database.get_all_studies()]:
        return None
    return optuna.load_study(study_name=NAME, storage=database)


def _look(folder: Path, database: RDBStorage) -> dict[str, Any]:
    trials = optuna.load_study(study_name=NAME, storage=database).get_trials(deepcopy=False)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    interrupted = [t for t in trials if t.user_attrs.get(RESULT, {}).get("error") == INTERRUPTED]
    had_points = [t for t in interrupted if t.params or {"fixed_params", POINT_KEY} & t.system_attrs.keys()]
    again = {trial.user_attrs.get(AGAIN) for trial in trials}
    reports = [json.loads(path.read_text()) for path in folder.glob("worker_*.json")]
    return {
        "complete": len(complete),
        "doubled": len(complete) - len({json.dumps(trial.params, sort_keys=True) for trial in complete}),
        "interrupted": len(interrupted),
        "lost": len({trial.number for trial in had_points} - again),
        "others": len(trials) - len(complete) - len(interrupted),
        "gaps": len(trials) - 1 - max(trial.number for trial in trials),
        "by_worker": sorted((report["trials"] for report in reports), reverse=True),
        "asking_s": sum(report["asking_s"] for report in reports),
        "idle_s": sum(report["idle_s"] for report in reports),
    }


def _is_right(row: Mapping[str, Any], trials: int) -> bool:
    return row["complete"] == trials and not row["doubled"] and not row["lost"]


def _troubles_for(storage: str) -> list[str]:
    """What can be done here; what cannot is said."""
    found = ["none", *troubles.TROUBLES, "records"]
    if storage != "postgres":
        found.remove("restart")  # of a server that is not ours, or of none
    if lacking := troubles.missing():
        found.remove("clock")
        print(f"the trouble clock is left out: {lacking}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what befell the workers and what is in their studies. Returns the exit status: 1 if a trial or record was
    lost or done twice, or a call of the records took more than a second.
    """
    parser = parser_of(__doc__)
    known = ["none", *troubles.TROUBLES, "records"]
    parser.add_argument("--storage", default="sqlite", help="sqlite, postgres (starts a server), or a URL")
    parser.add_argument("--trouble", nargs="+", choices=known, help="by default all that can be done here")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--initial", type=int, default=10, help="trials of the initial design")
    parser.add_argument("--pause", type=float, default=2.0, help="mean length of a trial, seconds")
    parser.add_argument("--stop-s", type=float, default=60.0, help="seconds that a worker is stopped for")
    parser.add_argument("--writers", type=int, default=8, help="processes that write records")
    parser.add_argument("--records", type=int, default=50, help="records that each of them writes")
    parser.add_argument("--landscape", default="mobilenet_v2_glyphs", help="that answers: a shipped one, or a path")
    parser.add_argument("--json", type=Path, help="write the figures to a file")
    options = parser.parse_args(arguments)
    if options.storage not in ("sqlite", "postgres") and "://" not in options.storage:
        parser.error(f"--storage is sqlite, postgres or a database's URL, got {options.storage!r}")
    wanted = options.trouble or _troubles_for(options.storage)
    if "restart" in wanted and options.storage != "postgres":
        parser.error(f"--trouble restart is for --storage postgres, got {options.storage!r}")
    if "clock" in wanted and troubles.missing():
        parser.error(f"--trouble clock: {troubles.missing()}")
    rows = []
    console = Console(width=160)
    with tempfile.TemporaryDirectory() as base:
        for name in [name for name in wanted if name != "records"]:
            rows.append(_row(name, Path(base) / name, options))
        written = write_at_once(Path(base), options.writers, options.records) if "records" in wanted else None
    if rows:
        title = f"{options.trials} trials of {options.pause:g} s on {options.landscape}, {options.storage}"
        cells = ([f"{value:.1f}" if isinstance(value, float) else value for value in row.values()] for row in rows)
        headings = [name.replace("_", " ") for name in rows[0]]
        console.print(table_of(title, headings, ("trouble",), cells))
    if written is not None:
        title = f"{options.writers} processes write {options.records} records each"
        console.print(table_of(title, [name.replace("_", " ") for name in written], (), [written.values()]))
    if options.json:
        options.json.write_text(json.dumps({"workers": rows, "records": written}, indent=1))
    right = all(_is_right(row, options.trials) for row in rows) and (written is None or records_are_right(written))
    return int(not right)


def _row(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One run of the workers, on a database of its own."""
    with ExitStack() as stack:
        server, storage = None, options.storage
        if storage == "postgres":
            server = stack.enter_context(postgres.server())
            storage = server.url
        elif storage == "sqlite":
            folder.mkdir()
            storage = f"sqlite:///{folder / 'study.db'}"
        trouble, processes = (None, 1) if name == "none" else (name, options.processes)
        row = run(
            folder, storage, trouble, processes, options.trials, options.pause, options.initial, options.landscape,
            options.stop_s, server,
        )  # fmt: skip
        if "://" in options.storage:
            optuna.delete_study(study_name=NAME, storage=storage)
        return row


if __name__ == "__main__":
    raise SystemExit(main())
