"""Training to a cached checkpoint: whoever is killed half-way goes on, and whoever is done does not train again."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins import TorchCheckpointIO

from lightning_baqe.errors import DataError, check_at_least
from lightning_baqe.quantization import batch_norm
from lightning_baqe.quantization.train_modes import is_frozen
from lightning_baqe.tasks.checkpoint import CheckpointBeside, check_state, read_checkpoint
from lightning_baqe.tasks.classifier import ImageClassifier
from lightning_baqe.tasks.epoch_seeds import EpochSeeds
from lightning_baqe.tasks.frozen import Frozen

TrainerFactory = Callable[..., pl.Trainer]


def pretrain(
    task: ImageClassifier,
    datamodule: pl.LightningDataModule,
    checkpoint: Path | str,
    epochs: int = 8,
    learning_rate: float = 2e-3,
    weight_decay: float = 0.05,
    optimizer: str = "adamw",
    scheduler: str = "onecycle",
    label_smoothing: float = 0.0,
    frozen: Sequence[str] = (),
    freeze_batch_norm: bool = False,
    trainer: TrainerFactory = pl.Trainer,
) -> ImageClassifier:
    """Train ``task.net`` in float, with settings of its own: those of ``task`` are for fine-tuning.

    The defaults take a ResNet-18 from random weights to about 98 % on the digits, in 300 steps of 32 images.

    Args:
        task: its network, a float one, gets the weights.
        datamodule: with train and validation batches.
        checkpoint: read if it exists, else written. ``ImageClassifier.load_from_checkpoint`` reads it, too.
        epochs: of training; 0: the weights stay as they are.
        learning_rate, weight_decay, optimizer, scheduler, label_smoothing: as for :class:`ImageClassifier`.
        frozen: modules that are not trained: see :class:`~lightning_baqe.tasks.frozen.Frozen`.
        freeze_batch_norm: keep the batch norms' statistics, now and in whatever training follows: those of small
            batches of few pictures are noise. Gains and shifts learn.
        trainer: called with ``max_epochs``, ``callbacks`` and the like; returns the Trainer.

    Returns:
        ``task``.

    Raises:
        ConfigError: an argument out of range.
        DataError: the checkpoint cannot be read, or is another network's.
    """
    still = Frozen(task.net, frozen)
    if freeze_batch_norm:
        batch_norm.freeze_batch_norm(task.net)
    if epochs == 0 and not isinstance(epochs, bool):
        keep(task, Path(checkpoint))
        return task
    float_task = ImageClassifier(
        task.net,
        task.hparams["num_classes"],
        learning_rate,
        weight_decay,
        optimizer,
        scheduler,
        label_smoothing,
        log_prefix="float/",
        metric=task.metric,
    )
    fit_to_checkpoint(float_task, datamodule, checkpoint, epochs, trainer, [still])
    return task


def keep(task: ImageClassifier, checkpoint: Path) -> None:
    """Write the weights of a task to a checkpoint, or take them from one that is there.

    Raises:
        DataError: the checkpoint cannot be read, or is another network's.
    """
    if not checkpoint.exists():
        content: dict[str, Any] = {"state_dict": task.state_dict()}
        task.on_save_checkpoint(content)
        CheckpointBeside().save_checkpoint(content, checkpoint)
    load(task, checkpoint)


def fit_to_checkpoint(
    task: ImageClassifier,
    datamodule: pl.LightningDataModule,
    checkpoint: Path | str,
    epochs: int,
    trainer: TrainerFactory = pl.Trainer,
    callbacks: Sequence[pl.Callback] = (),
    keep: Literal["best", "last"] = "best",
) -> None:
    """Fit ``task`` and leave it with the weights of the epoch of best validation metric, of equals the last epoch.

    The weights end in ``checkpoint``, which appears in one step when training is done. Until then the folder
    ``<checkpoint's name>-training`` beside it holds ``last.ckpt``, from which a killed training goes on.

    Args:
        task: float or quantized; its structure is the checkpoint's.
        datamodule: with train and validation batches.
        checkpoint: if it exists, its weights are loaded and nothing is trained.
        epochs: of training; 1 or more.
        trainer: called with ``max_epochs`` and ``callbacks``; returns the Trainer.
        callbacks: more of them. Where they change the structure of ``task.net``, it ends as it was in the epoch that is
            kept.
        keep: ``"last"``: the weights of the last epoch, where validation images tell nothing.

    Raises:
        ConfigError: ``epochs`` out of range.
        DataError: the checkpoint, or that from which a killed training would go on, cannot be read, or is another
            network's.
    """
    check_at_least("epochs", epochs, 1)
    checkpoint = Path(checkpoint)
    if not checkpoint.exists():
        _fit(task, datamodule, checkpoint, epochs, trainer, callbacks, keep)
    load(task, checkpoint)


def _fit(
    task: ImageClassifier,
    datamodule: pl.LightningDataModule,
    checkpoint: Path,
    epochs: int,
    make_trainer: TrainerFactory,
    callbacks: Sequence[pl.Callback],
    keep_epoch: Literal["best", "last"],
) -> None:
    scratch = checkpoint.with_name(f"{checkpoint.stem}-training")
    metric = f"{task.hparams['log_prefix']}val/acc"
    best = ModelCheckpoint(
        scratch, "best", monitor=metric, mode="max", save_weights_only=True, enable_version_counter=False
    )
    trainer = fit_resumable(task, datamodule, scratch, epochs, make_trainer, [*callbacks, best])
    if best.best_model_score is None:
        raise DataError(f"training ended without {metric}: the data module needs validation batches.")
    done = Path(best.best_model_path)
    if keep_epoch == "last" or bool(trainer.callback_metrics[metric] >= best.best_model_score):
        done = scratch / "done.ckpt"
        trainer.save_checkpoint(done, weights_only=True)
    os.replace(done, checkpoint)
    shutil.rmtree(scratch)


def fit_resumable(
    task: ImageClassifier,
    datamodule: pl.LightningDataModule,
    scratch: Path,
    epochs: int,
    make_trainer: TrainerFactory,
    callbacks: Sequence[pl.Callback],
) -> pl.Trainer:
    """Fit ``task``; the folder ``scratch`` holds ``last.ckpt``, from which a killed training goes on.

    It ends as if it had never been stopped, if its loader shuffles by the global generator or has a sampler with
    ``set_epoch``; what worker processes draw that live longer than an epoch is another matter.

    Raises:
        DataError: that checkpoint cannot be read, or is another network's.
    """
    last = ModelCheckpoint(scratch, "last", enable_version_counter=False, save_on_train_epoch_end=True)
    trainer = make_trainer(max_epochs=epochs, callbacks=[EpochSeeds(), *callbacks, last], num_sanity_val_steps=0)
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # a strategy's own stays
        trainer.strategy.checkpoint_io = CheckpointBeside()
    resume = scratch / "last.ckpt"
    if resume.exists():
        _check_resumable(resume)
    with warnings.catch_warnings():
        # To find it not empty is what resuming is about.
        warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
        if any(map(is_frozen, task.net.modules())):
            warnings.filterwarnings("ignore", message=r"Found .* module\(s\) in eval mode at the start of training")
        trainer.fit(task, datamodule, ckpt_path=str(resume) if resume.exists() else None)
    return trainer


def _check_resumable(path: Path) -> None:
    try:
        read_checkpoint(path)
    except DataError as error:
        raise DataError(
            f"training cannot go on from {path} ({error}): remove {path.parent} to train from the start, or give "
            "another run_dir."
        ) from error


def load(task: ImageClassifier, path: Path) -> None:
    """Take the weights of a checkpoint, and the structure that it was written with.

    Raises:
        DataError: it cannot be read, or is another network's.
    """
    try:
        content = read_checkpoint(path, task.device)
        state = check_state(content.get("state_dict"), path)
        task.on_load_checkpoint(content)
        task.load_state_dict(state)
    except (DataError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} cannot be read into {type(task.net).__name__} ({error}): it is broken, or another network's; "
            "remove it to train again, or give another run_dir."
        ) from error
