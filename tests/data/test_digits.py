"""The embedded digits: sizes, stratification, disjoint splits, and that something can be learned from them."""

import torch
from sklearn.linear_model import LogisticRegression

from lightning_baqe.data import DigitsDataModule
from lightning_baqe.data.base import SPLITS


def test_sizes() -> None:
    data = DigitsDataModule()
    assert {split: len(data.dataset(split)) for split in SPLITS} == {"train": 1197, "val": 300, "test": 300}
    assert data.num_classes == 10


def test_splits_are_stratified() -> None:
    data = DigitsDataModule()
    everything = torch.cat([data.dataset(split).labels for split in SPLITS]).bincount()
    for split in SPLITS:
        labels = data.dataset(split).labels
        expected = everything * len(labels) / 1797
        assert (labels.bincount() - expected).abs().max() <= 1.5


def test_splits_are_disjoint_and_complete() -> None:
    data = DigitsDataModule()
    images = torch.cat([data.dataset(split).images for split in SPLITS])
    assert len(images) == 1797
    assert len({image.numpy().tobytes() for image in images}) == 1797


def test_split_does_not_depend_on_the_seed() -> None:
    for split in SPLITS:
        one, other = (DigitsDataModule(seed=seed).dataset(split).images for seed in (0, 1))
        assert torch.equal(one, other)


def test_normalisation_is_that_of_the_training_split() -> None:
    x = torch.stack([x for x, _ in DigitsDataModule().dataset("train")])
    assert abs(x.mean()) < 0.01
    assert abs(x.std() - 1) < 0.01


def test_can_be_learned() -> None:
    data = DigitsDataModule()

    def features(split: str) -> torch.Tensor:
        return data.dataset(split).images[:, 0, ::4, ::4].flatten(1) / 255

    model = LogisticRegression(max_iter=200).fit(features("train"), data.dataset("train").labels)
    assert model.score(features("test"), data.dataset("test").labels) > 0.85
