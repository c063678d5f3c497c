"""Measure latency on a device, in a process of its own: pinned, warmed up, with a timeout, many samples."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lightning_baqe.deploy.artifact import Artifact
from lightning_baqe.errors import ConfigError, MeasurementError
from lightning_baqe.hardware.description import detected_caches
from lightning_baqe.hardware.identity import device_info
from lightning_baqe.measurement.confidence import median_interval, relative_half_width
from lightning_baqe.measurement.database import Records

START_TIMEOUT_S = 120.0
PRECISION = 0.02


@dataclass(frozen=True)
class Measurement:
    """Latency of one inference of one image.

    Args:
        latency_us: median of the samples, microseconds.
        samples_us: every sample in order.
        device: the fingerprint: CPU, flags, cores, threads.
        cached: whether it came from the records.
        reference_us: of a fixed piece of work that was timed in between, once before every ten samples; it follows the
            clock alone.
    """

    latency_us: float
    samples_us: tuple[float, ...]
    device: dict[str, Any]
    cached: bool = False
    reference_us: tuple[float, ...] = ()

    @property
    def spread(self) -> float:
        """Interquartile range over median; above 0.1 the machine was noisy."""
        if len(self.samples_us) < 4:
            return 0.0
        low, _, high = statistics.quantiles(self.samples_us, n=4)
        return (high - low) / self.latency_us

    @property
    def interval_us(self) -> tuple[float, float]:
        """95 % confidence interval of the median (:func:`~lightning_baqe.measurement.confidence.median_interval`)."""
        return median_interval(self.samples_us)

    @property
    def noisy(self) -> bool:
        """Whether the interval reaches further than 2 % from the median: the machine was noisy, or samples were few."""
        return relative_half_width(self.samples_us, self.latency_us) > PRECISION

    @property
    def drift(self) -> float:
        """How much slower the clock became: median of the reference's second half over that of its first, minus 1."""
        half = len(self.reference_us) // 2
        if half == 0:
            return 0.0
        return statistics.median(self.reference_us[-half:]) / statistics.median(self.reference_us[:half]) - 1.0


class Worker:
    """A measuring process that is kept between measurements and replaced when it hangs or dies.

    Args:
        threads: cores that it is pinned to, the last ones that this process may use.
    """

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str] = queue.Queue()
        self._reader: threading.Thread | None = None
        self._errors: IO[str] | None = None
        self._lock = threading.Lock()

    def ask(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """Send one request, wait for its answer.

        Raises:
            MeasurementError: the worker died, gave an error, or took longer than ``timeout_s``.
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
        affinity = hasattr(os, "sched_getaffinity")
        usable = sorted(os.sched_getaffinity(0)) if affinity else list(range(os.cpu_count() or 1))
        if self.threads > len(usable):
            raise ConfigError(f"{self.threads} threads are asked for, but this process may use {len(usable)} cores")
        cores = ",".join(str(core) for core in usable[-self.threads :])
        command = [sys.executable, "-m", "lightning_baqe.measurement.worker", cores]
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


_workers: dict[int, Worker] = {}


def worker(threads: int = 1) -> Worker:
    """The measuring process for so many threads."""
    if threads not in _workers:
        _workers[threads] = Worker(threads)
        atexit.register(_workers[threads].close)
    return _workers[threads]


def measure(
    artifact: Artifact | Path | str,
    device: str = "local",
    repeats: int = 50,
    warmup: int = 10,
    timeout_s: float = 60.0,
    records: Records | None = None,
    precision: float | None = None,
    limit_s: float = 10.0,
    cold: bool = False,
) -> Measurement:
    """Latency of an artifact, batch 1.

    Args:
        artifact: an artifact, or its folder.
        device: ``local``.
        repeats: samples; with ``precision``: at least so many.
        warmup: runs before the first sample.
        timeout_s: for the whole measurement.
        records: if given, code that was measured before is not measured again, and new figures are kept.
        precision: such as 0.02: go on until half the 95 % interval of the median is at most this fraction of it. The
            interval is looked at again and again, so that it holds a little less often than 95 %.
        limit_s: stop all the same after so many seconds; the measurement then says that it is ``noisy``.
        cold: fill the caches with something else before every image, as if the device did other work in between.

    Raises:
        ConfigError: an unknown device, or too many threads.
        MeasurementError: it crashed or took too long.
    """
    if device != "local":
        raise ConfigError(f"unknown device {device!r}; this version measures on 'local'")
    if repeats < 1 or warmup < 0:
        raise ConfigError(f"repeats must be at least 1 and warmup at least 0, got {repeats} and {warmup}")
    loaded = artifact if isinstance(artifact, Artifact) else Artifact.load(artifact)
    if (precision is not None and not precision > 0) or not 0 < limit_s < timeout_s:
        raise ConfigError(
            f"precision must be positive and limit_s between 0 and timeout_s, got {precision}, {limit_s}, {timeout_s}"
        )
    info = device_info(loaded.threads)
    key = f"{loaded.plan.digest}{' cold' if cold else ''}"
    known = records.model(key, loaded.threads) if records is not None else None
    if known is not None:
        return Measurement(known[0], tuple(known[1]), info, cached=True)
    with tempfile.TemporaryDirectory(prefix="lightning_baqe-") as folder:
        path = loaded.save(Path(folder) / "artifact") if isinstance(artifact, Artifact) else Path(artifact).resolve()
        request = {
            "artifact": str(path), "repeats": repeats, "warmup": warmup, "precision": precision, "limit_s": limit_s,
            "flush_bytes": flush_bytes() if cold else 0,
        }  # fmt: skip
        answer = worker(loaded.threads).ask(request, timeout_s)
    samples = answer["samples_us"]
    latency_us = statistics.median(samples)
    if records is not None:
        records.add_model(key, loaded.threads, samples, latency_us)
    return Measurement(latency_us, tuple(samples), info, reference_us=tuple(answer["reference_us"]))


def flush_bytes() -> int:
    """Enough to displace all that any cache holds: twice the largest one, or 64 MiB where nobody tells its size."""
    caches = detected_caches()
    return 2048 * max(caches.l1d_kib, caches.l2_kib, caches.l3_kib) or 64 * 2**20
