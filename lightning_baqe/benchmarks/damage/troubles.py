"""What befalls the workers of a study, for :mod:`lightning_baqe.benchmarks.workers`.

A trouble is a generator that is resumed ten times a second while the workers run; it looks at the scene and acts.

| name | what happens once a quarter of the trials is complete |
| --- | --- |
| kill | one worker in the middle of a trial gets SIGKILL |
| stop | one in the middle of a trial gets SIGSTOP, and SIGCONT a minute later |
| hold | one stops while it holds the study's lock, and goes on a minute later |
| clock | the clock is set back an hour for all workers (libfaketime: the machine's own clock stays) |
| restart | the PostgreSQL server is restarted in order; again at half of the trials, as after a crash |
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import psutil
from optuna.trial import TrialState

from lightning_baqe.benchmarks.postgres import Server
from lightning_baqe.errors import ConfigError
from lightning_baqe.runs.liveness import PREFIX
from lightning_baqe.runs.study import OWNER
from lightning_baqe.search.patience import Patience

DOWN_S = 3.0  # of the server, in a restart
SET_BACK_S = 3600
_HOLD = "hold"  # a file in the run folder: whoever removes it stops
_CLOCK = "FAKETIME_TIMESTAMP_FILE"


@dataclass
class Scene:
    """What a trouble sees.

    Attributes:
        folder: the run folder.
        study: that the workers share.
        trials: complete ones to reach.
        workers: their processes.
        stop_s: seconds that a worker is stopped for.
        server: of the study's database, if it can be restarted.
        killed: processes that did not end by themselves.
        happened: how often something befell them.
    """

    folder: Path
    study: optuna.Study
    trials: int
    workers: Sequence[Any]
    stop_s: float
    server: Server | None
    killed: list[Any] = field(default_factory=list)
    happened: int = 0

    def __post_init__(self) -> None:
        self._patience = Patience("the study's database")

    def has_come_to(self, part: float) -> bool:
        """Whether this part of the trials is complete."""
        return len(self._trials(TrialState.COMPLETE)) >= part * self.trials

    def in_a_trial(self) -> Any | None:
        """The worker that began a trial last; None: there is none in a trial."""
        attributes = self._patience.repeat(lambda: self.study.user_attrs)
        for trial in reversed(self._trials(TrialState.RUNNING)):
            record = attributes.get(f"{PREFIX}{trial.user_attrs.get(OWNER)}")
            worker = next((w for w in self.workers if record is not None and w.pid == record["pid"]), None)
            if worker is not None:
                return worker
        return None

    def _trials(self, state: TrialState) -> list[optuna.trial.FrozenTrial]:
        return self._patience.repeat(lambda: self.study.get_trials(deepcopy=False, states=(state,)))


Trouble = Callable[[Scene], Generator[None]]


def kill(scene: Scene) -> Generator[None]:
    """SIGKILL in the middle of a trial."""
    while not scene.has_come_to(0.25) or (victim := scene.in_a_trial()) is None:
        yield
    victim.kill()
    victim.join()
    scene.killed.append(victim)
    scene.happened += 1


def stop(scene: Scene) -> Generator[None]:
    """SIGSTOP in the middle of a trial, SIGCONT later."""
    while not scene.has_come_to(0.25) or (victim := scene.in_a_trial()) is None:
        yield
    os.kill(victim.pid, signal.SIGSTOP)
    yield from _go_on_later(scene, victim.pid)


def hold(scene: Scene) -> Generator[None]:
    """SIGSTOP of one that holds the study's lock, SIGCONT later."""
    while not scene.has_come_to(0.25):
        yield
    (scene.folder / _HOLD).touch()
    while (stopped := next((w for w in scene.workers if _is_stopped(w.pid)), None)) is None:
        yield
    yield from _go_on_later(scene, stopped.pid)


def clock(scene: Scene) -> Generator[None]:
    """The clock of this process and its children is set back."""
    while not scene.has_come_to(0.25):
        yield
    before = time.time()
    Path(os.environ[_CLOCK]).write_text(f"-{SET_BACK_S}\n")
    if not time.time() < before - SET_BACK_S / 2:
        raise ConfigError("libfaketime did not set the clock back: see that it is 0.9.10 or newer")
    scene.happened += 1


def restart(scene: Scene) -> Generator[None]:
    """The server is restarted, in order and as after a crash."""
    assert scene.server is not None
    for part, mode in ((0.25, "fast"), (0.5, "immediate")):
        while not scene.has_come_to(part) or scene.in_a_trial() is None:
            yield
        scene.server.restart(mode, DOWN_S)
        scene.happened += 1


TROUBLES: Mapping[str, Trouble] = {function.__name__: function for function in (kill, stop, hold, clock, restart)}


def _go_on_later(scene: Scene, pid: int) -> Generator[None]:
    begun = time.monotonic()
    try:
        while time.monotonic() - begun < scene.stop_s:
            yield
        scene.happened += 1
    finally:
        os.kill(pid, signal.SIGCONT)


def _is_stopped(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def stop_where_asked(folder: Path, alone: Callable[[Callable[[], None]], None]) -> None:
    """Stop this process, if :func:`hold` asks for it, in the middle of a step that no other worker's may come between.

    Args:
        folder: the run folder.
        alone: calls such a step.
    """
    try:
        (folder / _HOLD).unlink()
    except FileNotFoundError:
        return
    alone(lambda: os.kill(os.getpid(), signal.SIGSTOP))


def missing() -> str | None:
    """What :func:`under_another_clock` lacks here, None if nothing."""
    return None if _library() else "libfaketime is not installed: apt-get install faketime"


def _library() -> Path | None:
    folders = [folder for pattern in ("usr/lib/*", "usr/lib", "usr/local/lib") for folder in Path("/").glob(pattern)]
    paths = [folder / "faketime" / "libfaketimeMT.so.1" for folder in folders]  # MT: for programs with threads
    return next((path for path in paths if path.is_file()), None)


def is_under_another_clock() -> bool:
    """Whether this process is one of :func:`under_another_clock`."""
    return _CLOCK in os.environ


def under_another_clock(function: str, **arguments: Any) -> Any:
    """What a function gives in a process whose clock, and whose children's, can be set. Monotonic clocks stay, as they
    do where the system's clock is set.

    Args:
        function: its module and name; arguments and what it gives can be held by JSON.

    Raises:
        ConfigError: libfaketime is not installed, or the process failed.
    """
    library = _library()
    if library is None:
        raise ConfigError(f"another clock is wanted, but {missing()}")
    module, _, name = function.rpartition(".")
    code = f"import json, sys; from {module} import {name}; print(json.dumps({name}(**json.loads(sys.argv[1]))))"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "clock"
        file.write_text("+0\n")
        settings = {"LD_PRELOAD": str(library), _CLOCK: str(file), "FAKETIME_NO_CACHE": "1"}
        settings |= {"FAKETIME_DONT_FAKE_MONOTONIC": "1", "DONT_FAKE_MONOTONIC": "1"}
        command = [sys.executable, "-c", code, json.dumps(arguments)]
        done = subprocess.run(
            command, env=os.environ | settings, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
    if done.returncode:
        raise ConfigError(f"the process under another clock failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def follow_the_clock() -> None:
    """Make up for what libfaketime leaves out, in a process of :func:`under_another_clock`; elsewhere do nothing."""
    if not is_under_another_clock():
        return
    # Linux tells the machine's start by the wall clock in /proc/stat, where libfaketime does not reach.
    platform: Any = importlib.import_module("psutil._pslinux")
    platform.boot_time = lambda: time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    # It also moves the ends of sleeps, which Python gives by the monotonic clock.
    time.sleep = lambda seconds: select.select([], [], [], float(seconds)) and None
