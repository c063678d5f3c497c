"""Fashion-MNIST: 70,000 photographs of clothes, the least that tells good quantization from bad."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional

from lightning_baqe.data.augment import flipped, shifted
from lightning_baqe.data.base import ImageDataModule, ImageTensorDataset, Split
from lightning_baqe.data.idx import read_idx
from lightning_baqe.errors import ConfigError, DataError, check_at_least

ROOT = "/usr/share/datasets/fashion-mnist"  # of Debian's package
_CLASSES = (
    *("t-shirt", "trousers", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
_SIDE = 28
_MOST_BYTES = 64 << 20
_SHIFT = 2


class FashionMnistDataModule(ImageDataModule):
    """Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017): 60,000 images for training, 10,000 for tests, 10 classes.

    The validation split is cut from the training images, stratified, and the same for every ``seed``, so that weights
    that were trained with another one have not seen it. The 28x28 grey images get a black margin up to ``image_size``.
    Training images are mirrored and moved by up to two pixels, drawn from torch's global generator. ``mean`` and
    ``std`` are those of the training images without margin.

    Args:
        root: the folder with the four IDX files, gzipped or not.
        image_size: side of the square that the network sees, 28 or more pixels.
        channels: 3 (all the same) or 1.
        val_size: images of the validation split.
        split_seed: of the cut.
        augment: change training images.
        batch_size: images per batch.
        seed: of the order of the training images.
        num_workers: loader processes; the data lies in memory, so 0 is the fastest.

    Raises:
        ConfigError: an argument out of range.
        DataError: no such files, or damaged ones (from ``setup`` on).
    """

    name = "fashion_mnist"

    def __init__(
        self,
        root: str | Path = ROOT,
        image_size: int = 32,
        channels: int = 3,
        val_size: int = 5000,
        split_seed: int = 0,
        augment: bool = True,
        batch_size: int = 128,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        check_at_least("image_size", image_size, _SIDE)
        check_at_least("val_size", val_size, len(self.classes))
        check_at_least("split_seed", split_seed, 0)
        if channels not in (1, 3):
            raise ConfigError(f"channels={channels!r}, but the images are grey: give 1, or 3 that are all the same.")
        super().__init__((channels, image_size, image_size), batch_size, seed, num_workers)
        self.mean, self.std = (0.286,) * channels, (0.353,) * channels
        self.root = Path(root).expanduser()
        self.val_size = val_size
        self.split_seed = split_seed
        self.augment = augment

    @property
    def classes(self) -> tuple[str, ...]:
        """Kinds of clothes."""
        return tuple(
            ["t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
        )

    def prepare_data(self) -> None:
        """See that the files are there."""
        for part in ("train", "t10k"):
            self._file(f"{part}-images-idx3-ubyte")
            self._file(f"{part}-labels-idx1-ubyte")

    def make_split(self, split: Split) -> ImageTensorDataset:
        """The images and labels of one split, in memory."""
        images, labels = self._read("t10k" if split == "test" else "train")
        if split != "test":
            if self.val_size > len(labels) - len(self.classes):
                raise ConfigError(
                    f"val_size={self.val_size}, but {self.root} has {len(labels)} training images: give less."
                )
            train, val = train_test_split(
                np.arange(len(labels)), test_size=self.val_size, random_state=self.split_seed, stratify=labels
            )
            chosen = np.sort(train if split == "train" else val)
            images, labels = images[chosen], labels[chosen]
        augment = _augmented if split == "train" and self.augment else None
        return ImageTensorDataset(images, labels, self.mean, self.std, augment)

    def _read(self, part: str) -> tuple[Tensor, Tensor]:
        """Images ``(n, 1, image_size, image_size)`` uint8 and labels ``(n,)`` int64."""
        images = read_idx(self._file(f"{part}-images-idx3-ubyte"), (None, _SIDE, _SIDE), _MOST_BYTES)
        path = self._file(f"{part}-labels-idx1-ubyte")
        labels = read_idx(path, (len(images),), _MOST_BYTES)
        if labels.max() >= len(self.classes):
            raise DataError(
                f"{path} holds the label {labels.max()}, there are {len(self.classes)} classes: take others."
            )
        margin = self.input_shape[1] - _SIDE
        sides = (margin // 2, margin - margin // 2) * 2
        return functional.pad(torch.from_numpy(images.copy())[:, None], sides), torch.from_numpy(
            labels.astype(np.int64)
        )

    def _file(self, name: str) -> Path:
        for path in (self.root / f"{name}.gz", self.root / name):
            if path.is_file():
                return path
        raise DataError(
            f"{self.root} does not hold {name}.gz: install Debian's package (apt install dataset-fashion-mnist), or "
            "give data.root=<folder with the four files of Fashion-MNIST>."
        )


def _augmented(images: Tensor) -> Tensor:
    return shifted(flipped(images), _SHIFT)
