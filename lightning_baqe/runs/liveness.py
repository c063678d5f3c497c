"""Who works on a study: which workers live, and which died in the middle of a trial."""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable

import optuna
import psutil

from lightning_baqe.scratch import process_table

PREFIX = "worker:"  # of the study's user attributes, one for each worker, written by it alone
BEAT_S = 10.0
GRACE_S = 120.0  # without a beat; a compiler may hold the interpreter for long
_HERE: set[str] = set()  # workers of this process that were not closed


class Worker:
    """This process as a worker of a study, and its view of the others.

    A worker in the same process table is alive as long as its process is. One elsewhere, on another machine or in
    another container, is alive as long as the count of beats that it writes into the study goes on: the observer
    measures with its own clock, so that clocks need not agree.

    Args:
        study: in a storage that all workers share.
        beat_s: seconds between beats.
        grace_s: seconds without a beat after which a worker elsewhere is taken for dead.
        clock: seconds, for the grace.
    """

    def __init__(
        self,
        study: optuna.Study,
        beat_s: float = BEAT_S,
        grace_s: float = GRACE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.id, self._clock = uuid.uuid4().hex, clock
        self._study, self._beat_s, self._grace_s = study, beat_s, grace_s
        self._seen: dict[str, tuple[int, float]] = {}
        self._stop = threading.Event()
        process = psutil.Process()
        self._record = {"place": process_table(), "pid": process.pid, "started": process.create_time()}
        self._write(0)
        _HERE.add(self.id)
        self._thread = threading.Thread(target=self._beat, name="study heartbeat", daemon=True)
        self._thread.start()

    def alive(self, worker: object) -> bool:
        """Whether a worker lives.

        Args:
            worker: its id; anything else, None too, is no living worker.
        """
        if worker == self.id:
            return True
        record = self._study.user_attrs.get(f"{PREFIX}{worker}") if isinstance(worker, str) else None
        if record is None or record["beat"] is None:
            return False
        if record["place"] == process_table():
            same_process = record["pid"] == os.getpid()
            return worker in _HERE if same_process else _runs(record["pid"], record["started"])
        now = self._clock()
        beat, since = self._seen.get(str(worker), (None, now))
        if beat != record["beat"]:
            since = now
        self._seen[str(worker)] = (record["beat"], since)
        return now - since < self._grace_s

    def close(self) -> None:
        """Leave the study; what this worker had begun is free for others. Safe to call twice."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join()
        _HERE.discard(self.id)
        self._write(None)

    def _write(self, beat: int | None) -> None:
        self._study.set_user_attr(f"{PREFIX}{self.id}", {**self._record, "beat": beat})

    def _beat(self) -> None:
        count = 0
        while not self._stop.wait(self._beat_s):
            count += 1
            try:
                self._write(count)
            except optuna.exceptions.StorageInternalError:
                continue  # a busy or restarting database: the grace is there for that


def _runs(pid: int, started: float) -> bool:
    """Whether a process runs that began when `started` says: ids are used again."""
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - started) < 2 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
