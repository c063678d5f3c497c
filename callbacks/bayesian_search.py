"""The outer loop of BAQE (Algorithm 2) as a Lightning callback: every epoch block of one ``Trainer.fit`` is a trial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import optuna
import pytorch_lightning as pl
import torch

from lightning_baqe.callbacks.host import RepeatsTraining, network_of
from lightning_baqe.callbacks.search_loop import SearchLoop, is_dry_run
from lightning_baqe.costs.bit_rewards import PAPER_CHOICES, WIDTHS
from lightning_baqe.errors import ConfigError
from lightning_baqe.hardware.description import DeviceDescription
from lightning_baqe.hardware.options import BuildOptions
from lightning_baqe.hardware.target import get_target
from lightning_baqe.measurement.device import Device
from lightning_baqe.measurement.local import reach
from lightning_baqe.quantization.config import FLOAT_BITS, BitConfig, layers
from lightning_baqe.quantization.observer import parse_range
from lightning_baqe.runs.evaluation import MeasureOptions
from lightning_baqe.runs.front import read_limits
from lightning_baqe.search.sampler import Mode


@dataclass(eq=False, repr=False)
class BayesianSearch(RepeatsTraining):
    """Search bit-widths and schedules inside anybody's Trainer, with anybody's LightningModule and data.

    The module's float classifier is replaced, trial after trial, by a fake-quantized copy that starts from the float
    weights; their training step tunes it for ``epochs_per_trial`` epochs; the compiled network is then evaluated on
    their validation loader and measured on the device. The first blocks are the baselines (uniform bits, default
    schedules). Training ends after the last trial, with the float network back in its place.

    Everything is in the run folder: the study, ``summary.json`` and ``pareto.csv`` after every trial, artifacts of the
    Pareto set, ``report.html`` at the end. The same call with the same ``run_dir`` goes on where it was interrupted.

    Args:
        network: attribute of the LightningModule that holds the float classifier; dots reach deeper.
        trials: complete trials to reach; failed ones are tried beyond them.
        epochs_per_trial: training epochs of each trial.
        steps_per_trial: training steps of each epoch; None leaves the trainer's ``limit_train_batches``.
        example_input: a batch ``(n, channels, height, width)``; None takes one from the training loader.
        run_dir: the run folder; None: ``outputs/bayesian_search`` in the trainer's default root.
        bit_choices: of every layer but the first and the last, which stay at 8. ``auto``: BAQE's 4, 8 and 32 in mode
            ``paper``, else what the device rewards (:func:`~lightning_baqe.costs.bit_rewards.default_bit_choices`).
        baselines: uniform bit-widths evaluated first, outside the trials.
        schedules: whether mode ``paper`` searches kernel knobs, too; in mode ``beyond`` every layer gets the best known
            ones for its bits.
        mode: of :class:`~lightning_baqe.search.BaqeSampler`; ``n_initial``, ``pool_size``, ``seed`` likewise.
        sampler: any Optuna sampler instead.
        storage: URL of an SQLite file or a PostgreSQL database; None: SQLite in the run folder. Processes with the
            same ``run_dir``, or the same storage and ``study_name``, share the trials among them.
        study_name: of the study in the storage; None: the run folder's name.
        max_failures: give up after so many failed trials.
        target, threads: what is compiled for.
        device: what the device has kernels for: no layer is offered other bits, and residual sums are fused where it
            says so. None: everything that ``target`` has.
        measure_on: the device that everything is measured on, with its records; None: the one that ``device`` reaches,
            or this machine.
        measurement: how latency is measured.
        calibration_batches: training batches that initialise the quantizers of each trial.
        activation_range: what they derive clipping ranges by; of :func:`lightning_baqe.quantize`.
        limits: ``{"latency_us": at most, "size_bytes": at most, "accuracy": at least}``, any of them: constraints that
            steer the search. Those that no point can meet end it before the first trial.
        prune: give up trials whose accuracy before the tuning, or after an epoch of it, tells that they cannot reach
            the front; they do not count as ``trials``, and are at most as many. Mode ``beyond`` alone.
        tune_s: seconds for tuning the network's kernels at each bit-width before the search, the float model's first,
            so that it is no straw man; what the records hold already takes no time.
        recipe: a name for the summary.
        model_name: likewise; None: the network's class.
        records: path of this machine's records database; None: the user's.
        progress: show a progress bar where Lightning shows none.

    Raises:
        ConfigError: on setup, an argument that cannot be right for this module or trainer.
        InfeasibleError: before the first trial, a limit cannot be met; names the nearest value that can.

    Attributes:
        widths: ``bit_choices`` with ``auto`` resolved.
        options: what is compiled for.
        measured_on: ``measure_on``, or what takes its place.
        loop: over the trials of the present or last fit.
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
    target: str = "native"
    threads: int = 1
    device: DeviceDescription | None = None
    measure_on: Device | None = None
    measurement: MeasureOptions | None = None
    calibration_batches: int = 8
    activation_range: str = "mse"
    prune: bool = False
    tune_s: float = 30.0
    recipe: str = "bayesian_search"
    model_name: str | None = None
    records: str | Path | None = None
    progress: bool = True

    widths: tuple[int, ...] = field(init=False)
    options: BuildOptions = field(init=False)
    measured_on: Device = field(init=False)
    loop: SearchLoop | None = field(init=False, default=None)
    _limit_before: int | float | None = field(init=False, default=None)  # the trainer's limit_train_batches

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
        parse_range(self.activation_range)
        read_limits(self.limits)
        fuses = self.device is None or self.device.options.fuse_residual
        self.options = BuildOptions(get_target(self.target), self.threads, fuses)
        if self.measure_on is not None and self.records is not None:
            raise ConfigError(f"records={str(self.records)!r}, but measure_on keeps its own: give one of them")
        self.measured_on = self.measure_on or reach("local" if self.device is None else self.device.reach, self.records)

    @property
    def gave_up(self) -> str | None:
        """Why the last fit ended before its trials were complete; None where it did not."""
        return None if self.loop is None else self.loop.gave_up

    def check_bits(self, network: torch.nn.Module) -> dict[str, tuple[int, ...]] | None:
        """Check that the device has kernels for what this search will try.

        Args:
            network: the float classifier, trained or not.

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

    # -- Lightning's hooks --------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self.loop = None
        if isinstance(network_of(pl_module, self.network), torch._dynamo.OptimizedModule):
            raise ConfigError(
                f"{type(pl_module).__name__}.{self.network} is compiled; the search quantizes the module itself: "
                "give it before torch.compile"
            )
        if self.steps_per_trial is not None and not is_dry_run(trainer):
            self._limit_before, trainer.limit_train_batches = trainer.limit_train_batches, self.steps_per_trial

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._limit_before is not None:
            trainer.limit_train_batches = self._limit_before
            self._limit_before = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.loop = SearchLoop(self, trainer, pl_module)
        self.loop.start()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.loop is not None:
            self.loop.begin_epoch()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.loop is not None:
            self.loop.look_at_step(batch_idx, outputs.get("loss") if isinstance(outputs, dict) else outputs)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.loop is not None:
            self.loop.end_epoch()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.loop is not None:
            self.loop.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")  # Lightning calls it only where nothing was raised
        if self.loop is not None:
            self.loop.close(test=False)
