"""The order of training images: random, and known for each epoch."""

from typing import Any, cast

import torch
from torch.utils.data import Dataset, RandomSampler

_APART = 1_000_003  # of the seeds of two epochs: seeds that users give, and ranks, are closer to each other


class ShuffledByEpoch(RandomSampler):
    """A random order by a generator of its own, which follows from seed and epoch where the epoch is told.

    Args:
        dataset: with a length.
        seed: of the first epoch's order.
    """

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        super().__init__(cast(Any, dataset), generator=torch.Generator().manual_seed(seed))
        self.seed, self._epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before each epoch, so that a training that goes on sees the order of its epoch."""
        if epoch != self._epoch:
            self._epoch = epoch
            self.generator.manual_seed(epoch_seed(self.seed, epoch))


def epoch_seed(seed: int, epoch: int) -> int:
    """Of one epoch; in the first one the seed itself."""
    return (seed + _APART * epoch) % 2**32
