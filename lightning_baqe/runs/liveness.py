"""Who works on a study: which workers live, and which died in the middle of a trial."""

from __future__ import annotations

import os
import sys
import threading
import uuid

import optuna
import psutil

from lightning_baqe.errors import StorageError
from lightning_baqe.scratch import process_table

PREFIX = "worker:"  # of the study's user attributes, one for each worker, written by it alone
BEAT_S = 10.0
GRACE_BEATS = 12  # two minutes; a compiler may hold the interpreter for long
_HERE: set[str] = set()  # workers of this process that were not closed


class Worker:
    """This process as a worker of a study, and its view of the others.

    A worker in the same process table is alive as long as its process is. One elsewhere, on another machine or in
    another container, is alive as long as the count of beats that it writes into the study goes on. The observer
    measures that by its own beats that were written, not by a clock: clocks need not agree, and while the database is
    away, or the observer is stopped, nobody else gets older.

    Args:
        study: in a storage that all workers share.
        beat_s: seconds between beats.
        grace: beats of this worker without one of another after which that one is taken for dead, if it is elsewhere.
    """

    def __init__(self, study: optuna.Study, beat_s: float = BEAT_S, grace: int = GRACE_BEATS) -> None:
        self.id = uuid.uuid4().hex
        self._study, self._beat_s, self._grace = study, beat_s, grace
        self._beats = 0  # that were written
        self._seen: dict[str, tuple[int, int]] = {}  # the last beat of another, and how many this one had then
        self._stop = threading.Event()
        self._is_closed = False
        pid = os.getpid()
        self._record = {"place": process_table(), "pid": pid, "started": process_start(pid)}
        self._write(0)
        _HERE.add(self.id)
        self._thread = threading.Thread(target=self._keep_beating, name="study heartbeat", daemon=True)
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
            if record["pid"] == os.getpid():
                return worker in _HERE
            return record["started"] is not None and process_start(record["pid"]) == record["started"]
        beat, since = self._seen.get(str(worker), (None, 0))
        if beat != record["beat"]:
            since = self._beats
        self._seen[str(worker)] = (record["beat"], since)
        return self._beats - since < self._grace

    def beat(self) -> None:
        """Give a sign of life to workers elsewhere."""
        self._write(self._beats + 1)
        self._beats += 1

    def close(self) -> None:
        """Leave the study; what this worker had begun is free for others. Safe to call twice, or again if it failed."""
        self._stop.set()
        self._thread.join()
        _HERE.discard(self.id)
        if not self._is_closed:
            self._write(None)
            self._is_closed = True

    def _write(self, beat: int | None) -> None:
        self._study.set_user_attr(f"{PREFIX}{self.id}", {**self._record, "beat": beat})

    def _keep_beating(self) -> None:
        while not self._stop.wait(self._beat_s):
            try:
                self.beat()
            except (optuna.exceptions.StorageInternalError, StorageError):
                continue  # a busy or restarting database: the grace is there for that


def process_start(pid: int) -> float | None:
    """When a process of this process table began; None if none of this id runs. Ids are used again, starts are not.

    It is comparable with other starts in the table alone, and stays what it is when the clock is set.
    """
    if sys.platform == "linux":
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                state, *fields = file.read().rpartition(b")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        # In ticks since the machine's start. What psutil makes of them moves with the clock.
        return None if state in (b"Z", b"X") else float(fields[18])
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None
