"""Fashion-MNIST: its splits, its margin, what is said where it is missing; the real one where it is installed."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from small_data import idx, small_fashion_mnist

from lightning_baqe.data import FashionMnistDataModule
from lightning_baqe.data.base import SPLITS
from lightning_baqe.data.fashion_mnist import ROOT
from lightning_baqe.errors import ConfigError, DataError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    small_fashion_mnist(tmp_path / "idx", train=150, test=60)
    return tmp_path / "idx"


def test_the_validation_split_is_cut_from_the_training_images_and_always_the_same(root: Path) -> None:
    data, again = (FashionMnistDataModule(root, val_size=50, seed=seed) for seed in (0, 1))
    assert {split: len(data.dataset(split)) for split in SPLITS} == {"train": 100, "val": 50, "test": 60}
    assert data.dataset("val").labels.bincount().tolist() == [5] * 10
    both = torch.cat([data.dataset("train").images, data.dataset("val").images])
    assert len({image.numpy().tobytes() for image in both}) == 150
    assert torch.equal(data.dataset("val").images, again.dataset("val").images)
    other = FashionMnistDataModule(root, val_size=50, split_seed=1)
    assert not torch.equal(data.dataset("val").images, other.dataset("val").images)


@pytest.mark.parametrize(("channels", "side"), [(1, 28), (3, 28), (1, 32), (3, 33)])
def test_channels_and_margin(root: Path, channels: int, side: int) -> None:
    data = FashionMnistDataModule(root, side, channels, val_size=50, batch_size=4)
    x, _ = next(iter(data.train_dataloader()))
    assert x.shape == (4, channels, side, side) == (4, *data.input_shape)
    images = data.dataset("test").images
    margin = side - 28
    assert images[:, :, : margin // 2].eq(0).all()
    inside = slice(margin // 2, margin // 2 + 28)
    assert images[:, :, inside, inside].sum() == images.sum()


def test_only_training_images_are_changed(root: Path) -> None:
    data = FashionMnistDataModule(root, val_size=50)
    for split in ("val", "test"):
        assert torch.equal(data.dataset(split)[3][0], data.dataset(split)[3][0])
    assert any(not torch.equal(data.dataset("train")[3][0], data.dataset("train")[3][0]) for _ in range(10))
    plain = FashionMnistDataModule(root, val_size=50, augment=False)
    assert torch.equal(plain.dataset("train")[3][0], plain.dataset("train")[3][0])


def test_files_that_are_missing_or_wrong(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"apt install dataset-fashion-mnist.*data\.root"):
        FashionMnistDataModule(tmp_path / "nowhere").prepare_data()
    unpacked = root / "t10k-labels-idx1-ubyte"
    unpacked.with_suffix(".gz").unlink()
    unpacked.write_bytes(idx(np.full(60, 10)))
    with pytest.raises(DataError, match="holds the label 10, there are 10 classes"):
        FashionMnistDataModule(root, val_size=50).setup("test")
    (root / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.zeros(7))))
    with pytest.raises(DataError, match="holds 7 bytes, wanted are 150"):
        FashionMnistDataModule(root, val_size=50).setup("fit")


def test_arguments_are_checked(root: Path) -> None:
    with pytest.raises(ConfigError, match="channels=2"):
        FashionMnistDataModule(root, channels=2)
    with pytest.raises(ConfigError, match="image_size"):
        FashionMnistDataModule(root, image_size=27)
    with pytest.raises(ConfigError, match="val_size=145"):
        FashionMnistDataModule(root, val_size=145).setup("fit")


@pytest.mark.skipif(not Path(ROOT).is_dir(), reason="dataset-fashion-mnist is not installed")
def test_the_real_one() -> None:
    data = FashionMnistDataModule(image_size=28, channels=1, augment=False)
    assert {split: len(data.dataset(split)) for split in SPLITS} == {"train": 55000, "val": 5000, "test": 10000}
    assert data.dataset("test").labels.bincount().tolist() == [1000] * 10
    x = torch.stack([image for image, _ in data.dataset("train").__getitems__(list(range(0, 55000, 11)))])
    assert abs(x.mean()) < 0.01
    assert abs(x.std() - 1) < 0.01
