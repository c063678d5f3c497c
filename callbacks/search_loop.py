"""The loop over baselines and trials, in the epochs of somebody's fit."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_warn

from lightning_baqe.callbacks.host import Host, network_of
from lightning_baqe.deploy.plan import Schedules
from lightning_baqe.entrance.network import named_network, refuse_unfit
from lightning_baqe.errors import BaqeError
from lightning_baqe.files import make_folder
from lightning_baqe.quantization.config import BitConfig
from lightning_baqe.quantization.convert import QuantizedModel
from lightning_baqe.resources import shortage
from lightning_baqe.runs.loggers import log_entry, log_results
from lightning_baqe.runs.progress import SearchProgress
from lightning_baqe.runs.promises import Promises
from lightning_baqe.runs.search_arguments import SearchArguments
from lightning_baqe.runs.search_context import SearchContext
from lightning_baqe.runs.study import INTERRUPTED, bits_entry
from lightning_baqe.runs.summary import Baseline, Trial

WAIT_S = 1.0  # between looks at what other workers do


def is_dry_run(trainer: pl.Trainer) -> bool:
    """Whether the trainer was made with ``fast_dev_run``."""
    return bool(getattr(trainer, "fast_dev_run", False))


def run_folder(arguments: SearchArguments, trainer: pl.Trainer) -> Path:
    """Where a search keeps what it finds."""
    return Path(arguments.run_dir or Path(trainer.default_root_dir) / "outputs" / "bayesian_search")


@dataclass
class _Turn:
    """A trial, or a baseline (``trial`` is None), until it is evaluated; other ranks than zero know only the bits."""

    bits: BitConfig
    name: str = ""
    schedules: Schedules | str = "default"
    trial: optuna.Trial | None = None
    phase: str = "baseline"
    spent: dict[str, float] = field(default_factory=lambda: {"propose": 0.0})  # seconds by part, before the tuning
    model: QuantizedModel | None = None  # calibrated
    started: float | None = None  # when the tuning began
    epochs: int = 0
    failure: str | None = None

    def entry(self) -> Trial | Baseline:
        """What the study keeps of it before it is evaluated."""
        train = {} if self.started is None else {"train": time.perf_counter() - self.started}
        known: dict[str, Any] = {
            "state": "running", "phase": self.phase, "bits": bits_entry(self.bits), "seconds": train | self.spent,
            "schedules": {} if isinstance(self.schedules, str) else self.schedules,
        }  # fmt: skip
        return Baseline(name=self.name, **known) if self.trial is None else Trial(number=self.trial.number, **known)


class SearchLoop:
    """One fit's search: what it tries, what it finds. Only rank zero has a study; what it decides holds for all.

    Args:
        arguments: of the search.
        trainer: running.
        module: its LightningModule.

    Attributes:
        context: what the search works with; ``study`` and ``progress`` are its own.
        space: rank zero's, once it is started.

    Raises:
        ConfigError: the search cannot work with this module, its loaders or this run folder.
    """

    def __init__(self, arguments: SearchArguments, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.arguments, self.trainer = arguments, trainer
        self.host = Host(trainer, module, arguments.network)
        self.gave_up: str | None = None
        self._turn: _Turn | None = None
        self._next: _Turn | None = None
        self._promises: Promises | None = None
        self._closed = False
        dry = is_dry_run(trainer)  # one epoch: one trial, nothing else
        self._planned = {} if dry else {f"w{bits}a{bits}": bits for bits in arguments.baselines}
        run_dir = make_folder(run_folder(arguments, trainer), "run_dir")
        self._original = network_of(module, arguments.network)
        refuse_unfit(named_network(self._original))  # before anything saves or copies it
        self.host.restore_float(run_dir / "checkpoints" / "float.pt")
        images = self.host.training_images(arguments.calibration_batches)
        network = copy.deepcopy(self._original).cpu()
        labelled = () if arguments.prior == "divergence" else self.host.training_pair()
        self.context = SearchContext(arguments, network, images, run_dir, self.host.dataset_name, dry, labelled)
        if not self.trainer.is_global_zero:
            return
        self.context.open(self.host.validation_batches())
        theirs = trainer.progress_bar_callback
        total = self.context.wanted + len(self._planned)
        self.progress = SearchProgress(total, arguments.progress and theirs is None, theirs)
        self.study, self.context.progress = self.context.study, self.progress

    def start(self) -> None:
        """Find out what is known before the first trial, and choose what comes first."""
        if self.trainer.is_global_zero:
            # One worker prepares, the others wait and find everything there.
            self.space, self._promises = self.study.alone(self.context.prepare)
            summary = self.study.write()
            self.progress.update("resumed" if summary.done_count else "started", summary)
        self._choose()

    # -- what comes next ----------------------------------------------------------------------------------------------

    def _choose(self) -> None:
        """Choose what is tried next, or end training where the search is done; all ranks agree."""
        stop = False
        if self.trainer.is_global_zero:
            while not (stop := self._is_over()):
                self._next = self._propose()
                if self._next is not None:
                    break
                # One of them may die, and leave its trial to this one.
                self.progress.update("waiting for other workers")
                time.sleep(WAIT_S)
        stop, self.gave_up = self.trainer.strategy.broadcast((stop, self.gave_up))
        if stop:
            self.trainer.should_stop = True
            if self.gave_up is not None and self.trainer.is_global_zero:
                self.progress.warn(f"The search gave up: {self.gave_up}")

    def _is_over(self) -> bool:
        """Whether nothing is left to do, or too much has failed; ``gave_up`` tells of the latter."""
        evaluated = {entry.name for entry in self.study.baselines}
        if self.study.complete_count >= self.context.wanted and self._planned.keys() <= evaluated:
            return True
        failed = [entry for entry in self.study.trials() if entry.state == "failed" and entry.error != INTERRUPTED]
        if len(failed) >= self.arguments.max_failures:
            self.gave_up = f"{len(failed)} trials failed, the last with: {failed[-1].error}"
        return self.gave_up is not None

    def _propose(self) -> _Turn | None:
        """What this worker does next, baselines first; None: other workers do all that is left."""
        name = self.study.claim_baseline(list(self._planned))
        if name is not None:
            self.progress.update(f"baseline {name}")
            bits = self._planned[name]
            return _Turn(BitConfig.uniform(self.context.network, bits, bits), name)
        while True:
            start = time.perf_counter()
            asked = self.study.ask(self.context.wanted)
            if asked is None:
                return None
            trial, phase = asked
            config, schedules = self.space.point(trial.params)
            self.progress.update(f"trial {trial.number} ({phase})")
            turn = _Turn(config, f"trial_{trial.number}", schedules, trial, phase)
            turn.spent["propose"] = time.perf_counter() - start
            if self._promises is None:
                return turn
            start = time.perf_counter()
            turn.model = self.context.quantized(config).to(self.host.module.device)
            turn.spent["estimate"] = time.perf_counter() - start
            if not self._gives_up(turn):
                turn.spent["estimate"] = time.perf_counter() - start
                return turn

    def _gives_up(self, turn: _Turn) -> bool:
        """Whether the trial is pruned for what it promises after the epochs that it was tuned for."""
        if self._promises is None or turn.trial is None:
            return False
        assert turn.model is not None
        pruned = self._promises.gives_up(turn.trial, turn.epochs, turn.model, turn.entry())
        if pruned:
            self.progress.update(f"{turn.name} pruned ({turn.phase})", self.study.write())
        return pruned

    # -- epochs -------------------------------------------------------------------------------------------------------

    def begin_epoch(self) -> None:
        """Install the next network where the last one is evaluated."""
        if self._turn is not None or self.trainer.should_stop:
            return
        turn, self._next = self._next, None
        bits: Any = self.trainer.strategy.broadcast(None if turn is None else turn.bits.to_json())
        turn = turn or _Turn(BitConfig.from_json(bits))
        turn.started = time.perf_counter()
        turn.model = turn.model or self.context.quantized(turn.bits)
        self.host.install(turn.model)
        self._turn = turn

    def look_at_step(self, step: int, loss: Any) -> None:
        """Note a loss that diverged, and warn where the first step gave the installed network no gradient."""
        turn = self._turn
        if turn is None:
            return
        assert turn.model is not None
        module = self.host.module
        if step == turn.epochs == 0 and module.automatic_optimization:
            parameters = [p for p in turn.model.parameters() if p.requires_grad]
            if parameters and all(p.grad is None for p in parameters):
                rank_zero_warn(
                    f"the training step gave {type(module).__name__}.{self.arguments.network} no gradient: it seems to "
                    "call the network by another reference, which the search does not replace. Its trials stay untuned."
                )
        if turn.failure is None and isinstance(loss, torch.Tensor) and not bool(torch.isfinite(loss).all()):
            turn.failure = f"the loss became {float(loss.mean())} at step {step} of the tuning"

    def end_epoch(self) -> None:
        """Evaluate the network after its last epoch; prune a hopeless one before."""
        turn = self._turn
        if turn is None:
            return
        turn.epochs += 1
        strategy = self.trainer.strategy
        # A loss that one rank alone saw diverge fails the trial on all.
        failed = strategy.reduce_boolean_decision(turn.failure is not None, all=False)
        if failed and turn.failure is None:
            turn.failure = "the loss diverged on another rank"
        if failed or turn.epochs >= self.arguments.epochs_per_trial:
            if self.trainer.is_global_zero:
                self._evaluate(turn)
            strategy.barrier()
        elif not strategy.broadcast(self._gives_up(turn)):
            return
        self._turn = None
        self._choose()

    def _evaluate(self, turn: _Turn) -> None:
        """Evaluate on the device, tell the study, write the summary."""
        entry, model = turn.entry(), turn.model
        assert model is not None
        if turn.failure is None:
            try:
                device = next(model.parameters()).device
                fake = self.context.accuracy(model)
                model = model if device.type == "cpu" else copy.deepcopy(model).cpu()
                entry = entry.completed(self.context.evaluate(model, entry.key, turn.schedules), fake)
            except BaqeError as error:
                if shortage(error):
                    raise  # the next trial would fare no better
                turn.failure = f"{type(error).__name__}: {error}"
        if turn.failure is not None:
            entry = entry.model_copy(update={"state": "failed", "error": turn.failure})
        if turn.trial is not None:
            self.study.tell(turn.trial, entry)
        else:
            assert isinstance(entry, Baseline)
            self.study.add_baseline(entry)
        summary = self.study.write()
        log_entry(self.trainer.loggers, entry, summary, self.trainer.global_step)
        self.progress.update("evaluated", summary, advance=turn.failure is None)

    def close(self, test: bool = True) -> None:
        """Put the float network back; write the final summary and the report. Safe to call twice.

        Args:
            test: also take the front's accuracies on the test split: the fit has ended by itself.
        """
        if self._closed:
            return
        self._closed, self._turn = True, None
        self.host.place(self._original)
        if not self.trainer.is_global_zero:
            return
        if self._next is not None and self._next.trial is not None:
            self.study.give_back(self._next.trial)
        if self.study.float_result is not None:
            summary = self.study.write(report=True)  # what was found is safe before the test split is touched
            if test:
                if self.study.complete_count < self.context.wanted and self.gave_up is None:
                    self.progress.warn(
                        f"The trainer ended after {self.study.complete_count} of {self.context.wanted} trials; "
                        "Trainer(max_epochs=-1) lets the search end it. The same run_dir goes on."
                    )
                batches = self.host.test_batches()
                if batches is not None:
                    self.study.test_front(batches, self.arguments.measured_on, self.context.scorer)
                    summary = self.study.write(report=True)
                log_results(self.trainer.loggers, summary, self.context.run_dir)
        self.study.close()
        self.progress.close()
