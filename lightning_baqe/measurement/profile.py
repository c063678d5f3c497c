"""What each kernel of a plan takes, in its place in the network."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm.target import Target

from lightning_baqe.deploy.calls import Call, Plan
from lightning_baqe.deploy.compiler import result_type
from lightning_baqe.kernels.x86.layout import as_image
from lightning_baqe.measurement.clock import PROFILED_RUNS, WARM_UP, timed


class KernelProfile:
    """The kernels of a plan, called one by one in the network's order, each with a clock around it.

    So each finds the caches as its predecessors leave them, as in the profiles of other engines. Buffers are used again
    once nothing reads them any more.

    Args:
        plan: the kernels.
        input_shape: ``(channels, height, width)`` or ``(features,)``.
        compiled: kernels of the same target by key, such as other plans left there; what is missing is added.
    """

    def __init__(
        self, plan: Plan, input_shape: tuple[int, ...], compiled: dict[str, Callable[..., Any]] | None = None
    ) -> None:
        self.plan = plan
        compiled = {} if compiled is None else compiled
        missing = {call.key: call for call in plan.calls if call.key not in compiled}
        if missing:
            kernels = {key: call.function().with_attr("global_symbol", key) for key, call in missing.items()}
            library = tvm.compile(tvm.IRModule(kernels), target=Target(plan.options.target.tvm))
            compiled.update({key: library.mod[key] for key in missing})  # each keeps its library alive
        self._image = tvm.runtime.empty((1, *as_image(input_shape)), "float32")
        self._steps = [
            (compiled[call.key], arguments) for call, arguments in zip(plan.calls, self._all_arguments(), strict=True)
        ]
        self._samples_us: list[list[float]] = [[] for _ in plan.calls]

    def _all_arguments(self) -> list[list[Any]]:
        last_use = {name: at for at, call in enumerate(self.plan.calls) for name in self._buffers(call)}
        free: dict[tuple[tuple[int, ...], str], list[Any]] = {}
        held: dict[str, Any] = {}
        everything = []
        for at, call in enumerate(self.plan.calls):
            for name in call.results:
                kind = result_type(name, self.plan)
                shape, dtype = tuple(int(extent) for extent in kind.shape), str(kind.dtype)
                spare = free.get((shape, dtype))
                if self.plan.buffer(name) not in held:
                    made = spare.pop() if spare else tvm.runtime.tensor(np.zeros(shape, dtype))
                    held[self.plan.buffer(name)] = made
            arguments = [
                tvm.runtime.tensor(self.plan.constants[a])
                if a in self.plan.constants
                else held.get(self.plan.buffer(a), self._image)
                for a in call.arguments
            ]
            everything.append([*arguments, *(held[self.plan.buffer(name)] for name in call.results)])
            for name in self._buffers(call):
                if last_use[name] == at and name in held and name != self.plan.output:
                    buffer = held.pop(name)
                    free.setdefault((tuple(buffer.shape), str(buffer.dtype)), []).append(buffer)
        self._output = held[self.plan.output]
        return everything

    def _buffers(self, call: Call) -> set[str]:
        """Buffers that a call reads, and a shared one that it writes to."""
        read = {self.plan.buffer(argument) for argument in call.arguments if argument not in self.plan.constants}
        return read | {self.plan.buffer(name) for name in call.results if name in self.plan.buffers}

    def run(self, image: np.ndarray) -> np.ndarray:
        """Call all kernels on a float32 image ``(1, *input_shape)``, note what each takes, and return the output."""
        self._image.copyfrom(image.reshape(self._image.shape))
        clock = time.perf_counter_ns
        for samples, (kernel, arguments) in zip(self._samples_us, self._steps, strict=True):
            start = clock()
            kernel(*arguments)
            samples.append((clock() - start) / 1e3)
        return np.asarray(self._output.numpy())

    def calls(self) -> list[tuple[Call, list[np.ndarray]]]:
        """Each call with its arguments as they are now, copied, the result last."""
        return [
            (call, [argument.numpy().copy() for argument in arguments])
            for call, (_, arguments) in zip(self.plan.calls, self._steps, strict=True)
        ]

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
