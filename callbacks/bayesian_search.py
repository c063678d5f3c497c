"""The outer loop of BAQE (Algorithm 2) as a Lightning callback: every epoch block of one ``Trainer.fit`` is a trial."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch

from lightning_baqe.callbacks.company import check_company
from lightning_baqe.callbacks.host import RepeatsTraining, network_of
from lightning_baqe.callbacks.search_loop import SearchLoop, is_dry_run, run_folder
from lightning_baqe.errors import ConfigError
from lightning_baqe.runs.search_arguments import SearchArguments


class BayesianSearch(SearchArguments, RepeatsTraining):
    """Search bit-widths and schedules inside anybody's Trainer, with anybody's LightningModule and data.

    The module's float network is replaced, trial after trial, by a fake-quantized copy that starts from the float
    weights; their training step tunes it for ``epochs_per_trial`` epochs; the compiled network is then evaluated on
    their validation loader and measured on the device. The first blocks are the baselines (uniform bits, default
    schedules). Training ends after the last trial, with the float network back in its place.

    Everything is in the run folder: the study, ``summary.json`` and ``pareto.csv`` after every trial, artifacts of the
    Pareto set, ``report.html`` at the end. The same call with the same ``run_dir`` goes on where it was interrupted.

    Args:
        network: attribute of the LightningModule that holds the float network; dots reach deeper.
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
        correct: what each trial's weights start from: ``"none"``, rounded to the nearest; ``"fast"``, ``"best"``:
            corrected, see :func:`lightning_baqe.calibrate`.
        limits: ``{"latency_us": at most, "size_bytes": at most, "accuracy": at least}``, any of them: constraints that
            steer the search. Those that no point can meet end it before the first trial.
        recover: begin a damaged ``study.db`` of the run folder anew, from its backup and the summary; the damaged file
            is kept beside it, and one that is whole stays.
        prune: give up trials whose accuracy before the tuning, or after an epoch of it, tells that they cannot reach
            the front; they do not count as ``trials``, and are at most as many. Mode ``beyond`` alone.
        prior: what mode ``beyond`` orders bits by before any trial, how much each layer's quantization disturbs the
            network: ``"divergence"`` of the outputs; by their cross entropy with the targets of the first training
            batch, which wants logits, ``"hessian"``, ``"fisher"`` or ``"scales"`` (:mod:`lightning_baqe.allocation`).
        tune_s: seconds for tuning the network's kernels at each bit-width before the search, the float model's first,
            so that it is no straw man; what the records hold already takes no time.
        recipe: a name for the summary.
        model_name: likewise; None: the network's class.
        records: path of this machine's records database; None: the user's.
        progress: show a progress bar where Lightning shows none.
        metric: what accuracy is: a torchmetrics metric of outputs and targets, one number, at most 1, of which higher
            is better; the first objective is 1 - metric. Each evaluation, of the float network, the fake-quantized
            ones, the compiled ones and the test split, has a fresh copy of it. None: the accuracy that the first
            validation batch calls for, said at the start: top-1, binary, multi-label or of pixels
            (:mod:`lightning_baqe.tasks.scoring`).

    Raises:
        ConfigError: an argument that can never be right; on setup, before anything is trained: one that cannot be right
            for this module or trainer, a run folder, storage or records that cannot be written, weights of another type
            than float32, outputs and targets that the metric does not take, or that no accuracy is known for, or a
            callback in the same Trainer that holds on to one network (averages of weights, fine-tuning, pruning) or
            compares epochs of different trials (early stopping).
        InfeasibleError: before the first trial, a limit cannot be met; names the nearest value that can.

    Attributes:
        loop: over the trials of the present or last fit.
    """

    loop: SearchLoop | None = None
    _limit_before: int | float | None = None  # the trainer's limit_train_batches

    @property
    def gave_up(self) -> str | None:
        """Why the last fit ended before its trials were complete; None where it did not."""
        return None if self.loop is None else self.loop.gave_up

    # -- Lightning's hooks --------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self.loop = None
        network = network_of(pl_module, self.network)
        if isinstance(network, torch._dynamo.OptimizedModule):
            raise ConfigError(
                f"{type(pl_module).__name__}.{self.network} is compiled; the search quantizes the module itself: "
                "give it before torch.compile"
            )
        check_company(trainer, network)
        if trainer.is_global_zero:
            self.check_places(run_folder(self, trainer))
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
