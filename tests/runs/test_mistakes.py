"""What goes wrong is counted by closed form, shown by a bounded sample, and drawn whatever the names are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix
from torch import Tensor

from lightning_baqe.runs.mistakes import SHOWN, find_mistakes, write_mistakes

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def batches(count: int, classes: int, channels: int = 3) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Images whose first pixel says what is found, normalised; and what is found."""
    draw = torch.Generator().manual_seed(count)
    labels, found = (torch.randint(0, classes, (count,), generator=draw) for _ in range(2))
    images = torch.rand(count, channels, 6, 5, generator=draw)
    images[:, 0, 0, 0] = found / 100
    mean, std = (torch.tensor(values[:channels]).view(-1, 1, 1) for values in (MEAN, STD))
    return list(zip(((images - mean) / std).split(7), labels.split(7), strict=True)), found


def run_of(classes: int) -> object:
    def run(x: Tensor) -> Tensor:
        found = ((x[:, 0, 0, 0] * STD[0] + MEAN[0]) * 100).round().long()
        return torch.nn.functional.one_hot(found, classes).float()

    return run


@pytest.mark.parametrize(("classes", "channels"), [(2, 3), (2, 1), (30, 3)])
def test_counts_are_those_of_another_implementation(classes: int, channels: int, tmp_path: Path) -> None:
    data, found = batches(60, classes, channels)
    labels = torch.cat([y for _, y in data])
    names = [f"${number}_^" for number in range(classes)]  # no formula
    mistakes = find_mistakes(run_of(classes), data, names, MEAN[:channels], STD[:channels])  # type: ignore[arg-type]
    assert np.array_equal(mistakes.confusion, confusion_matrix(labels, found, labels=range(classes)))
    assert mistakes.accuracy == pytest.approx(float((labels == found).double().mean()))
    assert len(mistakes.shown) == SHOWN
    for mistake in mistakes.shown:
        assert mistake.label != mistake.found
        assert mistake.image.shape == (6, 5, channels)
        assert mistake.image[0, 0, 0] == pytest.approx(mistake.found / 100, abs=1e-5)  # as it was before normalisation
    write_mistakes(mistakes, "photographs: $trial_3$", tmp_path / "mistakes.png")
    with Image.open(tmp_path / "mistakes.png") as picture:
        assert picture.width > 1000
    assert [path.name for path in tmp_path.iterdir()] == ["mistakes.png"]


def test_all_right(tmp_path: Path) -> None:
    data, found = batches(20, 3)
    right = [(x, y) for (x, _), y in zip(data, found.split(7), strict=True)]
    mistakes = find_mistakes(run_of(3), right, ["a", "b", "c"], MEAN, STD)  # type: ignore[arg-type]
    assert (mistakes.accuracy, mistakes.shown) == (1.0, ())
    write_mistakes(mistakes, "all right", tmp_path / "mistakes.png")
    assert (tmp_path / "mistakes.png").stat().st_size > 0


def test_every_mistake_may_be_shown() -> None:
    """A sample, not the first ones: of two hundred, some of the last hundred are among twelve."""
    data, _ = batches(210, 5)
    wrong = find_mistakes(run_of(5), data, list("abcde"), MEAN, STD).shown  # type: ignore[arg-type]
    late = torch.cat([x for x, _ in data[15:]]) * torch.tensor(STD).view(-1, 1, 1) + torch.tensor(MEAN).view(-1, 1, 1)
    pictures = late.clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert any(np.allclose(mistake.image, picture) for mistake in wrong for picture in pictures)
