"""A run that disturbs itself: it is killed, signalled, or its disk filled, in a chosen phase or at a chosen file event.

Started by :mod:`~lightning_baqe.benchmarks.damage.interruptions` as a process of its own.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

# What a search does, and the function that does it, as its callers find it.
PHASES = {
    "admission": "lightning_baqe.entrance.admission:admit",
    "pretraining": "lightning_baqe.tasks:pretrain",
    "preparing": "lightning_baqe.runs.search_context:SearchContext.prepare",
    "tuning": "lightning_baqe.runs.search_context:tune",
    "proposing": "lightning_baqe.runs.study:SearchStudy.ask",
    "training": "lightning_baqe.callbacks.search_loop:SearchLoop.look_at_step",
    "building": "lightning_baqe.measurement.device:Device.build",
    "measuring": "lightning_baqe.runs.evaluation:measure_quietly",
    "telling": "lightning_baqe.runs.study:SearchStudy.tell",
    "writing": "lightning_baqe.runs.study:SearchStudy.write",
    "testing": "lightning_baqe.runs.study:SearchStudy.test_front",
    "reporting": "lightning_baqe.runs.study:write_report",
}
# Of CPython's audit events, those that change what is on the disk, or start a process.
_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "sqlite3.connect", "subprocess.Popen")
DISTURBED = "disturbed: "
AGAIN_S = 0.5  # after which a signal is sent a second time
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Disturbance:
    """What happens, and when.

    Args:
        action: kill, term, int, term twice, int twice, full; nothing: only take notes.
        phase, call, share: in the call of this number of a phase, after a share of its usual duration.
        usual_s: that duration.
        event: instead, at the file event of this number.
        filler: where ``full`` puts a file that leaves no room.
        notes: where calls and durations of phases and the number of events are written at the end.
    """

    action: str = "nothing"
    phase: str | None = None
    call: int = 0
    share: float = 0.5
    usual_s: float = 0.0
    event: int | None = None
    filler: str = ""
    notes: str = ""

    def text(self) -> str:
        """As :func:`main` takes it."""
        return json.dumps(asdict(self))


def network(name: str, num_classes: int, library: str) -> nn.Module:
    """A network of three convolutions, for recipes: ``(n, 3, h, w)`` to ``(n, num_classes)``."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
            self.branch = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
            self.last = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8))
            self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, num_classes)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = self.pool(nn.functional.relu(x + self.last(self.branch(x))))
            out: Tensor = self.fc(x.flatten(1))
            return out

    return Net()


class _Disturber:
    def __init__(self, plan: Disturbance) -> None:
        self.plan = plan
        self.calls: Counter[str] = Counter()
        self.seconds: dict[str, list[float]] = {}
        self.events = 0
        self.began = time.perf_counter()
        self.ended = False  # the run
        self._done = threading.Lock()  # held from the disturbance on

    def act(self) -> None:
        """Disturb, once."""
        if not self._done.acquire(blocking=False):
            return
        name, _, twice = self.plan.action.partition(" ")
        if name == "full":
            fill(Path(self.plan.filler))  # said afterwards: a run that ended meanwhile was not disturbed
        if not self.ended:
            print(f"{DISTURBED}{self.plan.action}", flush=True)
        if name == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif name in ("term", "int"):
            number = signal.SIGTERM if name == "term" else signal.SIGINT

            def send() -> None:
                if number == signal.SIGINT:
                    os.killpg(0, number)  # as a terminal does
                else:
                    os.kill(os.getpid(), number)

            if twice:
                again = threading.Timer(AGAIN_S, send)
                again.daemon = True
                again.start()
            send()

    def watch_files(self) -> None:
        """Count file events from now on."""
        base = os.environ["TMPDIR"].rpartition("/")[0]

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event not in _EVENTS or (event != "subprocess.Popen" and base not in str(arguments[0])):
                return
            if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
            number, self.events = self.events, self.events + 1
            if number == self.plan.event:
                self.act()

        sys.addaudithook(hook)

    def wrap(self, phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The function of a phase, disturbed where the plan says so."""

        @functools.wraps(call)
        def phased(*args: Any, **kwargs: Any) -> Any:
            number, self.calls[phase] = self.calls[phase], self.calls[phase] + 1
            chosen = phase == self.plan.phase and number == self.plan.call
            timer = threading.Timer(self.plan.share * self.plan.usual_s, self.act)
            timer.daemon = True
            start = time.perf_counter()
            try:
                if chosen:
                    timer.start()
                return call(*args, **kwargs)
            finally:
                timer.cancel()
                self.seconds.setdefault(phase, []).append(time.perf_counter() - start)
                if chosen:
                    self.act()  # where it was shorter than usual

        return phased

    def notes(self) -> dict[str, Any]:
        """What the run did."""
        return {"events": self.events, "seconds": self.seconds, "whole_s": time.perf_counter() - self.began}


def fill(path: Path) -> None:
    """Leave no byte on the disk of this file."""
    with path.open("ab", buffering=0) as file:
        with contextlib.suppress(OSError):  # quickly, where the system can; what remains is written
            os.posix_fallocate(file.fileno(), 0, os.statvfs(path).f_bavail * os.statvfs(path).f_frsize)
        file.seek(0, os.SEEK_END)
        size = _CHUNK
        while size:
            try:
                file.write(bytes(size))
            except OSError:
                size //= 2


def main() -> int:
    """Run a recipe: the first argument is the disturbance, the others are the recipe's."""
    disturber = _Disturber(Disturbance(**json.loads(sys.argv[1])))
    for phase, where in PHASES.items():
        module, _, names = where.partition(":")
        *owners, name = names.split(".")
        owner = functools.reduce(getattr, owners, importlib.import_module(module))
        setattr(owner, name, disturber.wrap(phase, getattr(owner, name)))
    disturber.watch_files()
    from lightning_baqe.train import main as run

    status = run(sys.argv[2:])
    disturber.ended = True
    if disturber.plan.notes:
        Path(disturber.plan.notes).write_text(json.dumps(disturber.notes()))
    return status
