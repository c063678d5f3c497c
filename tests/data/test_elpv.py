"""ELPV: its splits and the experts' numbers; the real one where it is installed."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path

import pytest
import torch
from small_data import small_elpv

from lightning_baqe.data import ElpvDataModule
from lightning_baqe.data.base import SPLITS
from lightning_baqe.errors import ConfigError, DataError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    small_elpv(tmp_path / "elpv", 160)
    return tmp_path / "elpv"


def test_splits_are_stratified_by_class_and_kind(root: Path) -> None:
    data = ElpvDataModule(root, 16)
    assert {split: len(data.dataset(split)) for split in SPLITS} == {"train": 96, "val": 24, "test": 40}
    for split, each in (("train", 24), ("val", 6), ("test", 10)):
        assert set(Counter((c.is_defective, c.kind) for c in data.cells[split]).values()) == {each}
        assert data.dataset(split).labels.tolist() == [int(c.is_defective) for c in data.cells[split]]
    paths = [cell.path for split in SPLITS for cell in data.cells[split]]
    assert len(set(paths)) == 160
    assert data.cells == ElpvDataModule(root, 16, seed=1).cells
    assert {round(cell.probability, 3) for cell in data.cells["train"]} == {0, 0.333, 0.667, 1}


def test_other_splits_and_all_that_is_not_tested(root: Path) -> None:
    whole, other = ElpvDataModule(root, 16, val_in_train=True), ElpvDataModule(root, 16, split_seed=1)
    first = ElpvDataModule(root, 16)
    paths = {split: {cell.path for cell in first.cells[split]} for split in SPLITS}
    assert {cell.path for cell in whole.cells["train"]} == paths["train"] | paths["val"]
    assert whole.cells["val"] == first.cells["val"]
    assert whole.cells["test"] == first.cells["test"]
    assert {cell.path for cell in other.cells["test"]} != paths["test"]
    assert len(other.cells["test"]) == 40
    with pytest.raises(ConfigError, match="split_seed"):
        ElpvDataModule(root, split_seed=-1)


def test_grey_becomes_three_channels_in_the_weights_normalisation(root: Path) -> None:
    data = ElpvDataModule(root, 16, batch_size=8)
    data.normalise((0.5, 0.25, 0.0), (0.5, 0.25, 1.0))
    x, _ = next(iter(data.val_dataloader()))
    assert x.shape == (8, 3, 16, 16)
    grey = x[:, 2]
    assert grey.min() >= 0
    assert grey.max() <= 1
    torch.testing.assert_close(x[:, 0], (grey - 0.5) / 0.5)
    torch.testing.assert_close(x[:, 1], (grey - 0.25) / 0.25)
    with pytest.raises(ConfigError, match="before setup"):
        data.normalise((0.0,) * 3, (1.0,) * 3)
    for wrong in ((0.5,), (0.5, 0.5, 0.5, 0.5)):
        with pytest.raises(ConfigError, match="has 3 channels"):
            data.normalise(wrong, (1.0,) * len(wrong))
    with pytest.raises(ConfigError, match="positive std"):
        data.normalise((0.5,) * 3, (1.0, 0.0, 1.0))


@pytest.mark.parametrize(
    "line",
    ["images/../../a.png 1.0 mono", "/etc/a.png 1.0 mono", "images/a.png 1.5 mono", "images/a.png 1.0 x", ""],
)
def test_lines_that_are_none(root: Path, line: str) -> None:
    labels = root / "labels.csv"
    labels.write_text(labels.read_text() + line + "\n")
    with pytest.raises(DataError, match=r"labels\.csv, line 161"):
        ElpvDataModule(root).prepare_data()


def test_what_is_missing_is_named(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"nowhere/labels\.csv"):
        ElpvDataModule(tmp_path / "nowhere").prepare_data()
    lost = ElpvDataModule(root, 16)
    lost.cells["val"][0].path.unlink()
    with pytest.raises(DataError, match=r"Cannot read the image .*cell"):
        lost.setup("fit")
    (root / "labels.csv").write_text("")
    with pytest.raises(DataError, match="is empty"):
        ElpvDataModule(root).prepare_data()
    (root / "labels.csv").write_text("images/cell0001.png 1.0 mono\n")
    with pytest.raises(DataError, match="too few cells"):
        ElpvDataModule(root).prepare_data()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'lightning-baqe\[elpv\]'.*CC BY-NC-SA"):
        ElpvDataModule().prepare_data()


@pytest.mark.skipif(importlib.util.find_spec("elpv_dataset") is None, reason="elpv-dataset is not installed")
def test_the_real_one() -> None:
    data = ElpvDataModule()
    assert {split: len(cells) for split, cells in data.cells.items()} == {"train": 1574, "val": 394, "test": 656}
    cells = [cell for split in SPLITS for cell in data.cells[split]]
    assert Counter(round(3 * cell.probability) for cell in cells) == {0: 1508, 1: 295, 2: 106, 3: 715}
    assert Counter(cell.kind for cell in cells) == {"mono": 1074, "poly": 1550}


def test_labels_are_drawn_from_the_experts_probabilities(root: Path) -> None:
    data = ElpvDataModule(root, 16, labels="drawn")
    train, cells = data.dataset("train"), data.cells["train"]
    torch.manual_seed(0)
    everything = list(range(len(cells)))
    drawn = torch.stack([torch.stack([y for _, y in train.__getitems__(everything)]) for _ in range(100)]).float()
    wanted = torch.tensor([cell.probability for cell in cells])
    sure = (wanted == 0) | (wanted == 1)
    assert torch.equal(drawn.mean(0)[sure], wanted[sure])
    for third in (1 / 3, 2 / 3):
        assert float(drawn[:, wanted.isclose(torch.tensor(third))].mean()) == pytest.approx(third, abs=0.03)
    assert train[0][1].dtype == torch.int64
    for split in ("val", "test"):
        labels = [int(data.dataset(split)[i][1]) for i in range(len(data.cells[split]))]
        assert labels == [int(cell.is_defective) for cell in data.cells[split]]
    with pytest.raises(ConfigError, match="labels='soft', wanted is 'majority' or 'drawn'"):
        ElpvDataModule(root, labels="soft")
