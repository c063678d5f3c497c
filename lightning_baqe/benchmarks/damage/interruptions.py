"""A small search, killed, signalled and left without disk in all its phases: what is lost, doubled or left over.

    python -m lightning_baqe.benchmarks.damage.interruptions            # all, some 110 runs
    python -m lightning_baqe.benchmarks.damage.interruptions --ways random --most 5

Each way begins a search in a new folder, disturbs it once, looks at what is there, and starts the same command again,
which must end well.

| way | what |
| --- | --- |
| events | SIGKILL just before a file is opened to be written, renamed or removed, or a process is started |
| random | SIGKILL at any time |
| term, int, each also twice | SIGTERM to the process, SIGINT to its group as a terminal sends it, in each phase |
| full | the disk becomes full in each phase; wants root, who mounts a small disk of its own |

What is wrong is told: a trial that was complete and is not, or has other figures; more than one that was begun and not
ended; a point evaluated twice; another exit status; a traceback; a process that lives on; a file that an undisturbed
run does not leave.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from lightning_baqe.benchmarks.damage.disturbed import DISTURBED, PHASES, Disturbance
from lightning_baqe.benchmarks.setups import console_of, parser_of, table_of
from lightning_baqe.hardware.identity import device_info

TRIALS = 3
RECIPE = (
    *("recipe=qat_search", "data=digits", "model._target_=lightning_baqe.benchmarks.damage.disturbed.network"),
    *("pretrain.epochs=1", "trainer.limit_train_batches=3", "trainer.enable_progress_bar=false"),
    *("deploy.repeats=3", "deploy.warmup=1", f"search.trials={TRIALS}", "search.steps_per_trial=3"),
    *("search.baselines=[8]", "search.calibration_batches=1", "search.n_initial=2", "search.pool_size=20"),
    *("search.bit_choices=[4,8]", "search.tune_s=1"),
)
STATUS = {"kill": -signal.SIGKILL, "term": 143, "int": 130, "full": 1, "nothing": 0}
SIGNALS = ("term", "term twice", "int", "int twice")
WAYS = ("events", "random", *SIGNALS, "full")
DISK_BYTES = 96 << 20
COLD = ("tuning", "building", "measuring")  # phases that have nothing to do where caches are full
LIMIT_S = 300  # for a run
ENDED_S = 15  # after which no process of a run lives
_VARIES = re.compile(
    r"(?<=objects/)\w+(-\w+)?(?=\.o$)|(?<=artifacts/)(trial|baseline)_\w+|\d+"
)  # which kernels, points
MARK = "BAQE_INTERRUPTION"  # in the environment of a run and whatever it starts


@dataclass(frozen=True)
class Usual:
    """An undisturbed run.

    Attributes:
        events: file events.
        seconds: ``{phase: of each call}``.
        whole_s: from the start of the process.
    """

    events: int
    seconds: dict[str, list[float]]
    whole_s: float


@dataclass(frozen=True)
class Undisturbed:
    """What the search is compared with.

    Attributes:
        cold, warm: its run without and with the caches of an earlier one.
        cache: those caches.
        names: what it leaves in its folders, numbers left out.
    """

    cold: Usual
    warm: Usual
    cache: Path
    names: frozenset[str]

    def at(self, phase: str) -> Usual:
        """The run in which this phase has something to do."""
        return self.cold if phase in COLD else self.warm


@dataclass
class Result:
    """What became of one disturbed search."""

    way: str
    where: str
    happened: bool = False  # else the run ended before
    kept: int = 0  # complete trials after the disturbance
    wrong: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Place:
    """Folders of one search: its run, its caches, its temporary files."""

    base: Path

    def start(self, disturbance: Disturbance, after_s: float | None = None) -> tuple[int, str]:
        """Run the command to its end, or kill it after some seconds; gives its status and what it printed."""
        for name in ("cache", "tmp"):
            (self.base / name).mkdir(exist_ok=True)
        environment = {
            **os.environ, MARK: str(self.base), "TMPDIR": str(self.base / "tmp"), "OMP_NUM_THREADS": "1",
            "LIGHTNING_BAQE_CACHE": str(self.base / "cache"), "XDG_CACHE_HOME": str(self.base / "cache"),
            "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip
        code = f"import sys; from {Disturbance.__module__} import main; sys.exit(main())"
        command = [sys.executable, "-c", code, disturbance.text(), *RECIPE, f"run_dir={self.base / 'run'}"]
        # What it prints goes elsewhere: the disk may become full.
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
            with (self.base / "pids").open("a") as file:
                print(process.pid, file=file)
            try:
                process.wait(LIMIT_S if after_s is None else after_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            output.seek(0)
            return process.returncode, output.read()

    def left_in_memory(self) -> list[str]:
        """Scratch folders in memory of processes of the search."""
        pids = (self.base / "pids").read_text().split()
        return [str(path) for pid in pids for path in Path("/dev/shm").glob(f"lightning_baqe-*-{pid}-*")]

    def alive(self) -> list[str]:
        """Processes of the search that live on; they are given some seconds to end, then killed."""
        deadline = time.monotonic() + ENDED_S
        while (found := list(self._processes())) and time.monotonic() < deadline:
            time.sleep(0.2)
        names = [" ".join(process.cmdline()[:4]) for process in found if process.is_running()]
        for process in found:
            process.kill()
        return names

    def _processes(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == str(self.base) and process.status() != psutil.STATUS_ZOMBIE:
                    yield process
            except psutil.Error:
                continue

    def trials(self) -> dict[int, tuple[str, dict[str, Any]]]:
        """``{number: (state, what it found)}`` of the study; read from a copy, which is repaired as SQLite does."""
        with tempfile.TemporaryDirectory() as folder:
            for path in (self.base / "run").glob("study.db*"):
                shutil.copy(path, folder)
            if not Path(folder, "study.db").is_file():
                return {}
            with closing(sqlite3.connect(Path(folder, "study.db"))) as connection:
                try:
                    states = connection.execute("SELECT trial_id, number, state FROM trials").fetchall()
                    found = connection.execute(
                        "SELECT trial_id, value_json FROM trial_user_attributes WHERE key = 'result'"
                    ).fetchall()
                except sqlite3.OperationalError:  # its tables were not there yet
                    return {}
        results = {trial: json.loads(text) for trial, text in found}
        return {number: (state, results.get(trial, {})) for trial, number, state in states}

    def names(self) -> frozenset[str]:
        """Of all files that the search left, digests and numbers left out."""
        paths = (str(path.relative_to(self.base)) for path in self.base.rglob("*"))
        return frozenset(_VARIES.sub("#", path) for path in paths if path not in ("filler", "pids"))


def undisturbed(base: Path) -> Undisturbed:
    """Run the search twice without disturbing it, and once more to see that nothing is left to do.

    Raises:
        RuntimeError: it fails by itself.
    """
    place, notes, found = Place(base), base / "notes.json", []
    for turn in ("cold", "warm", "done"):
        if turn == "warm":
            shutil.rmtree(base / "run")
        status, text = place.start(Disturbance(notes=str(notes)))
        if status:
            raise RuntimeError(f"the undisturbed search ended with {status}: {text[-3000:]}")
        found.append(Usual(**json.loads(notes.read_text())))
    notes.unlink()
    # A backup is made of every fifth trial, and some searches begin more trials than others.
    return Undisturbed(found[0], found[1], base / "cache", place.names() | {"run/study.backup.db"})


def try_one(way: str, plan: Disturbance, where: str, base: Path, usual: Undisturbed, after_s: float | None) -> Result:
    """Disturb a search in a new folder, and go on with it."""
    result, place = Result(way, where), Place(base)
    if plan.phase not in COLD:
        shutil.copytree(usual.cache, base / "cache")
    status, text = place.start(plan, after_s)
    action = "kill" if after_s is not None else plan.action.split()[0]
    result.happened = DISTURBED in text or (after_s is not None and status == STATUS["kill"])
    _look_at_end(result, STATUS[action if result.happened else "nothing"], status, text, place)
    before = place.trials()
    result.kept = sum(state == "COMPLETE" for state, _ in before.values())
    if plan.filler:
        Path(plan.filler).unlink(missing_ok=True)
    status, text = place.start(Disturbance())
    _look_at_end(result, 0, status, text, place)
    compare(result, before, place.trials())
    if more := sorted(place.names() - usual.names) + place.left_in_memory():
        result.wrong.append(f"left over: {more[:5]}")
    return result


def _look_at_end(result: Result, wanted: int, status: int, text: str, place: Place) -> None:
    if status != wanted:
        result.wrong.append(f"exit status {status}, not {wanted}: {text[-300:]}")
    if "Traceback" in text:
        result.wrong.append(f"a traceback: {text[text.index('Traceback') :][-600:]}")
    if wanted in (143, 130, 1) and "To go on: " not in text:
        result.wrong.append(f"it does not say how to go on: {text[-300:]}")
    if wanted == 1 and "full" not in text:
        result.wrong.append(f"it does not say that the disk is full: {text[-300:]}")
    if orphans := place.alive():
        result.wrong.append(f"live on: {orphans}")


def compare(
    result: Result, before: dict[int, tuple[str, dict[str, Any]]], after: dict[int, tuple[str, dict[str, Any]]]
) -> None:
    """Note what of the trials before is lost, and what of those after is too many or too few."""
    for number, (state, found) in before.items():
        if state == "COMPLETE" and after.get(number) != (state, found):
            result.wrong.append(f"trial {number} was complete with {found}, now {after.get(number)}")
    complete = [found for state, found in after.values() if state == "COMPLETE"]
    if len(complete) != TRIALS:
        result.wrong.append(f"{len(complete)} complete trials, not {TRIALS}")
    points = {json.dumps([found["bits"], found["schedules"]], sort_keys=True) for found in complete}
    if len(points) != len(complete):
        result.wrong.append("a point was evaluated twice")
    lost = [number for number, (state, _) in after.items() if state not in ("COMPLETE", "WAITING")]
    if len(lost) > 1:
        result.wrong.append(f"trials {lost} were lost")


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A disk of 96 MiB in memory, mounted on a folder while the context lasts.

    Raises:
        PermissionError: only root may.
    """
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "lightning_baqe", str(folder)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise PermissionError(f"no disk can be mounted ({done.stderr.strip()}): run as root, or leave 'full' out")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


Plan = tuple[str, Disturbance, float | None]  # where, what, seconds after which it is killed from outside


def plans(way: str, usual: Undisturbed, most: int | None, random: np.random.Generator) -> list[Plan]:
    """What is done in one way; ``most`` of it, spread over all."""
    kills = 30 if most is None else most
    if way == "random":
        moments = random.uniform(0.0, usual.warm.whole_s, kills)
        return [(f"after {moment:.1f} s", Disturbance(), float(moment)) for moment in moments]
    if way == "events":
        chosen = np.linspace(0, usual.warm.events - 1, kills).astype(int)
        return [(f"event {event}", Disturbance("kill", event=int(event)), None) for event in chosen]
    phases = list(PHASES)
    found: list[Plan] = []
    for phase in phases if most is None else phases[:: max(len(phases) // most, 1)][:most]:
        seconds = usual.at(phase).seconds[phase]
        call, share = int(random.integers(len(seconds))), float(random.uniform(0.1, 0.9))
        found.append((f"{phase}, call {call}", Disturbance(way, phase, call, share, seconds[call]), None))
    return found


def run(ways: Sequence[str], most: int | None, seed: int, jobs: int, folder: Path) -> Iterator[Result]:
    """Try the ways, several at a time; results come as they are there."""
    random = np.random.default_rng(seed)
    (folder / "usual").mkdir()
    usual = undisturbed(folder / "usual")
    todo = [(way, *plan) for way in ways for plan in plans(way, usual, most, random)]

    def one(number: int) -> Result:
        way, where, plan, after_s = todo[number]
        base = folder / str(number)
        if way != "full":
            base.mkdir()
            result = try_one(way, plan, where, base, usual, after_s)
        else:
            with small_disk(base):
                plan = replace(plan, filler=str(base / "filler"))
                result = try_one(way, plan, where, base, usual, None)
        if not result.wrong:
            shutil.rmtree(base)
        return result

    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(one, range(len(todo)))


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status: 1 if anything was wrong."""
    parser = parser_of(__doc__)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--most", type=int, help="runs of each way; default: 30 kills, all phases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="searches at once")
    options = parser.parse_args(arguments)
    console = console_of(160)
    console.print(device_info()["cpu"])
    results = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for result in run(options.ways, options.most, options.seed, options.jobs, Path(folder)):
            results.append(result)
            said = "; ".join(result.wrong) or ("right" if result.happened else "right, it had ended before")
            console.print(f"{result.way}, {result.where}: {result.kept} complete; {said}", markup=False, soft_wrap=True)
    rows = []
    for way in options.ways:
        own = [result for result in results if result.way == way]
        rows.append([way, len(own), sum(r.happened for r in own), sum(not r.wrong for r in own)])
    console.print(table_of("searches disturbed", ("way", "runs", "disturbed", "right"), ("way",), rows))
    return int(any(result.wrong for result in results))


if __name__ == "__main__":
    sys.exit(main())
