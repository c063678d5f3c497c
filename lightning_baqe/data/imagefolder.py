"""The user's own images, in folders as ImageNet lies on disk."""

import os
from collections.abc import Callable
from functools import cached_property
from itertools import groupby
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from lightning_baqe.data.base import ImageDataModule, Split
from lightning_baqe.data.pictures import read_image
from lightning_baqe.errors import DataError, check_at_least

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
_SPLIT_SEED = 0
_LAYOUT = "<root>/train/<class>/*.jpg, <root>/val/<class>/*.jpg and, if you like, <root>/test/<class>/*.jpg"

Samples = list[tuple[Path, int]]


class ImageFileDataset(Dataset[tuple[Tensor, Tensor]]):
    """Images read from disk one by one.

    Args:
        samples: paths and labels.
        transform: PIL image (RGB) to a tensor.

    An item is ``(x, y)``: what ``transform`` gives and a scalar int64 tensor.

    Raises:
        DataError: an image that cannot be read, when it is.
    """

    def __init__(self, samples: Samples, transform: Callable[[Image.Image], Tensor]) -> None:
        self.samples = samples
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        path, label = self.samples[index]
        return self.transform(read_image(path)), torch.tensor(label)


class ImageFolderDataModule(ImageDataModule):
    """Images in ImageNet's layout: ``root/train/<class>/*.jpg``, ``root/val/<class>/*.jpg``, ``root/test/<class>/...``.

    Without ``root/test`` the test split is cut from ``root/val``: half of each class (the smaller half where the
    number is odd), stratified, by a fixed seed, so that it is the same in every run. Classes are the folders of
    ``root/train`` in sorted order; images may lie deeper inside them.

    Files are read as a person sees them, transparent pixels over white; see :mod:`lightning_baqe.data.pictures`.

    Training: random resized crop and horizontal flip; validation and test: resize of the shorter side and centre
    crop. ``mean`` and ``std`` are ImageNet's. Workers draw their crops from ``seed``; with ``num_workers=0`` they come
    from torch's global generator, so call ``pl.seed_everything``.

    Args:
        root: the folder that holds ``train`` and ``val``.
        image_size: side of the square that the network sees, pixels.
        resize: length of the shorter side before the centre crop, pixels; None is image_size / 0.875 (256 for 224).
        batch_size: images per batch.
        seed: of the order of the training images and of the workers.
        num_workers: loader processes; None is one per usable core, 8 at most.

    Raises:
        ConfigError: an argument out of range.
        DataError: a missing folder, fewer than two classes, a class without images, classes that differ between the
            splits (from ``num_classes`` and ``setup`` on); an image that cannot be read, or not in one way (when it
            is).
    """

    name = "imagefolder"
    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)

    def __init__(
        self,
        root: str | Path,
        image_size: int = 224,
        resize: int | None = None,
        batch_size: int = 64,
        seed: int = 0,
        num_workers: int | None = None,
    ) -> None:
        check_at_least("image_size", image_size, 1)
        workers = min(8, _usable_cores()) if num_workers is None else num_workers
        super().__init__((3, image_size, image_size), batch_size, seed, workers)
        self.root = Path(root).expanduser()
        self.image_size = image_size
        self.resize = round(image_size / 0.875) if resize is None else resize
        check_at_least("resize", self.resize, image_size)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of the folders in ``root/train``, sorted."""
        names = _class_names(self.root, "train")
        if len(names) == 1:
            raise DataError(
                f"{self.root / 'train'} holds one class folder, {names[0]!r}, and a classifier needs two or more. "
                f"Images are wanted as {_LAYOUT}: add the other classes, or move those that lie inside {names[0]!r} up."
            )
        return names

    def setup(self, stage: str | None = None) -> None:
        """Check the layout of every split, whatever the stage, so that a bad test folder shows before training."""
        _ = self._samples
        super().setup(stage)

    def make_split(self, split: Split) -> ImageFileDataset:
        """The images of one split; they are read from disk as they are asked for."""
        tail = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.mean, self.std)]
        if split == "train":
            head = [v2.RandomResizedCrop(self.image_size, antialias=True), v2.RandomHorizontalFlip()]
        else:
            head = [v2.Resize(self.resize, antialias=True), v2.CenterCrop(self.image_size)]
        return ImageFileDataset(self._samples[split], v2.Compose(head + tail))

    @cached_property
    def _samples(self) -> dict[Split, Samples]:
        train, val = _scan(self.root, "train", self.classes), _scan(self.root, "val", self.classes)
        if (self.root / "test").exists():
            return {"train": train, "val": val, "test": _scan(self.root, "test", self.classes)}
        val, test = _halve(val)
        if not test:
            raise DataError(
                f"{self.root} has no test folder, and {self.root / 'val'} has one image per class, so no test split "
                f"can be cut from it: add {self.root / 'test'}, or images to val."
            )
        return {"train": train, "val": val, "test": test}


def _class_names(root: Path, split: Split) -> tuple[str, ...]:
    """Sorted names of the class folders in ``root/split``."""
    for folder in (root, root / split):
        if not folder.is_dir():
            raise DataError(
                f"{folder} is not a folder. Images are wanted as {_LAYOUT}: create it, or give another root."
            )
    names = sorted(entry.name for entry in os.scandir(root / split) if entry.is_dir() and entry.name[0] != ".")
    if not names:
        raise DataError(f"{root / split} holds no class folder. Images are wanted as {_LAYOUT}: move them so.")
    return tuple(names)


def _scan(root: Path, split: Split, classes: tuple[str, ...]) -> Samples:
    """Every image of ``root/split`` with its label, sorted by path within each class."""
    found = set(_class_names(root, split))
    missing, unknown = sorted(set(classes) - found), sorted(found - set(classes))
    if missing or unknown:
        raise DataError(
            f"The classes of {root / split} differ from those of {root / 'train'}: "
            + "; ".join(
                f"only in {where}: {_some(names)}" for where, names in (("train", missing), (split, unknown)) if names
            )
            + ". Add or remove these folders until both hold the same."
        )
    samples: Samples = []
    for label, name in enumerate(classes):
        paths = [
            Path(folder, file)
            for folder, _, files in os.walk(root / split / name, followlinks=True)
            for file in files
            if file.lower().endswith(IMAGE_SUFFIXES) and not file.startswith(".")
        ]
        if not paths:
            raise DataError(
                f"The class folder {root / split / name} holds no image ({', '.join(IMAGE_SUFFIXES)}): "
                "add images, or remove the class from every split."
            )
        samples += [(path, label) for path in sorted(paths)]
    return samples


def _halve(samples: Samples) -> tuple[Samples, Samples]:
    """Two stratified halves of samples in the order of labels, by a fixed seed; the first takes the odd ones."""
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    halves: tuple[Samples, Samples] = ([], [])
    for _, group in groupby(samples, key=lambda sample: sample[1]):
        members = list(group)
        order = torch.randperm(len(members), generator=generator).tolist()
        first = set(order[: (len(members) + 1) // 2])
        for index, sample in enumerate(members):
            halves[index not in first].append(sample)
    return halves


def _some(names: list[str], most: int = 5) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
