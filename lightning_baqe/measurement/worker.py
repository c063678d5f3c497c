"""The process that measures: reads one request a line on standard input, answers with one line.

| request | what it measures |
| --- | --- |
| ``{"artifact": folder, "repeats": n, "warmup": n, "precision": p, "limit_s": s, "flush_bytes": n}`` | a whole model: \
after ``repeats`` samples it goes on until the interval of the median is as narrow as ``precision`` (null: it does \
not), or the limit; with ``flush_bytes`` every image meets cold caches |
| ``{"kernel": library, "arguments": npz, "repeats": n, "min_repeat_ms": n}`` | one kernel, see \
:mod:`lightning_baqe.tuning.bench` |

Answers: ``{"samples_us": [...]}`` with ``reference_us`` for a model, and for a kernel whether its result is ``exact``
(equal, or close for floats); or ``{"error": text}``. Pinned to its cores before TVM starts its threads; anything that
native code prints goes to standard error.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from lightning_baqe.kernels.x86.layout import SLACK
from lightning_baqe.measurement.confidence import relative_half_width

_PR_SET_PDEATHSIG = 1
BLOCK = 10  # samples between two of the reference
_REFERENCE = bytes(64 * 1024)


def _model(request: dict[str, Any]) -> dict[str, Any]:
    import numpy as np
    import tvm

    from lightning_baqe.deploy.artifact import Artifact
    from lightning_baqe.deploy.compiler import MAIN
    from lightning_baqe.measurement.memory import give_back_memory

    give_back_memory()  # what the last model left
    vm = Artifact.load(request["artifact"]).vm
    for _ in range(request["warmup"]):
        vm.invoke_stateful(MAIN)

    def block(count: int) -> list[float]:
        timer = vm.time_evaluator("invoke_stateful", tvm.cpu(), number=1, repeat=count)
        return [seconds * 1e6 for seconds in timer(MAIN).results]

    if request["flush_bytes"]:
        flushed = np.zeros(request["flush_bytes"], np.uint8)

        def block(count: int) -> list[float]:
            return [_cold_us(lambda: vm.invoke_stateful(MAIN), flushed) for _ in range(count)]

    return sample(block, request["repeats"], request["precision"], request["limit_s"])


def sample(
    block: Callable[[int], list[float]], repeats: int, precision: float | None, limit_s: float
) -> dict[str, list[float]]:
    """Take samples in blocks, with one of the reference before each.

    Args:
        block: takes so many samples, microseconds.
        repeats: at least so many.
        precision: go on until half the 95 % interval of the median is at most this fraction of it; None: do not.
        limit_s: stop all the same after so many seconds.
    """
    samples: list[float] = []
    reference: list[float] = []
    started = time.monotonic()
    while len(samples) < repeats or (
        precision is not None
        and relative_half_width(samples, statistics.median(samples)) > precision
        and time.monotonic() - started < limit_s
    ):
        reference.append(_reference_us())
        samples += block(min(BLOCK, repeats - len(samples)) if len(samples) < repeats else BLOCK)
    return {"samples_us": samples, "reference_us": reference}


def _reference_us() -> float:
    """Time of a fixed piece of work that neither memory nor wide instructions hold up: it follows the clock alone."""
    start = time.perf_counter_ns()
    hashlib.sha256(_REFERENCE).digest()
    return (time.perf_counter_ns() - start) / 1e3


def _cold_us(run: Callable[[], Any], flushed: Any) -> float:
    """Time of one run after the caches were filled with something else."""
    flushed += 1  # written, not only read, so that every line is fetched and becomes this core's
    start = time.perf_counter_ns()
    run()
    return (time.perf_counter_ns() - start) / 1e3


def _kernel(request: dict[str, Any]) -> dict[str, Any]:
    import numpy as np
    import tvm

    from lightning_baqe.deploy.artifact import load_library

    module = load_library(request["kernel"])
    with np.load(request["arguments"], allow_pickle=False) as arrays:
        arguments = [tvm.runtime.tensor(arrays[f"a{i}"]) for i in range(len(arrays.files) - 1)]
        want = arrays["result"]
    # Buffers of our templates are flat and end in slack; other kernels' results have several dimensions.
    shape = want.shape if want.ndim > 1 else (len(want) + SLACK,)
    result = tvm.runtime.empty(shape, str(want.dtype))
    module["main"](*arguments, result)
    got = result.numpy()[: len(want)]
    if want.dtype == np.float32:
        exact = bool(np.allclose(got, want, rtol=1e-4, atol=1e-3))
    else:
        exact = bool((got == want).all())
    timer = module.time_evaluator(
        "main", tvm.cpu(), number=1, repeat=request["repeats"], min_repeat_ms=request["min_repeat_ms"]
    )
    return {"samples_us": [seconds * 1e6 for seconds in timer(*arguments, result).results], "exact": exact}


def end_with(parent: int) -> None:
    """Have Linux kill this process when the one that asks dies, in the middle of a measurement, too.

    Args:
        parent: its process id.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before
            sys.exit(1)


def main() -> None:
    """Serve requests until standard input ends."""
    end_with(parent=int(sys.argv[2]))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    cores = [int(core) for core in sys.argv[1].split(",")]
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    os.environ["TVM_NUM_THREADS"] = str(len(cores))
    os.environ["OMP_NUM_THREADS"] = "1"
    import tvm  # noqa: F401  loads the runtime before the first request is timed

    answers.write(json.dumps({"ready": True}) + "\n")
    answers.flush()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = _model(request) if "artifact" in request else _kernel(request)
        except Exception as error:  # reported to the asking process, which raises it
            answer = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
