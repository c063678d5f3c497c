"""Random numbers that follow from the epoch, so that a training which goes on draws what it would have drawn."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from lightning_baqe.data.order import epoch_seed


class EpochSeeds(pl.Callback):
    """Seed the generators of Python, NumPy and PyTorch when an epoch starts.

    Lightning's checkpoints hold no generator's state: without this, a training that goes on augments, and where the
    loader draws from the global generator shuffles, by other numbers than one that was never stopped. The first seed is
    drawn from PyTorch's global generator, so that it follows from the user's, and is kept in checkpoints.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seed: int | None = None
        self._goes_on = False

    def state_dict(self) -> dict[str, Any]:
        """The first epoch's seed."""
        return {"seed": self._seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with a checkpoint's seed."""
        self._seed = state_dict["seed"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the seed, the same on all devices."""
        self._goes_on = self._seed is not None
        if self._seed is None:
            self._seed = trainer.strategy.broadcast(int(torch.randint(2**31, ())))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Seed for this epoch and device."""
        assert self._seed is not None
        seed = epoch_seed(self._seed + trainer.global_rank, trainer.current_epoch)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - users' augmentations draw from it
        torch.manual_seed(seed)
        if self._goes_on:
            # Lightning made this epoch's iterator before it knew the epoch; those of later epochs it makes after this.
            self._goes_on = False
            iter(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]
