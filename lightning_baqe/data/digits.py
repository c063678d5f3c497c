"""Scikit-learn's handwritten digits: real images that ship with a dependency, so that nothing is downloaded."""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn.functional import interpolate

from lightning_baqe.data.base import ImageDataModule, ImageTensorDataset, Split

_SIDE = 32
_HELD_OUT = {"val": 300, "test": 300}
_SPLIT_SEED = 0


class DigitsDataModule(ImageDataModule):
    """1,797 handwritten digits in 10 classes, 1,197 / 300 / 300 for train / val / test, as 3x32x32 images.

    The 8x8 images with values 0..16 are enlarged (bilinear), scaled to bytes and repeated over three channels.
    The split is stratified and always the same: a model trained under one ``seed`` meets no training image in the
    test split of another. ``mean`` and ``std`` are those of the training split.

    Args:
        batch_size: images per batch.
        seed: of the order of the training images.
        num_workers: loader processes; the data lies in memory, so 0 is the fastest.

    Raises:
        ConfigError: an argument out of range.
    """

    name = "digits"
    mean = (0.305, 0.305, 0.305)
    std = (0.324, 0.324, 0.324)

    def __init__(self, batch_size: int = 32, seed: int = 0, num_workers: int = 0) -> None:
        super().__init__((3, _SIDE, _SIDE), batch_size, seed, num_workers)

    @property
    def classes(self) -> tuple[str, ...]:
        """ "0" to "9"."""
        return tuple("0123456789")

    def make_split(self, split: Split) -> ImageTensorDataset:
        """The images and labels of one split, in memory."""
        images, labels = _load()
        rest, test = train_test_split(
            torch.arange(len(labels)), test_size=_HELD_OUT["test"], random_state=_SPLIT_SEED, stratify=labels
        )
        train, val = train_test_split(rest, test_size=_HELD_OUT["val"], random_state=_SPLIT_SEED, stratify=labels[rest])
        indices = {"train": train, "val": val, "test": test}[split]
        return ImageTensorDataset(images[indices], labels[indices], self.mean, self.std)


def _load() -> tuple[Tensor, Tensor]:
    """All images ``(1797, 3, 32, 32)`` uint8 and labels ``(1797,)`` int64."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) * (255 / 16)
    images = interpolate(images, size=(_SIDE, _SIDE), mode="bilinear", align_corners=False)
    return images.round().to(torch.uint8).repeat(1, 3, 1, 1), torch.from_numpy(digits.target).long()
