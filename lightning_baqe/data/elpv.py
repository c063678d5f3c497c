"""ELPV: electroluminescence photographs of solar cells, functional or defective."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision.transforms.v2 import functional

from lightning_baqe.data.augment import flipped, turned
from lightning_baqe.data.base import ImageDataModule, ImageTensorDataset, Split
from lightning_baqe.data.pictures import read_image
from lightning_baqe.errors import ConfigError, DataError, check_at_least
from lightning_baqe.files import read_file

_PACKAGE = "elpv_dataset"
_LABELS = "labels.csv"
_LINE = re.compile(r"(?P<path>images/[\w-]+\.png)\s+(?P<probability>[01](\.\d+)?)\s+(?P<kind>mono|poly)")
_MOST_BYTES = 16 << 20
_TEST_SHARE, _VAL_SHARE = 0.25, 0.2
_DEFECTIVE = 0.5


@dataclass(frozen=True)
class Cell:
    """A photograph.

    Args:
        path: of the file.
        probability: that the cell is defective, as experts judged: 0, 1/3, 2/3 or 1.
        kind: ``"mono"`` or ``"poly"`` crystalline.
    """

    path: Path
    probability: float
    kind: str

    @property
    def is_defective(self) -> bool:
        """Whether it rather is than not."""
        return self.probability >= _DEFECTIVE


class ElpvDataModule(ImageDataModule):
    """2,624 cells (Buerhop-Lutz et al., 2018; Deitsch et al., 2019), 300x300 grey, as three equal channels.

    A quarter is the test split, as in Deitsch et al.; a fifth of the rest is for validation. Both are stratified by
    class and kind of cell, and the same whatever ``seed``. Training images are mirrored and turned by right
    angles, drawn from torch's global generator. ``mean`` and ``std`` are ImageNet's, until ``normalise`` is called.

    The data is licensed CC BY-NC-SA 4.0: not for commercial use. It comes with ``pip install 'lightning-baqe[elpv]'``.

    Args:
        root: a folder with ``labels.csv`` and ``images``; None: the installed package's.
        image_size: side of the square that the network sees, pixels.
        augment: change training images.
        labels: of training images: ``"majority"``, or ``"drawn"`` anew from the experts' probability whenever an image
            is read, so that a network learns the probability. The other splits have the majority's.
        split_seed: of the splits.
        val_in_train: train on the validation images, too: for a last training whose settings were chosen before, since
            the validation split then tells nothing.
        batch_size: images per batch.
        seed: of the order of the training images.
        num_workers: loader processes; the data lies in memory, so 0 is the fastest.

    Raises:
        ConfigError: an argument out of range.
        DataError: the package is not installed, or its files are damaged (from ``cells`` and ``setup`` on).
    """

    name = "elpv"
    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)

    def __init__(
        self,
        root: str | Path | None = None,
        image_size: int = 224,
        augment: bool = True,
        labels: Literal["majority", "drawn"] = "majority",
        split_seed: int = 0,
        val_in_train: bool = False,
        batch_size: int = 32,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        check_at_least("image_size", image_size, 1)
        super().__init__((3, image_size, image_size), batch_size, seed, num_workers)
        self.root = None if root is None else Path(root).expanduser()
        if labels not in ("majority", "drawn"):
            raise ConfigError(f"labels={labels!r}, wanted is 'majority' or 'drawn'")
        check_at_least("split_seed", split_seed, 0)
        self.augment, self.labels = augment, labels
        self.split_seed, self.val_in_train = split_seed, val_in_train

    @property
    def classes(self) -> tuple[str, ...]:
        """``("functional", "defective")``."""
        return ("functional", "defective")

    def prepare_data(self) -> None:
        """See that the data is there."""
        _ = self.cells

    @cached_property
    def cells(self) -> dict[Split, list[Cell]]:
        """The photographs of each split, with the experts' probabilities and the kinds of cell."""
        cells = _read_labels(self._folder())
        strata = [f"{cell.is_defective} {cell.kind}" for cell in cells]
        try:
            rest, test = train_test_split(
                np.arange(len(cells)), test_size=_TEST_SHARE, random_state=self.split_seed, stratify=strata
            )
            train, val = train_test_split(
                rest, test_size=_VAL_SHARE, random_state=self.split_seed, stratify=[strata[i] for i in rest]
            )
        except ValueError as error:
            raise DataError(f"{self._folder() / _LABELS} has too few cells to be split: {error}") from error
        train = rest if self.val_in_train else train
        chosen: dict[Split, np.ndarray] = {"train": train, "val": val, "test": test}
        return {split: [cells[i] for i in np.sort(indices)] for split, indices in chosen.items()}

    def make_split(self, split: Split) -> ImageTensorDataset:
        """The images and labels of one split, in memory."""
        cells, side = self.cells[split], self.input_shape[1]
        images = torch.empty(len(cells), 1, side, side, dtype=torch.uint8)
        for place, cell in enumerate(cells):
            grey = functional.pil_to_tensor(read_image(cell.path).convert("L"))
            images[place] = functional.resize(grey, [side, side], antialias=True)
        labels = torch.tensor([int(cell.is_defective) for cell in cells])
        augment = _augmented if split == "train" and self.augment else None
        relabel = None
        if split == "train" and self.labels == "drawn":
            probabilities = torch.tensor([cell.probability for cell in cells])
            relabel = partial(_drawn, probabilities)
        return ImageTensorDataset(images, labels, self.mean, self.std, augment, relabel)

    def _folder(self) -> Path:
        if self.root is not None:
            return self.root
        found = importlib.util.find_spec(_PACKAGE)  # the package is not run
        if found is None or found.origin is None:
            raise DataError(
                "data=elpv needs the package elpv-dataset: pip install 'lightning-baqe[elpv]' (91 MB, licensed "
                "CC BY-NC-SA 4.0, not for commercial use), or give data.root=<folder with labels.csv and images>."
            )
        return Path(found.origin).parent / "data"


def _read_labels(folder: Path) -> list[Cell]:
    path = folder / _LABELS
    try:
        lines = read_file(path, _MOST_BYTES).decode("ascii").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in ASCII ({error}): take an undamaged copy.") from error
    cells = []
    for number, line in enumerate(lines, 1):
        found = _LINE.fullmatch(line.strip())
        if found is None or float(found["probability"]) > 1:
            raise DataError(
                f"{path}, line {number}: {line[:80]!r} is not 'images/<name>.png <probability> mono|poly': take an "
                "undamaged copy."
            )
        cells.append(Cell(folder / found["path"], float(found["probability"]), found["kind"]))
    if not cells:
        raise DataError(f"{path} is empty: take an undamaged copy.")
    return cells


def _drawn(probabilities: Tensor, indices: list[int]) -> Tensor:
    return (torch.rand(len(indices)) < probabilities[indices]).long()


def _augmented(images: Tensor) -> Tensor:
    return turned(flipped(flipped(images), vertically=True))
