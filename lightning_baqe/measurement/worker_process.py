"""The measuring process, seen by who asks: started when needed, asked with a timeout, replaced when it dies."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from typing import IO, Any

from lightning_baqe.errors import ConfigError, MeasurementError
from lightning_baqe.hardware.target import usable_cores

START_TIMEOUT_S = 120.0


class WorkerProcess:
    """A measuring process that is kept between measurements and replaced when it hangs or dies. It is pinned to
    ``threads`` cores, the last ones that this process may use.
    """

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str] = queue.Queue()
        self._reader: threading.Thread | None = None
        self._errors: IO[str] | None = None
        self._lock = threading.Lock()

    def ask(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """Send one request, wait for its answer. MeasurementError where the worker died, gave an error, or took longer
        than ``timeout_s``.
        """
        with self._lock:
            process = self._running()
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
                answer = self._answer(timeout_s)
            except BrokenPipeError as error:
                raise self._died("died") from error
            except KeyboardInterrupt:  # its answer must not meet the next question
                self.close()
                raise
        if "error" in answer:
            raise MeasurementError(f"measuring failed: {answer['error']}")
        return answer

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # what it never read
                self._process.stdin.close()
            self._process = None
        if self._reader is not None:
            self._reader.join()
            self._reader = None
        if self._errors is not None:
            self._errors.close()
            self._errors = None

    def _running(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        usable = usable_cores()
        if self.threads > len(usable):
            raise ConfigError(f"{self.threads} threads are asked for, but this process may use {len(usable)} cores")
        cores = ",".join(str(core) for core in usable[-self.threads :])
        command = [sys.executable, "-m", "lightning_baqe.measurement.worker", cores, str(os.getpid())]
        self.close()
        self._errors = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115  lives as long as the process
        self._answers = queue.Queue()
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        self._reader = threading.Thread(target=_read_lines, args=(self._process, self._answers), daemon=True)
        self._reader.start()
        self._answer(START_TIMEOUT_S)
        return self._process

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            raise self._died(f"gave no answer within {timeout_s:g} s") from None
        if not line:
            raise self._died("died")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _died(self, what: str) -> MeasurementError:
        code = self._process.poll() if self._process is not None else None
        tail = ""
        if self._errors is not None:
            self._errors.seek(0)
            tail = self._errors.read()[-2000:].strip()
        self.close()
        return MeasurementError(f"the measuring process {what} (exit code {code}); its last words: {tail or 'none'}")


def _read_lines(process: subprocess.Popen[str], answers: queue.Queue[str]) -> None:
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            answers.put(line)
    answers.put("")
