"""A device that computes in this process and makes its latencies up: nothing is compiled, nothing waits for a clock."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import torch

from lightning_baqe.deploy.artifact import Artifact
from lightning_baqe.deploy.plan import Schedules
from lightning_baqe.hardware.identity import device_info
from lightning_baqe.hardware.options import BuildOptions
from lightning_baqe.hardware.target import CpuTarget
from lightning_baqe.integer.graph import IntegerGraph
from lightning_baqe.measurement.build import choose_plan
from lightning_baqe.measurement.database import canonical
from lightning_baqe.measurement.device import REPEATS, Device, Kernel, KernelTurn, Measurement, Sampling


class FakeDevice(Device):
    """Latency follows the size of a network, and the multiply-accumulates and knobs of a kernel.

    Args:
        records: path of its database.
        runs: whether it runs the code of any target, or of none.
    """

    def __init__(self, records: Path, runs: bool = True) -> None:
        super().__init__(records)
        self.runs = runs
        self.kernels: list[Kernel] = []
        self.networks: list[Artifact] = []

    def kernel_us(self, kernel: Kernel) -> float:
        """Microseconds of a kernel; tests make up others."""
        luck = zlib.crc32(f"{kernel.spec}{canonical(kernel.knobs)}".encode()) % 1000
        return (1.0 + getattr(kernel.spec, "macs", 0) / 1e5) * (1.0 + luck / 1000)

    def network_us(self, artifact: Artifact) -> float:
        """Microseconds of a network; tests make up others."""
        return artifact.size_bytes / 10

    def info(self, threads: int = 1) -> dict[str, Any]:
        return {
            "cpu": "made up", "machine": "paper", "system": "none", "flags": [], "flags_digest": "0", "cores": 1,
            "threads": threads,
        }  # fmt: skip

    def can_run(self, target: CpuTarget) -> bool:
        return self.runs

    def build(self, graph: IntegerGraph, options: BuildOptions, schedules: Schedules | str | None = None) -> Artifact:
        plan = choose_plan(graph, options, schedules, self.records)
        return Artifact(graph, plan, None, Path(__file__))  # any file stands for the library, which nobody loads

    def run(self, artifact: Artifact, x: torch.Tensor) -> torch.Tensor:
        return artifact.graph.run(x)

    def verify(self, artifact: Artifact, x: torch.Tensor) -> dict[str, int]:
        return {node.name: 0 for node in artifact.graph if not node.is_float}

    def measure_artifact(self, artifact: Artifact, folder: Path, sampling: Sampling) -> Measurement:
        self.networks.append(artifact)
        latency_us = self.network_us(artifact)
        return Measurement(latency_us, (latency_us,) * sampling.repeats, self.info(artifact.threads))

    def measure_kernel(self, kernel: Kernel) -> KernelTurn:
        self.kernels.append(kernel)
        return KernelTurn((self.kernel_us(kernel),) * REPEATS, True)

    def measure_peak(self, target: CpuTarget, dot: str, chain: int) -> float:
        return 200.0

    def close(self) -> None:
        pass


class Refusing(FakeDevice):
    """This machine, whose records are believed, where nothing may be measured again."""

    def info(self, threads: int = 1) -> dict[str, Any]:
        return device_info(threads)

    def measure_artifact(self, artifact: Artifact, folder: Path, sampling: Sampling) -> Measurement:
        raise AssertionError("measured again")

    def measure_kernel(self, kernel: Kernel) -> KernelTurn:
        raise AssertionError("measured again")

    def measure_peak(self, target: CpuTarget, dot: str, chain: int) -> float:
        raise AssertionError("measured again")
