"""Timing in the calling process, for profiles; latencies to quote are taken in a process of their own."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

WARM_UP, FEWEST, PROFILED_RUNS = 3, 5, 40


def timed(run: Callable[[], Any], seconds: float, most: int | None = None) -> list[float]:
    """Microseconds of each run, as many as fit, :data:`FEWEST` at least."""
    samples: list[float] = []
    begin = time.perf_counter()
    while (time.perf_counter() - begin < seconds and len(samples) != most) or len(samples) < FEWEST:
        start = time.perf_counter_ns()
        run()
        samples.append((time.perf_counter_ns() - start) / 1e3)
    return samples
