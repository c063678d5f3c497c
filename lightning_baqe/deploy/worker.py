"""The process that measures: reads one request a line on standard input, answers with one line.

Requests: ``{"artifact": folder, "repeats": n, "warmup": n}`` (whole model) or ``{"kernel": library, "arguments": npz,
"repeats": n, "min_repeat_ms": n}`` (one kernel, see :mod:`lightning_baqe.deploy.kernel_bench`; the answer says whether
its result is ``exact``: equal, or close for floats). Answers: ``{"samples_us": [...]}`` or ``{"error": text}``. Pinned
to its cores before TVM starts its threads; anything that native code prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

from lightning_baqe.deploy.layout import SLACK


def _model(request: dict[str, Any]) -> dict[str, Any]:
    import tvm

    from lightning_baqe.deploy.artifact import Artifact
    from lightning_baqe.deploy.compiler import MAIN

    vm = Artifact.load(request["artifact"]).vm
    for _ in range(request["warmup"]):
        vm.invoke_stateful(MAIN)
    timer = vm.time_evaluator("invoke_stateful", tvm.cpu(), number=1, repeat=request["repeats"])
    return {"samples_us": [seconds * 1e6 for seconds in timer(MAIN).results]}


def _kernel(request: dict[str, Any]) -> dict[str, Any]:
    import numpy as np
    import tvm

    module = tvm.runtime.load_module(request["kernel"])
    with np.load(request["arguments"], allow_pickle=False) as arrays:
        arguments = [tvm.runtime.tensor(arrays[f"a{i}"]) for i in range(len(arrays.files) - 1)]
        want = arrays["result"]
    result = tvm.runtime.empty((len(want) + SLACK,), str(want.dtype))
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


def main() -> None:
    """Serve requests until standard input ends."""
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
