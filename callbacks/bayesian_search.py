"""The outer loop of BAQE (Algorithm 2) as a Lightning callback: every epoch block of one ``Trainer.fit`` is a trial."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import optuna
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_warn

from lightning_baqe.callbacks.host import Host, RepeatsTraining
from lightning_baqe.costs.bit_rewards import PAPER_CHOICES, WIDTHS
from lightning_baqe.deploy.digest import fingerprint
from lightning_baqe.errors import BaqeError, ConfigError
from lightning_baqe.hardware.description import DeviceDescription
from lightning_baqe.hardware.options import BuildOptions
from lightning_baqe.hardware.target import get_target
from lightning_baqe.measurement.device import Device
from lightning_baqe.measurement.local import reach
from lightning_baqe.quantization.calibration import calibrate
from lightning_baqe.quantization.config import FLOAT_BITS, BitConfig, architecture_signature, layers
from lightning_baqe.quantization.convert import QuantizedModel, quantize
from lightning_baqe.quantization.observer import parse_range
from lightning_baqe.runs.evaluation import Evaluation, MeasureOptions, evaluate, module_accuracy
from lightning_baqe.runs.limits import read_limits
from lightning_baqe.runs.loggers import log_hypervolume, log_results
from lightning_baqe.runs.preparation import Preparation
from lightning_baqe.runs.progress import SearchProgress
from lightning_baqe.runs.promises import Promises
from lightning_baqe.runs.study import SearchStudy, bits_entry
from lightning_baqe.runs.summary import Baseline, Trial
from lightning_baqe.search.sampler import BaqeSampler, Mode
from lightning_baqe.tuning.network_space import NetworkSpace

WAIT_S = 1.0  # between looks at what other workers do
PROMISED = 8  # validation batches that tell whether a trial is worth its tuning


@dataclass
class _Plan:
    """What comes next: a trial, or a baseline (``trial`` is None)."""

    name: str
    bits: BitConfig
    schedules: dict[str, dict[str, Any]] | str
    trial: optuna.Trial | None
    phase: str
    propose_s: float = 0.0
    model: QuantizedModel | None = None  # calibrated, where the trial has promised something already
    estimate_s: float = 0.0

    def entry(self, seconds: dict[str, float]) -> Trial | Baseline:
        """What the study keeps of it before it is evaluated; ``seconds`` by part."""
        known: dict[str, Any] = {
            "state": "running", "phase": self.phase, "bits": bits_entry(self.bits), "seconds": seconds,
            "schedules": self.schedules if isinstance(self.schedules, dict) else {},
        }  # fmt: skip
        return Baseline(name=self.name, **known) if self.trial is None else Trial(number=self.trial.number, **known)


@dataclass
class _Running:
    """What is being tuned."""

    plan: _Plan
    model: QuantizedModel
    started: float
    epochs: int = 0
    failure: str | None = None

    @property
    def seconds(self) -> dict[str, float]:
        """Spent so far, by part."""
        found = {"train": time.perf_counter() - self.started, "propose": self.plan.propose_s}
        return found | ({"estimate": self.plan.estimate_s} if self.plan.estimate_s else {})


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
    """

    def __init__(
        self,
        network: str = "net",
        trials: int = 40,
        epochs_per_trial: int = 1,
        steps_per_trial: int | None = None,
        example_input: torch.Tensor | None = None,
        run_dir: str | Path | None = None,
        bit_choices: Sequence[int] | Literal["auto"] = "auto",
        baselines: Sequence[int] = (8, 4),
        schedules: bool = True,
        mode: Mode = "beyond",
        n_initial: int = 10,
        pool_size: int = 500,
        seed: int = 0,
        sampler: optuna.samplers.BaseSampler | None = None,
        storage: str | None = None,
        study_name: str | None = None,
        max_failures: int = 20,
        limits: Mapping[str, float | None] | None = None,
        target: str = "native",
        threads: int = 1,
        device: DeviceDescription | None = None,
        measure_on: Device | None = None,
        measurement: MeasureOptions | None = None,
        calibration_batches: int = 8,
        activation_range: str = "mse",
        prune: bool = False,
        tune_s: float = 30.0,
        recipe: str = "bayesian_search",
        model_name: str | None = None,
        records: str | Path | None = None,
        progress: bool = True,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("trials", trials, 1), ("epochs_per_trial", epochs_per_trial, 1), ("max_failures", max_failures, 1),
            ("calibration_batches", calibration_batches, 1), ("steps_per_trial", steps_per_trial or 1, 1),
        ):  # fmt: skip
            if value < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}")
        self.auto_bits = bit_choices == "auto"
        if bit_choices == "auto":
            bit_choices = PAPER_CHOICES if mode == "paper" else WIDTHS
        for what, widths in (("bit_choices", bit_choices), ("baselines", baselines)):
            wrong = [bits for bits in widths if bits != FLOAT_BITS and not 2 <= bits <= 8]
            if wrong or len(set(widths)) < len(widths) or (what == "bit_choices" and not widths):
                raise ConfigError(f"{what} are 2..8 or 32 (float), each once; got {list(widths)}")
        if prune and (mode != "beyond" or sampler is not None):
            raise ConfigError(
                f"prune=True with mode={mode!r} and sampler={type(sampler).__name__}; it weighs what mode 'beyond' "
                "knows of latency and size: give mode='beyond' and no sampler, or prune=False"
            )
        self.prune = prune
        parse_range(activation_range)
        self.activation_range = activation_range
        self.network, self.trials, self.epochs_per_trial = network, trials, epochs_per_trial
        self.steps_per_trial, self.example_input = steps_per_trial, example_input
        self.run_dir = Path(run_dir) if run_dir is not None else None
        self.bit_choices, self.baselines, self.search_schedules = tuple(bit_choices), tuple(baselines), schedules
        self.mode, self.n_initial, self.pool_size, self.seed = mode, n_initial, pool_size, seed
        self.sampler, self.storage, self.study_name, self.max_failures = sampler, storage, study_name, max_failures
        self.limits = read_limits(limits)
        self.device = device
        self.options = BuildOptions(get_target(target), threads, device is None or device.options.fuse_residual)
        self.measurement = measurement or MeasureOptions()
        self.calibration_batches, self.tune_s = calibration_batches, tune_s
        self.recipe, self.model_name, self.show_progress = recipe, model_name, progress
        if measure_on is not None and records is not None:
            raise ConfigError(f"records={str(records)!r}, but measure_on keeps its own: give one of them")
        self.measure_on = measure_on or reach("local" if device is None else device.reach, records)
        self._running: _Running | None = None
        self._next: _Plan | None = None
        self._planned: tuple[int, ...] = ()
        self._promises: Promises | None = None
        self._closed = False
        self.gave_up: str | None = None

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
        return self.device.choices(network, self.bit_choices, layers(network)[1:-1])

    # -- Lightning's hooks --------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if self.run_dir is None:
            self.run_dir = Path(trainer.default_root_dir) / "outputs" / "bayesian_search"
        if self.steps_per_trial is not None and not getattr(trainer, "fast_dev_run", False):
            trainer.limit_train_batches = self.steps_per_trial
        Host(trainer, pl_module, self.network).check()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self.run_dir is not None
        self._running, self._next, self._closed, self.gave_up = None, None, False, None
        if getattr(trainer, "fast_dev_run", False):  # one epoch: one trial, nothing else
            self._wanted, self._planned, self._tuning_s = 1, (), 0.0
        else:
            self._wanted, self._planned, self._tuning_s = self.trials, self.baselines, self.tune_s
        self.host = Host(trainer, pl_module, self.network)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.host.restore_float(self.run_dir / "checkpoints" / "float.pt")
        self._original = self.host.float_network
        self._float = copy.deepcopy(self._original).cpu()
        self._calibration = self.host.training_images(self.calibration_batches)
        self._supported = self.check_bits(self._float)
        example = self.example_input if self.example_input is not None else self._calibration[0][:1]
        self._example = example.detach().cpu()
        if not self.host.is_leader:
            self._follow_or_stop()
            return
        self._validation = self.host.validation_batches()
        about = {"recipe": self.recipe, "model": self.model_name or type(self._float).__name__,
                 "dataset": self.host.dataset_name, "device": self.measure_on.info(self.options.threads)}  # fmt: skip
        self.study = SearchStudy(self.run_dir, self.storage, about, self.study_name)
        bar = self.show_progress and trainer.progress_bar_callback is None
        self.progress = SearchProgress(self._wanted + len(self._planned), bar, trainer.progress_bar_callback)
        with self.study.lock:  # one worker prepares, the others wait and find everything there
            self._prepare()
        self.study.write()
        self.progress.update(self.study, "resumed" if self.study.done_count else "started")
        self._follow_or_stop()

    def _prepare(self) -> None:
        """Space, study and the float model's figures, each if it is not there yet."""
        prepare = Preparation(
            self._float, lambda bits: calibrate(self._quantize(bits), self._calibration[:1]), self.study,
            self.measure_on, self.progress, self.options,
        )  # fmt: skip
        known = self.study.known_space(self._conditions())
        base = BitConfig.uniform(self._float, 8, 8)
        if known is None:
            measured = not getattr(self.host.trainer, "fast_dev_run", False)  # which tunes nothing
            self.space = prepare.space(
                base, self.bit_choices, self.mode, self.search_schedules, self.auto_bits and measured, self._tuning_s,
                self._supported,
            )  # fmt: skip
        else:
            self.space = NetworkSpace.from_record(base, known)
        sampler = self.sampler or BaqeSampler(
            seed=self.seed,
            mode=self.mode,
            search_space=self.space.distributions,
            candidates=self.space.candidates,
            n_initial=self.n_initial,
            pool_size=max(self.pool_size, self.n_initial),
            reference_point=SearchStudy.reference_point,
        )
        self.study.open(self.space, sampler)
        self.study.drop_failed_baselines()
        if self.study.float_result is None:
            self._evaluate_float()
        if isinstance(sampler, BaqeSampler) and sampler.mode == "beyond" and self._wanted > 1:
            # A given sampler may know something already.
            sampler.knowledge = sampler.knowledge or prepare.knowledge(self.space, self._calibration[0])
        self._promises = None
        if self.prune and isinstance(sampler, BaqeSampler) and sampler.knowledge is not None:
            batches = [*islice(self._validation, PROMISED)]
            self._promises = Promises(sampler.knowledge, self.space.distributions, batches, self.study, self._wanted)
        self.study.set_limits(self.limits)
        if self.limits:
            prepare.check_limits(self.space, self.limits)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._running is None and not trainer.should_stop:
            self._begin()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0 and self._running is not None and self._running.epochs == 0:
            self._check_trained(pl_module)
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if self._running is None or self._running.failure is not None or not isinstance(loss, torch.Tensor):
            return
        if not bool(torch.isfinite(loss).all()):
            self._running.failure = f"the loss became {float(loss.mean())} at step {batch_idx} of the tuning"

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._running is None:
            return
        self._running.epochs += 1
        # A loss that one rank alone saw diverge fails the trial on all.
        failed = trainer.strategy.reduce_boolean_decision(self._running.failure is not None, all=False)
        if failed and self._running.failure is None:
            self._running.failure = "the loss diverged on another rank"
        if failed or self._running.epochs >= self.epochs_per_trial:
            self._end(self._running)
        elif not self._given_up():
            return
        self._running = None
        self._follow_or_stop()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close(trainer, test=False)

    # -- the loop -----------------------------------------------------------------------------------------------------

    def _conditions(self) -> dict[str, Any]:
        """What may not change while a study goes on."""
        return {
            "model": self.model_name or type(self._float).__name__,
            "dataset": self.host.dataset_name,
            "architecture": architecture_signature(self._float),
            "bit_choices": list(self.bit_choices),
            "schedules": self.search_schedules,
            "activation_range": self.activation_range,
            "target": vars(self.options.target),
            "fuse_residual": self.options.fuse_residual,
            "device": fingerprint(self.measure_on.info(self.options.threads)),
        }

    def _quantize(self, bits: BitConfig) -> QuantizedModel:
        return quantize(self._float, bits, self._example, activation_range=self.activation_range)

    def _evaluate_float(self) -> None:
        """The float model, compiled with the best schedules that are known."""
        assert self.run_dir is not None
        bits = BitConfig.uniform(self._float, FLOAT_BITS, FLOAT_BITS)
        model = quantize(self._float, bits, self._example).eval()
        folder = self.run_dir / "artifacts" / "float"
        found = evaluate(
            model, self._validation, folder, self.options, None, self.measure_on, self.measurement,
        )  # fmt: skip
        self.study.set_float(found.figures)

    def _begin(self) -> None:
        """Install the next network: baselines first, then what the sampler proposes."""
        plan, self._next = self._next, None
        shared = self.host.broadcast(None if plan is None else (plan.bits.to_json(), plan.name))
        assert shared is not None
        plan = plan or _Plan(shared[1], BitConfig.from_json(shared[0]), "default", None, "")
        started = time.perf_counter()
        model = plan.model or calibrate(self._quantize(plan.bits), self._calibration)
        self.host.install(model)
        self._running = _Running(plan, model, started)

    def _propose(self) -> _Plan | None:
        """What this worker does next; None: other workers do all that is left."""
        planned = {f"w{bits}a{bits}": bits for bits in self._planned}
        name = self.study.claim_baseline(list(planned))
        if name is not None:
            self.progress.update(self.study, f"baseline {name}")
            bits = planned[name]
            return _Plan(name, BitConfig.uniform(self._float, bits, bits), "default", None, "baseline")
        while True:
            start = time.perf_counter()
            asked = self.study.ask(self.space, self._wanted)
            if asked is None:
                return None
            trial, phase = asked
            config, schedules = self.space.point(trial.params)
            self.progress.update(self.study, f"trial {trial.number}", phase)
            plan = _Plan(
                f"trial_{trial.number}", config, schedules, trial, phase, propose_s=time.perf_counter() - start
            )
            if self._is_worthwhile(plan):
                return plan

    def _is_worthwhile(self, plan: _Plan) -> bool:
        """Whether what the network promises before its tuning is enough to begin it; if not, the trial is pruned."""
        if self._promises is None or plan.trial is None:
            return True
        start = time.perf_counter()
        plan.model = calibrate(self._quantize(plan.bits), self._calibration).to(self.host.module.device)
        seconds = {"propose": plan.propose_s, "estimate": time.perf_counter() - start}
        pruned = self._promises.gives_up(plan.trial, 0, plan.model, plan.entry(seconds))
        plan.estimate_s = time.perf_counter() - start
        if pruned:
            self.progress.update(self.study, f"{plan.name} pruned", plan.phase)
        return not pruned

    def _given_up(self) -> bool:
        """Whether the running trial is pruned after this epoch; all ranks agree."""
        running, pruned = self._running, False
        assert running is not None
        plan = running.plan
        if self.host.is_leader and self._promises is not None and plan.trial is not None:
            entry = plan.entry(running.seconds)
            pruned = self._promises.gives_up(plan.trial, running.epochs, running.model, entry)
            if pruned:
                self.progress.update(self.study, f"{plan.name} pruned", plan.phase)
        return bool(self.host.broadcast(pruned))

    def _end(self, running: _Running) -> None:
        """Evaluate on the device, tell the study, write the summary."""
        if self.host.is_leader:
            self._evaluate(running)
            self.study.write()
            log_hypervolume(self.host.trainer.loggers, self.study.summary(), self.host.trainer.global_step)
            self.progress.update(self.study, "evaluated", advance=running.failure is None)
        self.host.barrier()

    def _evaluate(self, running: _Running) -> None:
        assert self.run_dir is not None
        plan = running.plan
        entry = plan.entry(running.seconds)
        if running.failure is None:
            try:
                entry = self._complete(running, entry, self.run_dir / "artifacts" / entry.key)
            except BaqeError as error:
                running.failure = f"{type(error).__name__}: {error}"
        if running.failure is not None:
            entry = entry.model_copy(update={"state": "failed", "error": running.failure})
        if plan.trial is None:
            assert isinstance(entry, Baseline)
            self.study.add_baseline(entry)
        else:
            self.study.tell(plan.trial, entry)
        self.host.log(entry)

    def _complete(self, running: _Running, entry: Trial | Baseline, folder: Path) -> Trial | Baseline:
        device = next(running.model.parameters()).device
        fake = module_accuracy(running.model, self._validation, device)
        model = running.model if device.type == "cpu" else copy.deepcopy(running.model).cpu()
        found: Evaluation = evaluate(
            model,
            self._validation,
            folder,
            self.options,
            running.plan.schedules,
            self.measure_on,
            self.measurement,
        )
        return found.complete(entry, fake)

    def _check_trained(self, module: pl.LightningModule) -> None:
        """Warn where the first step of a trial gave the installed network no gradient."""
        assert self._running is not None
        parameters = [p for p in self._running.model.parameters() if p.requires_grad]
        if module.automatic_optimization and parameters and all(p.grad is None for p in parameters):
            rank_zero_warn(
                f"the training step gave {type(module).__name__}.{self.network} no gradient: it seems to call the "
                "network by another reference, which the search does not replace. Its trials stay untuned."
            )

    def _follow_or_stop(self) -> None:
        """End training where the search is done; all ranks agree."""
        decision = self._decide() if self.host.is_leader else (False, None)
        while self.host.is_leader and not decision[0] and (plan := self._propose()) is None:
            self.progress.say("waiting for other workers")  # one of them may die, and leave its trial to this one
            time.sleep(WAIT_S)
            decision = self._decide()
        self._next = plan if self.host.is_leader and not decision[0] else None
        stop, self.gave_up = self.host.broadcast(decision)
        if stop:
            self.host.trainer.should_stop = True
            if self.gave_up is not None and self.host.is_leader:
                self.progress.warn(f"The search gave up: {self.gave_up}")

    def _decide(self) -> tuple[bool, str | None]:
        """Whether the search is over, and why if it gave up."""
        baselines = {f"w{bits}a{bits}" for bits in self._planned}
        if self.study.complete_count >= self._wanted and baselines <= set(self.study.baseline_names):
            return True, None
        if self.study.failed_count >= self.max_failures:
            return True, f"{self.study.failed_count} trials failed, the last with: {self.study.last_error}"
        return False, None

    def _close(self, trainer: pl.Trainer, test: bool = True) -> None:
        """Put the float network back; write the final summary and the report. Safe to call twice."""
        if self._closed or not hasattr(self, "_original"):  # nothing was begun
            return
        self._closed, self._running = True, None
        self.host.install_float(self._original)
        if not self.host.is_leader or not hasattr(self, "study"):
            return
        if self._next is not None and self._next.trial is not None:
            self.study.give_back(self._next.trial)
        self._next = None
        self.study.write(report=True)  # what was found is safe before the test split is touched
        if test:
            if self.study.complete_count < self._wanted and self.gave_up is None:
                self.progress.warn(
                    f"The trainer ended after {self.study.complete_count} of {self._wanted} trials; "
                    "Trainer(max_epochs=-1) lets the search end it. The same run_dir goes on."
                )
            self.study.test_front(self.host.test_batches(), self.measure_on)
            self.study.write(report=True)
            assert self.run_dir is not None
            log_results(trainer.loggers, self.study.summary(), self.run_dir)
        self.study.close()
        self.progress.close()
