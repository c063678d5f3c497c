"""All engines of one network in one interleaved run."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_baqe.engines.engine_process import agreement, command
from lightning_baqe.engines.layer_tables import Layer, assign, median_rows, network_layers
from lightning_baqe.engines.requests import EngineRequest, probe_images
from lightning_baqe.engines.zoo import default_size, export_onnx, random_network
from lightning_baqe.errors import ConfigError, MeasurementError
from lightning_baqe.hardware.target import get_target
from lightning_baqe.measurement.peak import pinned_peak_gmacs
from lightning_baqe.scratch import temporary_folder

Report = Callable[[str], None]
Ask = Callable[..., dict[str, Any]]


@dataclass
class EngineResult:
    """One row of the table.

    Args:
        engine: its name, see :mod:`lightning_baqe.engines.engine_process`.
        rounds_us: median latency of each round's burst.
        info: what the engine told of itself.
        floor_us: the physical floor of its arithmetic, by round; ours only.
        agreement: with the float network, see :func:`lightning_baqe.engines.engine_process.agreement`.
    """

    engine: str
    threads: int = 1
    rounds_us: list[float] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    floor_us: list[float] = field(default_factory=list)
    agreement: float | None = None

    @property
    def latency_us(self) -> float:
        return statistics.median(self.rounds_us)

    @property
    def fastest_us(self) -> float:
        """The fastest round: what a machine that others use, too, still shows."""
        return min(self.rounds_us)

    @property
    def spread(self) -> float:
        """(Slowest - fastest round) / median."""
        return (max(self.rounds_us) - min(self.rounds_us)) / self.latency_us

    @property
    def is_peer(self) -> bool:
        return not self.engine.startswith("ours")

    @property
    def is_default(self) -> bool:
        """A peer as its users get it."""
        return self.is_peer and not self.engine.endswith("-exact")

    @property
    def is_float(self) -> bool:
        return self.engine.endswith("fp32")


@dataclass(frozen=True)
class RunOptions:
    """How networks are measured.

    Args:
        threads: every engine runs with each of these numbers.
        rounds: turns of all engines.
        burst_s: seconds of one turn of one engine.
        size: of the square image; None for each network's own.
        bits: file with the bit-config of ``ours-mixed``, or None.
        layers: also time every kernel of every engine that can, in bursts of their own.
        exact: also check the engines' integer arithmetic, see :mod:`lightning_baqe.engines.saturation`.
    """

    engines: tuple[str, ...]
    threads: tuple[int, ...] = (1,)
    rounds: int = 5
    burst_s: float = 0.5
    size: int | None = None
    bits: str | None = None
    layers: bool = False
    exact: bool = False


@dataclass
class ModelRun:
    """What was measured of one network.

    Args:
        results: by thread count, engines in the order of the options.
        left_out: ``{engine: reason}``.
        layers: of the network, with ``RunOptions.layers``.
        profiles: rows of :func:`lightning_baqe.engines.layer_tables.assign` by thread count and engine.
        exactness: rows of :func:`lightning_baqe.engines.saturation.difference` by engine.
    """

    size: int
    results: list[EngineResult] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)
    profiles: dict[int, dict[str, list[dict[str, Any]]]] = field(default_factory=dict)
    exactness: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


@contextmanager
def engine_process(request: EngineRequest, cores: list[int]) -> Iterator[Ask]:
    """An engine's process, pinned to as many cores as it has threads.

    Gives a function that sends a request, see :func:`lightning_baqe.engines.engine_process.serve`, and returns the
    answer; without a request the next answer. It raises MeasurementError, with the end of what the process wrote, when
    the process has died.
    """
    threads = str(request.threads)
    with tempfile.TemporaryFile(mode="w+") as errors:
        process = subprocess.Popen(
            command(request, cores), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            env=os.environ | {"OMP_NUM_THREADS": threads, "TVM_NUM_THREADS": threads},
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        send, receive = process.stdin, process.stdout

        def ask(question: dict[str, Any] | None = None) -> dict[str, Any]:
            if question is not None:
                send.write(json.dumps(question) + "\n")
                send.flush()
            line = receive.readline()
            if not line:
                errors.seek(0)
                raise MeasurementError(f"the process of {request.engine} died: {errors.read()[-3000:].strip()}")
            answer: dict[str, Any] = json.loads(line)
            return answer

        try:
            yield ask
        finally:
            process.kill()
            process.communicate()  # waits, and closes the pipes


_Pair = tuple[EngineResult, Ask]


def usable_cores() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def run_model(model: str, options: RunOptions, report: Report = lambda text: None) -> ModelRun:
    """Measure one network in all engines, with every number of threads, in the same rounds.

    A peer that cannot be prepared is left out, with the reason; one of ours that cannot is an error.

    ``model`` is a name of torchvision or timm; ``report`` is told what is done next. ConfigError for more threads than
    cores or no such network, MeasurementError where an engine's process died.
    """
    usable = usable_cores()
    if max(options.threads) > len(usable):
        raise ConfigError(f"{max(options.threads)} threads are asked for, but this process may use {len(usable)} cores")
    run = ModelRun(options.size or default_size(model))
    with temporary_folder() as folder, ExitStack() as stack:
        weights, onnx = Path(folder) / "weights.pt", Path(folder) / "network.onnx"
        report(f"{model}: the float network")
        network = random_network(model, run.size)
        torch.save(network.state_dict(), weights)
        if options.layers or any(not engine.startswith("ours") for engine in options.engines):
            export_onnx(network, onnx, run.size)
        with torch.no_grad():
            reference = network(torch.from_numpy(probe_images(run.size))).numpy()
        if options.layers:
            run.layers = network_layers(network, onnx, run.size)
        pairs: list[_Pair] = []
        for threads in options.threads:
            for engine in options.engines:
                if engine in run.left_out:
                    continue
                report(f"{model}: {engine}, {threads} thread(s), is prepared")
                request = EngineRequest(engine, model, str(weights), str(onnx), threads, run.size, options.bits)
                ask = stack.enter_context(engine_process(request, usable[-threads:]))
                result = EngineResult(engine, threads)
                try:
                    ready = ask()
                except MeasurementError as error:
                    if not result.is_peer:
                        raise
                    run.left_out[engine] = str(error).splitlines()[-1]
                    continue
                result.info = ready["info"]
                result.agreement = agreement(np.array(ready["logits"]), reference)
                pairs.append((result, ask))
        bursts: dict[tuple[int, str], list[list[dict[str, Any]]]] = {}
        for turn in range(options.rounds):
            report(f"{model}: round {turn + 1} of {options.rounds}")
            _round(_turned(pairs, turn), options.burst_s, usable[-1])
            if options.layers:
                for result, ask in _turned(pairs, turn):
                    kernels = ask({"profile_s": options.burst_s})["kernels"]
                    bursts.setdefault((result.threads, result.engine), []).append(kernels)
        for (threads, engine), profiles in bursts.items():
            if profiles[0]:
                run.profiles.setdefault(threads, {})[engine] = assign(median_rows(profiles), run.layers)
        if options.exact:
            report(f"{model}: checks of the integer arithmetic")
            for result, ask in pairs:
                if result.threads == options.threads[0]:
                    run.exactness[result.engine] = ask({"exact": True})["exactness"]
        run.results = [result for result, _ in pairs]
    return run


def _turned(pairs: list[_Pair], turn: int) -> list[_Pair]:
    """Another one begins in each round, so that none is always the first."""
    start = turn % max(len(pairs), 1)
    return pairs[start:] + pairs[:start]


def _round(pairs: list[_Pair], burst_s: float, core: int) -> None:
    """One burst of each engine, and the floors of the arithmetic of ours, measured on a core."""
    peaks: dict[tuple[str, int], float] = {}
    for result, ask in pairs:
        result.rounds_us.append(statistics.median(ask({"burst_s": burst_s})["samples_us"]))
        if not result.is_peer:
            floor_us = 0.0
            for work in result.info["work"]:
                arithmetic = (work["dot"], work["chain"])
                if arithmetic not in peaks:
                    peaks[arithmetic] = pinned_peak_gmacs(get_target(), *arithmetic, core=core)
                floor_us += work["macs"] / (peaks[arithmetic] * result.threads) / 1e3
            result.floor_us.append(floor_us)
