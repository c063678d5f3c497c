"""What every data module shares: splits made once, loaders in a known order, the attributes a model is built from."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_baqe.data.order import ShuffledByEpoch
from lightning_baqe.errors import ConfigError, DataError, check_at_least

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
_SPLITS_OF_STAGE: dict[str | None, tuple[Split, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("test",),
    None: SPLITS,
}


class ImageTensorDataset(Dataset[tuple[Tensor, Tensor]]):
    """Images held in memory as bytes, normalised when they are read.

    Args:
        images: ``(n, channels, h, w)`` uint8; one channel of images becomes as many as ``mean`` has.
        labels: ``(n,)`` int64.
        mean: per channel, of images scaled to 0..1.
        std: per channel, of images scaled to 0..1.
        augment: images of a batch to others of the same shape and type, whenever they are read.
        relabel: indices of a batch to labels, whenever they are read; None: those given.

    An item is ``(x, y)``: ``(channels, h, w)`` float32 and a scalar int64 tensor.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        augment: Callable[[Tensor], Tensor] | None = None,
        relabel: Callable[[list[int]], Tensor] | None = None,
    ) -> None:
        self.images = images
        self.labels = labels
        self.augment = augment
        self.relabel = relabel
        self._scale = (1 / (255 * torch.tensor(std))).view(-1, 1, 1)
        self._shift = (-torch.tensor(mean) / torch.tensor(std)).view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        """A whole batch normalised at once; the loader calls this in place of one ``__getitem__`` per image."""
        images = self.images[indices]
        x = (images if self.augment is None else self.augment(images)) * self._scale + self._shift
        labels = self.labels[indices] if self.relabel is None else self.relabel(indices)
        return list(zip(x.unbind(), labels.unbind(), strict=True))


class ImageDataModule(pl.LightningDataModule):
    """Base of the data modules: a subclass says which classes there are and makes the data set of one split.

    Batches are ``(x, y)``: ``x`` float32 ``(n, channels, h, w)``, normalised by ``mean`` and ``std``; ``y`` int64
    ``(n,)``.
    The train loader shuffles with a generator of its own, seeded by ``seed``, and drops the last incomplete batch
    (batch normalisation dislikes small ones); validation and test keep a fixed order and every image.
    Splits are made on first use, by ``setup`` or by a loader, and then kept: ``setup`` may be called again at no cost.

    Attributes:
        name: what run folders and reports call the data set.
        mean: per channel, of images scaled to 0..1.
        std: per channel, of images scaled to 0..1.

    Args:
        input_shape: ``(channels, h, w)`` of one image.
        batch_size: images per batch.
        seed: of the shuffling, and of whatever else the subclass says.
        num_workers: loader processes; 0 loads in the training process.

    Raises:
        ConfigError: an argument out of range.
    """

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __init__(self, input_shape: tuple[int, int, int], batch_size: int, seed: int, num_workers: int) -> None:
        super().__init__()
        check_at_least("batch_size", batch_size, 1)
        check_at_least("seed", seed, 0)
        check_at_least("num_workers", num_workers, 0)
        self.input_shape = input_shape
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self._datasets: dict[Split, Dataset[tuple[Tensor, Tensor]]] = {}

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; a label is an index into them."""
        raise NotImplementedError

    def make_split(self, split: Split) -> Dataset[tuple[Tensor, Tensor]]:
        """The data set of one split, of ``(x, y)`` items. Called once per split."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        """How many classes there are; known before ``setup``."""
        return len(self.classes)

    @property
    def example_input(self) -> Tensor:
        """``(1, channels, h, w)`` float32 zeros: the mean image, for tracing."""
        return torch.zeros(1, *self.input_shape)

    def normalise(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Normalise as a network's weights want it, before any split is made.

        Args:
            mean, std: per channel, of images scaled to 0..1.

        Raises:
            ConfigError: as many channels as the images have not, or splits were made with other figures.
        """
        mean, std = tuple(mean), tuple(std)
        if len(mean) != self.input_shape[0] or len(std) != self.input_shape[0] or min(std) <= 0:
            raise ConfigError(
                f"mean={mean} and std={std}, but {self.name} has {self.input_shape[0]} channels: give a mean and a "
                "positive std of each."
            )
        if (mean, std) != (self.mean, self.std) and self._datasets:
            raise ConfigError(f"{self.name} is normalised already: call normalise before setup.")
        self.mean, self.std = mean, std

    def dataset(self, split: Split) -> Dataset[tuple[Tensor, Tensor]]:
        """The data set of ``split`` ("train", "val" or "test"), made on the first call and then kept."""
        if split not in SPLITS:
            raise ConfigError(f"split is {split!r}, which is none of {SPLITS}: give one of them.")
        if split not in self._datasets:
            self._datasets[split] = self.make_split(split)
        return self._datasets[split]

    def setup(self, stage: str | None = None) -> None:
        """Make the splits that ``stage`` ("fit", "validate", "test", "predict"; None for all) needs."""
        for split in _SPLITS_OF_STAGE[stage]:
            self.dataset(split)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Shuffled batches of ``batch_size``. Each call starts again from the same order; epochs of one loader differ.

        Raises:
            DataError: fewer training images than ``batch_size``, so that not one batch would be left.
        """
        size = len(cast(Any, self.dataset("train")))
        if size < self.batch_size:
            raise DataError(
                f"batch_size={self.batch_size}, but {self.name} has {size} training images, and the last incomplete "
                f"batch is dropped: give batch_size={size} or less, or more images."
            )
        order = ShuffledByEpoch(self.dataset("train"), self.seed)
        return self._loader("train", sampler=order, drop_last=True, generator=order.generator)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Validation batches in a fixed order."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Test batches in a fixed order."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """The same as ``test_dataloader``."""
        return self._loader("test")

    def _loader(self, split: Split, **options: Any) -> DataLoader[tuple[Tensor, Tensor]]:
        return DataLoader(
            self.dataset(split),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            **options,
        )
