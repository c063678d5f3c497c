"""Fine-tuning one bit-config, as the configuration says: for whatever recipe has bits to train."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig, ListConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from lightning_baqe.calibration.calibrate import calibrate
from lightning_baqe.calibration.corrections import Correction, correction_of
from lightning_baqe.callbacks import Distillation, FreezeBatchNorm, Oscillations, ReestimateBatchNorm
from lightning_baqe.errors import ConfigError, check_at_least
from lightning_baqe.quantization.config import MAX_BITS, MIN_BITS, BitConfig
from lightning_baqe.quantization.convert import QuantizedModel, check_options
from lightning_baqe.quantization.gradient_scaling import GradientScaling, gradient_scaling
from lightning_baqe.tasks import ImageClassifier, fit_to_checkpoint
from lightning_baqe.tasks.pretrain import keep
from lightning_baqe.tasks.scoring import Scorer


@dataclass(frozen=True)
class FineTuning:
    """How networks are quantized and tuned: what ``qat`` of the configuration says, checked.

    Attributes:
        options: of :func:`lightning_baqe.quantize`.
        correction: of the weights, before any training.
        epochs, steps: of training, steps of each epoch at most; 0 epochs: none.
        batches: training batches that quantizers are calibrated on.
        freeze_after, fold: of :class:`~lightning_baqe.callbacks.FreezeBatchNorm`; None: never.
        distillation, temperature: of :class:`~lightning_baqe.callbacks.Distillation`; 0: none.
        gradients: through the rounding of weights and of activations.
        damping, freeze_above: of :class:`~lightning_baqe.callbacks.Oscillations`.
        reestimated: batches of :class:`~lightning_baqe.callbacks.ReestimateBatchNorm`; 0: none.
        progressive: bits that all layers have at least, in networks that are trained before and gone on from.
    """

    options: dict[str, str]
    correction: Correction
    epochs: int
    steps: int | None
    batches: int
    freeze_after: int | None
    fold: bool
    distillation: float
    temperature: float
    gradients: tuple[GradientScaling, GradientScaling]
    damping: float
    freeze_above: float | None
    reestimated: int
    progressive: tuple[int, ...]

    @classmethod
    def of(cls, cfg: DictConfig) -> FineTuning:
        """Raises ConfigError for what cannot be right."""
        given = cfg.qat
        options = {name: given[name] for name in ("activation_quantizer", "activation_range")}
        check_options(**options)
        correction = correction_of(replace(correction_of(given.correct), reconstruct_s=given.reconstruct_s))
        gradients = gradients_of(given.gradients)
        after, fold = given.freeze_batch_norm_after, given.fold_batch_norm
        if fold and after is None:
            raise ConfigError(
                "qat.fold_batch_norm=true folds when the statistics are frozen, but qat.freeze_batch_norm_after=null "
                "never freezes them: give the epochs before that."
            )
        if after is not None:
            FreezeBatchNorm(after_epochs=after, fold=fold)
        Distillation(weight=given.distillation, temperature=given.temperature)
        Oscillations(damping=given.damping, freeze_above=given.freeze_above)
        check_at_least("qat.reestimate_batch_norm", given.reestimate_batch_norm, 0)
        check_at_least("qat.epochs", given.epochs, 0)
        if given.steps is not None:
            check_at_least("qat.steps", given.steps, 1)
        check_at_least("qat.calibration_batches", given.calibration_batches, 1)
        progressive = _descending(given.progressive)
        idle = {
            "freeze_batch_norm_after": after is not None, "distillation": given.distillation > 0,
            "progressive": bool(progressive), "damping": given.damping > 0, "steps": given.steps is not None,
            "freeze_above": given.freeze_above is not None, "reestimate_batch_norm": given.reestimate_batch_norm > 0,
        }  # fmt: skip
        if given.epochs == 0 and any(idle.values()):
            names = ", ".join(f"qat.{name}" for name, is_given in idle.items() if is_given)
            raise ConfigError(f"qat.epochs=0 trains nothing, so that {names} would do nothing: leave it out, or train.")
        return cls(
            options, correction, given.epochs, given.steps, given.calibration_batches, after, fold,
            given.distillation, given.temperature, gradients, given.damping, given.freeze_above,
            given.reestimate_batch_norm, progressive,
        )  # fmt: skip

    def train(
        self,
        task: ImageClassifier,
        bits: BitConfig,
        datamodule: Any,
        checkpoint: Path,
        make_trainer: Callable[..., pl.Trainer],
        teacher: nn.Module,
        scorer: Scorer,
    ) -> QuantizedModel:
        """Quantize a task's network, tune it, give it back in eval mode on the CPU; goes on from its checkpoint."""
        callbacks: list[pl.Callback] = []
        if self.freeze_after is not None:
            callbacks.append(FreezeBatchNorm(after_epochs=self.freeze_after, fold=self.fold))
        if self.damping > 0 or self.freeze_above is not None:
            callbacks.append(Oscillations(damping=self.damping, freeze_above=self.freeze_above))
        if self.reestimated > 0:
            callbacks.append(ReestimateBatchNorm(batches=self.reestimated))
        callbacks += distilling(self.distillation, self.temperature, teacher, scorer)
        started = task.net
        for least in self.progressive if not checkpoint.exists() else ():
            wider = checkpoint.with_name(f"{checkpoint.stem}_{least}_bit.ckpt")
            companions = distilling(self.distillation, self.temperature, teacher, scorer)
            self._tune(task, started, bits.at_least(least), datamodule, wider, make_trainer, companions)
        return self._tune(task, started, bits, datamodule, checkpoint, make_trainer, callbacks)

    def _tune(
        self,
        task: ImageClassifier,
        network: nn.Module,
        bits: BitConfig,
        datamodule: Any,
        checkpoint: Path,
        make_trainer: Callable[..., pl.Trainer],
        callbacks: list[pl.Callback],
    ) -> QuantizedModel:
        """One training of a float network at some bits, from the weights that the task's last one left."""
        before, task.net = task.net, network
        quantized = task.quantize(bits, datamodule.example_input, **self.options)
        if isinstance(before, QuantizedModel):
            quantized.take_weights(before)
        quantized.scale_gradients(*self.gradients)
        if not checkpoint.exists():
            with _layer_progress(Console(stderr=True, highlight=False)) as tell:
                calibrate(quantized, datamodule.train_dataloader(), self.batches, self.correction, tell)
        if self.epochs == 0:
            keep(task, checkpoint)
        else:
            limited = make_trainer if self.steps is None else partial(make_trainer, limit_train_batches=self.steps)
            fit_to_checkpoint(task, datamodule, checkpoint, self.epochs, limited, callbacks)
        assert isinstance(task.net, QuantizedModel)
        return task.net.cpu().eval()


def _descending(given: Any) -> tuple[int, ...]:
    found = list(given) if isinstance(given, ListConfig) else None
    fits = found is not None and all(isinstance(bits, int) and MIN_BITS < bits <= MAX_BITS for bits in found)
    if found is None or not fits or found != sorted(set(found), reverse=True):
        raise ConfigError(
            f"qat.progressive={given!r}, wanted are bits of {MAX_BITS} down to {MIN_BITS + 1}, fewer each time, such "
            "as [4,3], or []"
        )
    return tuple(found)


def gradients_of(given: DictConfig) -> tuple[GradientScaling, GradientScaling]:
    """Through the rounding of weights and of activations. Raises ConfigError for what cannot be right."""
    weights, activations = (
        gradient_scaling(kind, given.delta, given.alpha) for kind in (given.weights, given.activations)
    )
    return weights, activations


def distilling(weight: float, temperature: float, teacher: nn.Module, scorer: Scorer) -> list[pl.Callback]:
    """What has a network learn from the float one; nothing where the weight is 0."""
    if weight == 0:
        return []
    callback = Distillation(weight=weight, temperature=temperature)
    callback.teacher, callback.independent = teacher, scorer.kind == "labels"
    return [callback]


@contextmanager
def _layer_progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar over layers or blocks; a line now and then where there is no terminal."""
    tenths = 0

    def tell(layer: str, done: int, total: int) -> None:
        nonlocal tenths
        tenths = tenths if done > 1 else 0  # layers, and then blocks
        bar.update(task, completed=done, total=total, layer=layer)
        if not console.is_terminal and 10 * done // total > tenths:
            tenths = 10 * done // total
            console.print(f"corrected {done}/{total}, {layer}", markup=False, soft_wrap=True)

    columns = (TextColumn("correct"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("{task.fields[layer]}", markup=False))  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("correct", total=None, layer="")
        yield tell
