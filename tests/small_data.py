"""Data sets that are installed, in the same formats and small."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image


def idx(array: np.ndarray) -> bytes:
    """An array of bytes as IDX."""
    sizes = np.array(array.shape, ">u4").tobytes()
    return bytes((0, 0, 8, array.ndim)) + sizes + array.astype(np.uint8).tobytes()


def small_fashion_mnist(root: Path, train: int, test: int) -> None:
    """Files of Fashion-MNIST's form with so many images; an image is as bright as its class is high."""
    root.mkdir()
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("t10k", test)):
        labels = np.arange(count) % 10
        images = labels[:, None, None] * 20 + rng.integers(0, 50, (count, 28, 28))
        for name, array in ((f"{part}-images-idx3-ubyte.gz", images), (f"{part}-labels-idx1-ubyte.gz", labels)):
            (root / name).write_bytes(gzip.compress(idx(array)))


def small_elpv(root: Path, count: int) -> None:
    """Files of ELPV's form with so many cells; a cell is as dark as it is defective."""
    (root / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = []
    for number in range(count):
        third = number % 4
        pixels = (200 - 50 * third + rng.integers(0, 40, (30, 30))).astype(np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"cell{number:04}.png")
        probability = ("0.0", "0.3333333333333333", "0.6666666666666666", "1.0")[third]
        lines.append(f"images/cell{number:04}.png  {probability}  {('mono', 'poly')[number // 4 % 2]}")
    (root / "labels.csv").write_text("\n".join(lines) + "\n")


def mixed_pictures(root: Path, count: int = 8) -> list[Path]:
    """An image folder of two classes, ``count`` pictures each in train and val, of all kinds that people have.

    Returns:
        the pictures; every class of every split has every kind if there are at least eight.
    """
    rng, found = np.random.default_rng(0), []
    for split in ("train", "val"):
        for label, name in enumerate(("bright", "dark")):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                array = (rng.integers(0, 90, (48, 40, 3)) + (150, 10)[label]).astype(np.uint8)
                found.append(_save(Image.fromarray(array), number % 8, root / split / name / f"{number:03}"))
    return found


def _save(image: Image.Image, kind: int, stem: Path) -> Path:
    grey = np.asarray(image.convert("L")).astype(np.uint16)
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    path = stem.with_suffix(".jpg" if kind in (4, 5) else ".png")
    if kind == 4:
        image.convert("CMYK").save(path)
    elif kind == 5:
        image.save(path, exif=turned)
    elif kind == 6:
        Image.fromarray(grey * 257).save(path)  # 16 bit
    else:
        image.convert(("RGB", "L", "P", "RGBA", "", "", "", "1")[kind]).save(path)
    return path
