"""The Trainer and the LightningModule that a search lives in: somebody else's, changed as little as possible."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
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

from lightning_baqe.errors import ConfigError
from lightning_baqe.runs.summary import Entry


class RepeatsTraining(pl.Callback):
    """A callback under which one ``fit`` is several trainings, so that others cannot count its epochs."""


class Host:
    """Access to the module's classifier, its loaders, and the optimisers that belong to its parameters.

    Args:
        trainer: running.
        module: its LightningModule.
        network: attribute that holds the float classifier; dots reach deeper.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, network: str) -> None:
        self.trainer, self.module, self.network = trainer, module, network

    def check(self) -> None:
        """Refuse what cannot work before any time is spent.

        Raises:
            ConfigError: no such attribute, or no plain module in it.
        """
        if isinstance(self.float_network, torch._dynamo.OptimizedModule):
            raise ConfigError(
                f"{type(self.module).__name__}.{self.network} is compiled; the search quantizes the module itself: "
                "give it before torch.compile"
            )

    @property
    def float_network(self) -> nn.Module:
        """What the attribute holds now."""
        return network_of(self.module, self.network)

    @property
    def is_leader(self) -> bool:
        """Whether this rank proposes, evaluates and measures."""
        return bool(self.trainer.is_global_zero)

    @property
    def dataset_name(self) -> str:
        """Of the datamodule, or of the training set's class."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is not None:
            return str(getattr(datamodule, "name", type(datamodule).__name__))
        return type(getattr(self.trainer.train_dataloader, "dataset", self.trainer.train_dataloader)).__name__

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        return self.trainer.strategy.broadcast(value)

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.trainer.strategy.barrier()

    def restore_float(self, path: Path) -> None:
        """Keep the float weights of a run, or take those that it began with: all its trials start from the same.

        Raises:
            ConfigError: the weights do not fit the network.
        """
        network = self.float_network
        if self.is_leader and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch = path.with_suffix(f".{os.getpid()}.tmp")
            torch.save(network.state_dict(), scratch)
            # Of two workers that begin at once the first one's weights are the run's.
            with contextlib.suppress(FileExistsError):
                os.link(scratch, path)
            scratch.unlink()
        if path.exists():
            state = torch.load(path, map_location="cpu", weights_only=True)
            before = {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}
            try:
                network.load_state_dict(state)
            except RuntimeError as error:
                raise ConfigError(
                    f"{path} holds the float weights of another network: {error}; use another run_dir, or the network "
                    "that the run began with"
                ) from error
            if _differ(before, state):
                rank_zero_warn(
                    f"the float weights that the run in {path.parents[1]} began with take the place of those in "
                    f"{type(self.module).__name__}.{self.network}: all its trials start from the same. Use another "
                    "run_dir to search from the new ones."
                )

    def install(self, model: nn.Module) -> None:
        """Put a network in the classifier's place, with new optimisers and schedulers for its parameters."""
        owner: Any = self.module
        *parents, leaf = self.network.split(".")
        for part in parents:
            owner = getattr(owner, part)
        model.to(self.module.device)
        model.train()
        setattr(owner, leaf, model)
        self.renew_optimizers()

    def renew_optimizers(self) -> None:
        """Make optimisers and schedulers anew, for the parameters that the module has now."""
        strategy = self.trainer.strategy
        if isinstance(strategy, DDPStrategy) and strategy.model is not None:
            # The old wrapper holds the old parameters; wrapping again also sends rank 0's scales to all.
            strategy.model = strategy._layer_sync.apply(self.module) if strategy._layer_sync else self.module
            strategy.configure_ddp()
        strategy.setup_optimizers(self.trainer)

    def install_float(self, network: nn.Module) -> None:
        """Put the float classifier back; training is over, so optimisers stay."""
        owner: Any = self.module
        *parents, leaf = self.network.split(".")
        for part in parents:
            owner = getattr(owner, part)
        setattr(owner, leaf, network.to(self.module.device))

    def training_images(self, batches: int) -> list[torch.Tensor]:
        """Inputs of the first training batches, on the CPU."""
        loader: Any = self.trainer.train_dataloader
        return [_pair(batch, "training")[0].detach().cpu() for batch in islice(iter(loader), batches)]

    def validation_batches(self) -> Pairs:
        """The validation split; the trainer's ``limit_val_batches`` holds.

        Raises:
            ConfigError: there is none, or several.
        """
        loader = self.trainer.val_dataloaders
        if isinstance(loader, list | tuple) and len(loader) == 1:
            loader = loader[0]
        if loader is None or isinstance(loader, list | tuple | dict):
            raise ConfigError(
                f"the search ranks trials by accuracy on one validation loader, the trainer has {loader!r}; "
                "give fit() a val_dataloader that yields (x, y)"
            )
        limits = self.trainer.num_val_batches
        limit = limits[0] if isinstance(limits, list) and limits else None
        if self.trainer.world_size > 1 and isinstance(loader, DataLoader):
            # Each rank's loader sees its share; the leader evaluates on all images.
            limit = None if limit is None else limit * self.trainer.world_size
            loader = DataLoader(loader.dataset, loader.batch_size, collate_fn=loader.collate_fn)
        stop = int(limit) if limit not in (None, float("inf")) else None
        found = Pairs(loader, stop, "validation")
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
        loader = datamodule.test_dataloader()
        if isinstance(loader, list | tuple) and len(loader) == 1:
            loader = loader[0]
        if loader is None or isinstance(loader, list | tuple | dict):
            return None
        limit = self.trainer.limit_test_batches
        if isinstance(limit, float) and limit <= 1.0 and hasattr(loader, "__len__"):
            limit = int(limit * len(loader))
        found = Pairs(loader, int(limit) if isinstance(limit, int) else None, "test")
        return found if next(iter(found), None) is not None else None

    def log(self, entry: Entry) -> None:
        """Send a trial's figures to the trainer's loggers."""
        figures = {
            f"search/{key}": float(getattr(entry, key))
            for key in ("accuracy", "fake_quant_accuracy", "latency_us", "size_bytes")
            if getattr(entry, key) is not None
        }
        for logger in self.trainer.loggers if figures else ():
            logger.log_metrics(figures, step=self.trainer.global_step)


def network_of(module: nn.Module, network: str) -> nn.Module:
    """What an attribute of a LightningModule holds now.

    Args:
        module: the LightningModule.
        network: the attribute; dots reach deeper.

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


def _pair(batch: Any, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    if not isinstance(batch, list | tuple) or len(batch) < 2 or not all(isinstance(t, torch.Tensor) for t in batch[:2]):
        raise ConfigError(
            f"the {split} loader gives {type(batch).__name__}; the search wants batches (x, y) of tensors: images and "
            "class indices"
        )
    if batch[1].ndim != 1 or len(batch[1]) != len(batch[0]):
        raise ConfigError(
            f"the {split} loader gives labels of shape {tuple(batch[1].shape)} for images of shape "
            f"{tuple(batch[0].shape)}; the search wants one class index for each image"
        )
    return batch[0], batch[1]


def _differ(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> bool:
    """Whether two states of one network hold other values."""
    return before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in after)


class Pairs:
    """A loader's images and labels on the CPU; each iteration walks through the loader anew.

    Args:
        loader: of batches ``(x, y)``.
        limit: batches at most.
        split: for error messages.
    """

    def __init__(self, loader: Iterable[Any], limit: int | None, split: str) -> None:
        self._loader, self._limit, self._split = loader, limit, split

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in islice(iter(self._loader), self._limit):
            x, y = _pair(batch, self._split)
            yield x.detach().cpu(), y.detach().cpu()
