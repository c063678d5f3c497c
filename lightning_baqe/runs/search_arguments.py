"""What a search is told: the arguments of the callback, checked when they are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import optuna
import torch
from torchmetrics import Metric

from lightning_baqe.allocation.evidence import Sensitivity
from lightning_baqe.allocation.fisher import OutputFisher
from lightning_baqe.allocation.hessian import HessianTrace
from lightning_baqe.allocation.learned_scales import LearnedScales
from lightning_baqe.allocation.measured_losses import Divergence
from lightning_baqe.calibration.corrections import CORRECTIONS
from lightning_baqe.costs.bit_rewards import PAPER_CHOICES, WIDTHS
from lightning_baqe.errors import ConfigError
from lightning_baqe.files import make_folder
from lightning_baqe.hardware.description import DeviceDescription
from lightning_baqe.hardware.options import BuildOptions
from lightning_baqe.hardware.target import get_target
from lightning_baqe.measurement.device import Device
from lightning_baqe.measurement.local import reach
from lightning_baqe.quantization.config import FLOAT_BITS, BitConfig, layers
from lightning_baqe.quantization.observer import parse_range
from lightning_baqe.runs.evaluation import MeasureOptions
from lightning_baqe.runs.front import read_limits
from lightning_baqe.runs.recovery import restore
from lightning_baqe.runs.study import read_study
from lightning_baqe.runs.study_storage import open_storage, storage_url
from lightning_baqe.search.sampler import Mode
from lightning_baqe.tasks.scoring import check_metric

# What a search of mode `beyond` orders bits by before any trial. The first one needs no targets.
PRIORS: dict[str, Sensitivity] = {
    "divergence": Divergence(),
    "hessian": HessianTrace(),
    "fisher": OutputFisher(),
    "scales": LearnedScales(),
}


@dataclass(eq=False, repr=False)
class SearchArguments:
    """Arguments of ``BayesianSearch``, which documents them, and what follows from them.

    Attributes:
        widths: ``bit_choices`` with ``auto`` resolved.
        options: what is compiled for.
        measured_on: ``measure_on``, or what takes its place.

    Raises:
        ConfigError: an argument that can never be right.
    """

    network: str = "net"
    trials: int = 40
    epochs_per_trial: int = 1
    steps_per_trial: int | None = None
    example_input: torch.Tensor | None = None
    run_dir: str | Path | None = None
    bit_choices: Sequence[int] | Literal["auto"] = "auto"
    baselines: Sequence[int] = (8, 4)
    schedules: bool = True
    mode: Mode = "beyond"
    n_initial: int = 10
    pool_size: int = 500
    seed: int = 0
    sampler: optuna.samplers.BaseSampler | None = None
    storage: str | None = None
    study_name: str | None = None
    max_failures: int = 20
    limits: Mapping[str, float | None] | None = None
    recover: bool = False
    target: str = "native"
    threads: int = 1
    device: DeviceDescription | None = None
    measure_on: Device | None = None
    measurement: MeasureOptions | None = None
    calibration_batches: int = 8
    activation_range: str = "mse"
    correct: str = "none"
    prune: bool = False
    prior: str = "divergence"
    tune_s: float = 30.0
    recipe: str = "bayesian_search"
    model_name: str | None = None
    records: str | Path | None = None
    progress: bool = True
    metric: Metric | None = None

    widths: tuple[int, ...] = field(init=False)
    options: BuildOptions = field(init=False)
    measured_on: Device = field(init=False)

    def __post_init__(self) -> None:
        for name in ("trials", "epochs_per_trial", "max_failures", "calibration_batches", "steps_per_trial"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        automatic = PAPER_CHOICES if self.mode == "paper" else WIDTHS
        self.widths = tuple(automatic if self.bit_choices == "auto" else self.bit_choices)
        for what, widths in (("bit_choices", self.widths), ("baselines", self.baselines)):
            wrong = [bits for bits in widths if bits != FLOAT_BITS and not 2 <= bits <= 8]
            if wrong or len(set(widths)) < len(widths) or (what == "bit_choices" and not widths):
                raise ConfigError(f"{what} are 2..8 or 32 (float), each once; got {list(widths)}")
        if self.prune and (self.mode != "beyond" or self.sampler is not None):
            raise ConfigError(
                f"prune=True with mode={self.mode!r} and sampler={type(self.sampler).__name__}; it weighs what mode "
                "'beyond' knows of latency and size: give mode='beyond' and no sampler, or prune=False"
            )
        if self.recover and self.storage is not None:
            raise ConfigError(
                f"recover=True with storage={self.storage!r}; it is for the run folder's own study.db: recover a "
                "database of your own by its own backups, and leave recover out"
            )
        if self.metric is not None:
            check_metric(self.metric)
        parse_range(self.activation_range)
        if self.correct not in CORRECTIONS:
            raise ConfigError(f"correct={self.correct!r}, wanted is one of {', '.join(map(repr, CORRECTIONS))}")
        if self.prior not in PRIORS:
            raise ConfigError(f"prior={self.prior!r}, wanted is one of {', '.join(map(repr, PRIORS))}")
        if self.prior != "divergence" and self.mode != "beyond":
            raise ConfigError(
                f"prior={self.prior!r} with mode={self.mode!r}, which begins without one: give mode='beyond'"
            )
        read_limits(self.limits)
        fuses = self.device is None or self.device.options.fuse_residual
        self.options = BuildOptions(get_target(self.target), self.threads, fuses)
        if self.measure_on is not None and self.records is not None:
            raise ConfigError(f"records={str(self.records)!r}, but measure_on keeps its own: give one of them")
        self.measured_on = self.measure_on or reach("local" if self.device is None else self.device.reach, self.records)

    def check_bits(self, network: torch.nn.Module) -> dict[str, tuple[int, ...]] | None:
        """Check that the device has kernels for what this search will try.

        Args:
            network: the float network, trained or not.

        Returns:
            ``{layer: the bits of bit_choices that it may have}`` of the layers that are searched; None: all.

        Raises:
            ConfigError: names the layer and the bits that it could have.
        """
        if self.device is None:
            return None
        for bits in (FLOAT_BITS, 8, *self.baselines):
            self.device.check_bits(network, BitConfig.uniform(network, bits, bits))
        return self.device.choices(network, self.widths, layers(network)[1:-1])

    def check_places(self, run_dir: Path) -> None:
        """See that what is found can be kept, before anything is trained.

        Args:
            run_dir: the run folder; made if it is not there.

        Raises:
            ConfigError: run folder, storage or records cannot be opened and written.
        """
        make_folder(run_dir, "run_dir")
        if self.recover:
            restore(run_dir, read_study)
        open_storage(storage_url(run_dir, self.storage)).engine.dispose()
        _ = self.measured_on.records
