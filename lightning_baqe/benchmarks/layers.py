"""What each kernel of a plan takes, in its place in the network."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
import tvm
from tvm.target import Target

from lightning_baqe.benchmarks.engine_inputs import PROFILED_RUNS, WARM_UP, timed
from lightning_baqe.deploy.compiler import result_type
from lightning_baqe.deploy.kernels import Call, Plan
from lightning_baqe.deploy.layout import Layout


class KernelProfile:
    """The kernels of a plan, called one by one in the network's order, each with a clock around it.

    So each finds the caches as its predecessors leave them, as in the profiles of other engines. Buffers are used again
    once nothing reads them any more.

    Args:
        plan: the kernels.
        input_shape: ``(channels, height, width)``.
    """

    def __init__(self, plan: Plan, input_shape: tuple[int, ...]) -> None:
        self.plan = plan
        kernels = {call.key: call.function().with_attr("global_symbol", call.key) for call in plan.calls}
        self._library = tvm.compile(tvm.IRModule(kernels), target=Target(plan.target.tvm))
        self._image = tvm.runtime.empty((1, *input_shape), "float32")
        self._steps = [
            (self._library.mod[call.key], arguments)
            for call, arguments in zip(plan.calls, self._all_arguments(), strict=True)
        ]
        self._samples_us: list[list[float]] = [[] for _ in plan.calls]

    def _all_arguments(self) -> list[list[Any]]:
        last_use = {name: at for at, call in enumerate(self.plan.calls) for name in self._buffers(call)}
        free: dict[tuple[int, str], list[Any]] = {}
        held: dict[str, Any] = {}
        everything = []
        for at, call in enumerate(self.plan.calls):
            kind = result_type(call, self.plan)
            shape, dtype = tuple(int(extent) for extent in kind.shape), str(kind.dtype)
            target = self.plan.buffer(call.result)
            spare = free.get((int(np.prod(shape)), dtype))
            if target not in held:
                held[target] = spare.pop() if spare else tvm.runtime.tensor(np.zeros(shape, dtype))
            arguments = [
                tvm.runtime.tensor(np.ascontiguousarray(a))
                if isinstance(a, np.ndarray)
                else held.get(self.plan.buffer(a), self._image)
                for a in call.arguments
            ]
            everything.append([*arguments, held[target]])
            for name in self._buffers(call):
                if last_use[name] == at and name in held:
                    layout: Layout = self.plan.layouts[name]
                    free.setdefault((layout.length, layout.dtype), []).append(held.pop(name))
        return everything

    def _buffers(self, call: Call) -> set[str]:
        """Buffers that a call reads, and a shared one that it writes to."""
        read = {self.plan.buffer(argument) for argument in call.arguments if isinstance(argument, str)}
        return read | ({self.plan.buffer(call.result)} if call.result in self.plan.buffers else set())

    def run(self, image: np.ndarray) -> np.ndarray:
        """Call all kernels on a float32 image ``(1, channels, height, width)``, note what each takes, and return
        the output."""
        self._image.copyfrom(image)
        clock = time.perf_counter_ns
        for samples, (kernel, arguments) in zip(self._samples_us, self._steps, strict=True):
            start = clock()
            kernel(*arguments)
            samples.append((clock() - start) / 1e3)
        return np.asarray(self._steps[-1][1][-1].numpy())

    def profile(self, image: np.ndarray, seconds: float) -> list[dict[str, Any]]:
        """Run for so many seconds, after warming up.

        Returns:
            in order: ``{"name": kernel, "names": the graph's nodes that it computes, "op", "us": mean, "knobs"}``.
        """
        for _ in range(WARM_UP):
            self.run(image)
        for samples in self._samples_us:
            samples.clear()
        timed(lambda: self.run(image), seconds, most=PROFILED_RUNS)
        return [
            {
                "name": call.key,
                "names": list(call.nodes),
                "op": call.key.rpartition("_")[0],
                "us": statistics.mean(samples),
                "knobs": dict(call.knobs),
            }
            for call, samples in zip(self.plan.calls, self._samples_us, strict=True)
        ]
