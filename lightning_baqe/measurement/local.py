"""This machine as a device: kernels and networks run in measuring processes of their own, pinned to their cores."""

from __future__ import annotations

import atexit
import statistics
from pathlib import Path
from typing import Any, ClassVar, final

import torch

from lightning_baqe.deploy.artifact import Artifact
from lightning_baqe.deploy.verify import verify
from lightning_baqe.errors import ConfigError
from lightning_baqe.hardware.description import detected_caches
from lightning_baqe.hardware.identity import device_info
from lightning_baqe.hardware.target import CpuTarget, can_run, usable_cores
from lightning_baqe.measurement.device import REPEATS, Device, Kernel, KernelTurn, Measurement, Sampling
from lightning_baqe.measurement.peak import pinned_peak_gmacs
from lightning_baqe.measurement.worker_process import WorkerProcess

MIN_REPEAT_MS = 2
KERNEL_TIMEOUT_S = 30.0


@final
class Local(Device):
    """The CPU that this process runs on. All objects share the measuring processes, which share the cores."""

    _processes: ClassVar[dict[int, WorkerProcess]] = {}

    def info(self, threads: int = 1) -> dict[str, Any]:
        return device_info(threads)

    def can_run(self, target: CpuTarget) -> bool:
        return can_run(target.path, target.vbmi)

    def run(self, artifact: Artifact, x: torch.Tensor) -> torch.Tensor:
        return artifact.run(x)

    def verify(self, artifact: Artifact, x: torch.Tensor) -> dict[str, int]:
        return verify(artifact, x)

    def measure_artifact(self, artifact: Artifact, folder: Path, sampling: Sampling) -> Measurement:
        request = {
            "artifact": str(folder.resolve()), "repeats": sampling.repeats, "warmup": sampling.warmup,
            "precision": sampling.precision, "limit_s": sampling.limit_s,
            "flush_bytes": flush_bytes() if sampling.cold else 0,
        }  # fmt: skip
        answer = self.process(artifact.threads).ask(request, sampling.timeout_s)
        samples, reference = (tuple(answer[name]) for name in ("samples_us", "reference_us"))
        return Measurement(statistics.median(samples), samples, self.info(artifact.threads), reference_us=reference)

    def measure_kernel(self, kernel: Kernel) -> KernelTurn:
        library, arguments = map(str, kernel.files())
        request = {"kernel": library, "arguments": arguments, "repeats": REPEATS, "min_repeat_ms": MIN_REPEAT_MS}
        answer = self.process(kernel.threads).ask(request, KERNEL_TIMEOUT_S)
        return KernelTurn(tuple(answer["samples_us"]), answer["exact"])

    def measure_peak(self, target: CpuTarget, dot: str, chain: int) -> float:
        return pinned_peak_gmacs(target, dot, chain, core=usable_cores()[-1], fastest=True)

    def process(self, threads: int) -> WorkerProcess:
        """The measuring process for so many threads."""
        if threads not in self._processes:
            self._processes[threads] = WorkerProcess(threads)
            atexit.register(self._processes[threads].close)
        return self._processes[threads]

    def close(self) -> None:
        for process in self._processes.values():
            process.close()


def reach(how: str, records: Path | str | None = None) -> Device:
    """The device that one gets to in this way, as descriptions name it: ``local``. ConfigError for any other;
    ``records`` is the path of its records database, None the user's.
    """
    if how != "local":
        raise ConfigError(f"unknown device {how!r}; give 'local' or a Device")
    return Local(records)


def flush_bytes() -> int:
    """Enough to displace all that any cache holds: twice the largest one, or 64 MiB where nobody tells its size."""
    return 2048 * max(size for _, size in detected_caches()) or 64 * 2**20
