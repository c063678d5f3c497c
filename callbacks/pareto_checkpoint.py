"""Checkpoints on the Pareto front of several metrics, for any Trainer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities.rank_zero import rank_zero_warn

from lightning_baqe.errors import ConfigError
from lightning_baqe.search.archive import ParetoArchive

_FIELD = re.compile(r"\{([^{}:]+)(?::([^{}]*))?\}")


@dataclass
class ParetoPoint:
    """A checkpoint on the front.

    Attributes:
        values: ``{metric: value}``, as logged.
        path: of the checkpoint.
        epoch, step: of the trainer when it was written.
        mark: size in bytes and time of change in ns of what was written; None until that is done.
    """

    values: dict[str, float]
    path: str
    epoch: int
    step: int
    mark: tuple[int, int] | None = None


@dataclass(eq=False, repr=False)
class ParetoCheckpoint(Checkpoint):
    """Keep the checkpoints that no other dominates in the logged metrics, and delete the others.

    After each validation (or training epoch) the monitored metrics are one point. If no earlier point dominates or
    equals it, a checkpoint is written; then those that it dominates are deleted. Of equal points the first one stays. A
    point with a value that is not finite (NaN, infinite) is never kept; a warning says so.

    Rank zero's values decide on all ranks: log with ``sync_dist=True``. The front is part of every full checkpoint, so
    that a resumed run goes on with it. Only files are deleted that this callback wrote and that are as it left them; a
    name that is taken gets ``-v1`` appended.

    Args:
        monitor: ``{metric: "min" or "max"}``, any number of logged metrics.
        dirpath: folder on a local or shared disk; None: ``pareto_checkpoints`` in the trainer's default root.
        filename: template of the name without ``.ckpt``; ``{epoch}``, ``{step}`` and any logged metric as in
            ``"{epoch}-{val/acc:.3f}"``.
        max_to_keep: checkpoints at most; where the front is larger, the ones stay that contribute most hypervolume
            (:class:`~lightning_baqe.search.archive.ParetoArchive`). None: no bound.
        save_weights_only: leave out optimisers, callbacks and loops; such a checkpoint cannot resume the front.
        save_on_train_epoch_end: look at the metrics after training epochs; None: only where the trainer does not
            validate, else after validation.

    Raises:
        ConfigError: an argument is out of range; in training, a metric was never logged.
    """

    monitor: Mapping[str, Literal["min", "max"]]
    dirpath: str | Path | None = None
    filename: str = "epoch={epoch}-step={step}"
    max_to_keep: int | None = None
    save_weights_only: bool = False
    save_on_train_epoch_end: bool | None = None

    def __post_init__(self) -> None:
        if not self.monitor or any(mode not in ("min", "max") for mode in self.monitor.values()):
            raise ConfigError(
                f"monitor={dict(self.monitor)}, but at least one metric is wanted and for each 'min' or 'max', such as "
                "{'val/acc': 'max', 'latency_us': 'min'}"
            )
        if self.max_to_keep is not None and self.max_to_keep < 1:
            raise ConfigError(f"max_to_keep={self.max_to_keep}, but at least 1 is wanted, or None for no bound")
        self.monitor = dict(self.monitor)
        self._archive = ParetoArchive(self.max_to_keep)
        self._front: list[ParetoPoint] = []
        self._doomed: list[ParetoPoint] = []
        self._last_step = -1

    @property
    def front(self) -> list[ParetoPoint]:
        """The checkpoints that are kept, oldest first."""
        return list(self._front)

    # -- Lightning's hooks --------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        return self._generate_state_key(monitor=self.monitor)

    def state_dict(self) -> dict[str, Any]:
        return {
            "front": [asdict(point) for point in self._front],
            "doomed": [asdict(point) for point in self._doomed],
            "crowded_out": [list(point) for point in self._archive.crowded_out],
            "last_step": self._last_step,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._front = [ParetoPoint(**point) for point in state_dict["front"]]
        self._doomed = [ParetoPoint(**point) for point in state_dict["doomed"]]
        points = [self._minimised(point.values) for point in self._front]
        self._archive = ParetoArchive(self.max_to_keep, points, [tuple(p) for p in state_dict["crowded_out"]])
        self._last_step = state_dict["last_step"]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        folder = Path(self.dirpath or Path(trainer.default_root_dir) / "pareto_checkpoints")
        # Ranks may differ in their working directories and default roots.
        self._folder = Path(trainer.strategy.broadcast(str(folder.expanduser().absolute())))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After a resume: what is no longer on the disk is no longer on the front."""
        marks: list[tuple[int, int] | None] = [_mark(point.path) for point in self._front]
        found = list(zip(self._front, trainer.strategy.broadcast(marks), strict=True))
        gone = [point.path for point, mark in found if mark is None]
        if gone:
            rank_zero_warn(f"checkpoints of the front are missing and no longer count: {gone}")
        for point, mark in found:
            # The checkpoint that a run resumes from was written before its own mark could be known.
            point.mark = point.mark or mark
        self._front = [point for point, mark in found if mark is not None]
        self._archive.points = [self._minimised(point.values) for point in self._front]
        self._delete_doomed(trainer)  # a run may have died between writing and deleting

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._after_training_epochs(trainer):
            self._look(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._after_training_epochs(trainer):
            self._look(trainer)

    # -- the front ----------------------------------------------------------------------------------------------------

    def _after_training_epochs(self, trainer: pl.Trainer) -> bool:
        return not trainer.enable_validation if self.save_on_train_epoch_end is None else self.save_on_train_epoch_end

    def _minimised(self, values: Mapping[str, float]) -> tuple[float, ...]:
        return tuple(values[name] if mode == "min" else -values[name] for name, mode in self.monitor.items())

    def _look(self, trainer: pl.Trainer) -> None:
        if getattr(trainer, "fast_dev_run", False) or trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        if self._last_step == trainer.global_step:
            return
        # Rank zero's values decide on all ranks.
        logged = {name: float(value) for name, value in trainer.callback_metrics.items() if value.numel() == 1}
        logged = trainer.strategy.broadcast(logged)
        values = self._values(trainer, logged)
        self._last_step = trainer.global_step
        odd = {name: value for name, value in values.items() if value - value != 0}  # NaN or infinite
        if odd:
            rank_zero_warn(f"no checkpoint for step {trainer.global_step}: {odd} is not finite")
            return
        joined, left = self._archive.offer(self._minimised(values))
        self._doomed += [self._front[i] for i in left]
        self._front = [point for i, point in enumerate(self._front) if i not in left]
        if joined:
            path = trainer.strategy.broadcast(self._free_path(trainer, self._name(trainer, logged)))
            point = ParetoPoint(values, path, trainer.current_epoch, trainer.global_step)
            # Before writing, so that the checkpoint knows of itself; the doomed are deleted only when it is safe.
            self._front.append(point)
            trainer.save_checkpoint(path, self.save_weights_only)
            point.mark = trainer.strategy.broadcast(_mark(path))
        self._delete_doomed(trainer)

    def _values(self, trainer: pl.Trainer, logged: Mapping[str, float]) -> dict[str, float]:
        """Of the monitored metrics."""
        missing = [name for name in self.monitor if name not in logged]
        if missing:
            when = "training epoch" if self._after_training_epochs(trainer) else "validation"
            raise ConfigError(
                f"monitor names {missing}, but until the end of the first {when} only {sorted(logged)} were logged: "
                "log them with self.log(...), correct monitor, or look after the other kind of epoch with "
                "save_on_train_epoch_end"
            )
        return {name: logged[name] for name in self.monitor}

    def _name(self, trainer: pl.Trainer, logged: Mapping[str, float]) -> str:
        known: dict[str, Any] = {**logged, "epoch": trainer.current_epoch, "step": trainer.global_step}

        def fill(match: re.Match[str]) -> str:
            field, form = match.group(1), match.group(2) or ""
            if field not in known:
                raise ConfigError(f"filename={self.filename!r} names {field!r}; wanted are some of {sorted(known)}")
            try:
                return format(known[field], form)
            except ValueError as error:
                raise ConfigError(f"filename={self.filename!r}: {known[field]!r} has no form {form!r}") from error

        return _FIELD.sub(fill, self.filename)

    def _free_path(self, trainer: pl.Trainer, name: str) -> str:
        path, version = self._folder / f"{name}.ckpt", 0
        if trainer.is_global_zero:
            while path.exists() or path.is_symlink():
                version += 1
                path = self._folder / f"{name}-v{version}.ckpt"
        return str(path)

    def _delete_doomed(self, trainer: pl.Trainer) -> None:
        for point in self._doomed if trainer.is_global_zero else ():
            found = _mark(point.path)
            if found is not None and point.mark is not None and found == tuple(point.mark):
                trainer.strategy.remove_checkpoint(point.path)
            elif found is not None:
                rank_zero_warn(f"{point.path} was changed by somebody since it was written: it is not deleted")
        self._doomed = []


def _mark(path: str) -> tuple[int, int] | None:
    """What tells whether a file is as it was written: its size and time of change; None where there is none."""
    try:
        found = Path(path).lstat()
    except FileNotFoundError:
        return None
    return found.st_size, found.st_mtime_ns
