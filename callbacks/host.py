"""The Trainer and the LightningModule that a search lives in: somebody else's, changed as little as possible."""

from __future__ import annotations

import contextlib
import functools
import operator
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities.model_helpers import is_overridden
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.utils.data import DataLoader

from lightning_baqe.errors import ConfigError, DataError
from lightning_baqe.quantization.batches import input_and_labels, network_input
from lightning_baqe.quantization.train_modes import evaluating
from lightning_baqe.scratch import scratch_path
from lightning_baqe.tasks.checkpoint import read_state

_TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class RepeatsTraining(pl.Callback):
    """A callback under which one ``fit`` is several trainings, so that others cannot count its epochs."""


class Host:
    """Access to the module's network, its loaders, and the optimisers that belong to its parameters.

    Args:
        trainer: running.
        module: its LightningModule.
        network: attribute that holds the float network; dots reach deeper.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, network: str) -> None:
        self.trainer, self.module, self.network = trainer, module, network

    @property
    def dataset_name(self) -> str:
        """Of the datamodule, or of the training set's class."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is not None:
            return str(getattr(datamodule, "name", type(datamodule).__name__))
        return type(getattr(self.trainer.train_dataloader, "dataset", self.trainer.train_dataloader)).__name__

    def restore_float(self, path: Path) -> None:
        """Keep the float weights of a run, or take those that it began with: all its trials start from the same.

        Raises:
            ConfigError: the weights do not fit the network.
        """
        network = network_of(self.module, self.network)
        if self.trainer.is_global_zero and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch = scratch_path(path)
            torch.save(network.state_dict(), scratch)
            # Of two workers that begin at once the first one's weights are the run's.
            with contextlib.suppress(FileExistsError):
                os.link(scratch, path)
            scratch.unlink()
        if path.exists():
            try:
                state = read_state(path)
            except DataError as error:
                raise ConfigError(f"{error}; use another run_dir, or put an undamaged copy there") from error
            before = {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}
            try:
                network.load_state_dict(state)
            except RuntimeError as error:
                raise ConfigError(
                    f"{path} holds the float weights of another network: {error}; use another run_dir, or the network "
                    "that the run began with"
                ) from error
            if before.keys() == state.keys() and any(not torch.equal(before[name], state[name]) for name in state):
                rank_zero_warn(
                    f"the float weights that the run in {path.parents[1]} began with take the place of those in "
                    f"{type(self.module).__name__}.{self.network}: all its trials start from the same. Use another "
                    "run_dir to search from the new ones."
                )

    def place(self, network: nn.Module) -> None:
        """Put a network in the float network's place; optimisers stay."""
        parents, _, leaf = self.network.rpartition(".")
        owner = operator.attrgetter(parents)(self.module) if parents else self.module
        setattr(owner, leaf, network.to(self.module.device))

    def install(self, model: nn.Module) -> None:
        """Put a network in the float network's place and train it, with new optimisers and schedulers."""
        self.place(model.train())
        self.renew_optimizers()

    def renew_optimizers(self) -> None:
        """Make optimisers and schedulers anew, for the parameters that the module has now."""
        strategy = self.trainer.strategy
        if isinstance(strategy, DDPStrategy) and strategy.model is not None:
            # The old wrapper holds the old parameters; wrapping again also sends rank 0's scales to all.
            strategy.model = strategy._layer_sync.apply(self.module) if strategy._layer_sync else self.module
            strategy.configure_ddp()
        strategy.setup_optimizers(self.trainer)

    def training_images(self, batches: int) -> list[torch.Tensor]:
        """Inputs of the first training batches, on the CPU."""
        loader: Any = self.trainer.train_dataloader
        given = map(self._prepared, islice(loader, batches))
        return [network_input(batch, "the training loader", ConfigError).detach().cpu() for batch in given]

    def training_pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of the first training batch, on the CPU."""
        loader: Any = self.trainer.train_dataloader
        x, y = input_and_labels(self._prepared(next(iter(loader))), "the training loader", ConfigError)
        return x.detach().cpu(), y.detach().cpu()

    def _prepared(self, batch: Any, stage: str = "training") -> Any:
        """A batch as their steps get it: with what the hooks of module and datamodule around its transfer do.

        Args:
            batch: of a loader.
            stage: that hooks find the trainer in: ``training``, ``validating`` or ``testing``.
        """
        owners: list[Any] = [getattr(self.trainer, "datamodule", None), self.module]
        if not any(is_overridden(hook, owner) for hook in _TRANSFER_HOOKS for owner in owners if owner is not None):
            return batch
        first = next((owner for owner in owners if is_overridden(_TRANSFER_HOOKS[0], owner)), self.module)
        before = self.trainer.state.stage
        with contextlib.nullcontext() if stage == "training" else evaluating(self.module):
            try:
                setattr(self.trainer, stage, True)
                return self.trainer.strategy.batch_to_device(first.on_before_batch_transfer(batch, 0))
            finally:
                self.trainer.state.stage = before

    def validation_batches(self) -> Pairs:
        """The validation split; the trainer's ``limit_val_batches`` holds.

        Raises:
            ConfigError: there is none, or several.
        """
        loader = _only(self.trainer.val_dataloaders)
        if loader is None:
            raise ConfigError(
                "the search ranks trials by accuracy on one validation loader, the trainer has "
                f"{self.trainer.val_dataloaders!r}; give fit() a val_dataloader that yields (x, y)"
            )
        limits = self.trainer.num_val_batches
        limit = limits[0] if isinstance(limits, list) and limits else float("inf")
        if self.trainer.world_size > 1 and isinstance(loader, DataLoader):
            # Each rank's loader sees its share; the leader evaluates on all images.
            limit *= self.trainer.world_size
            loader = DataLoader(loader.dataset, loader.batch_size, collate_fn=loader.collate_fn)
        found = Pairs(loader, limit, "validation", functools.partial(self._prepared, stage="validating"))
        if next(iter(found), None) is None:
            raise ConfigError(
                "the validation loader gave no batch (limit_val_batches=0?); the search needs its accuracy"
            )
        return found

    def test_batches(self) -> Pairs | None:
        """The datamodule's test split, None where there is none, or several."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is None or not is_overridden("test_dataloader", datamodule, pl.LightningDataModule):
            return None
        datamodule.setup("test")
        loader = _only(datamodule.test_dataloader())
        if loader is None:
            return None
        limit = self.trainer.limit_test_batches  # a number, or a share
        if isinstance(limit, float):
            limit = int(limit * len(loader)) if limit <= 1.0 and hasattr(loader, "__len__") else float("inf")
        found = Pairs(loader, limit, "test", functools.partial(self._prepared, stage="testing"))
        return found if next(iter(found), None) is not None else None


def network_of(module: nn.Module, network: str) -> nn.Module:
    """What an attribute of a LightningModule holds now; dots in its name reach deeper.

    Raises:
        ConfigError: there is no such attribute, or no module in it.
    """
    found: Any = module
    for part in network.split("."):
        if not hasattr(found, part):
            children = [name for name, _ in module.named_children()]
            raise ConfigError(
                f"{type(module).__name__} has no {network!r}; network= must name the attribute that holds the network; "
                f"it has {children}"
            )
        found = getattr(found, part)
    if not isinstance(found, nn.Module):
        raise ConfigError(
            f"{type(module).__name__}.{network} is a {type(found).__name__}; network= must name the attribute that "
            "holds the network (an nn.Module)"
        )
    return found


def _only(loaders: Any) -> Any:
    """The loader where there is one; None for none, or several."""
    if isinstance(loaders, list | tuple) and len(loaders) == 1:
        return loaders[0]
    return None if isinstance(loaders, list | tuple | dict) else loaders


class Pairs:
    """A loader's images and targets on the CPU; each iteration walks through the loader anew.

    Args:
        loader: of batches ``(x, y)``, or dicts; see :mod:`lightning_baqe.quantization.batches`.
        limit: batches at most; may be infinite.
        split: for error messages.
        prepare: what is done with each batch first.
    """

    def __init__(
        self, loader: Iterable[Any], limit: float, split: str, prepare: Callable[[Any], Any] = lambda batch: batch
    ) -> None:
        self._loader, self._split, self._prepare = loader, split, prepare
        self._limit = None if limit == float("inf") else int(limit)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in map(self._prepare, islice(iter(self._loader), self._limit)):
            x, y = input_and_labels(batch, f"the {self._split} loader", ConfigError)
            if y.ndim < 1 or len(y) != len(x):
                raise ConfigError(
                    f"the {self._split} loader gives targets of shape {tuple(y.shape)} for images of shape "
                    f"{tuple(x.shape)}; the search wants targets (n, ...) for images (n, ...)"
                )
            yield x.detach().cpu(), y.detach().cpu()
