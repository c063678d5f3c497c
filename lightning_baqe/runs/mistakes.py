"""What a deployed classifier gets wrong: which classes it takes for which, and images of it."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from lightning_baqe.files import replace_file

SHOWN = 12  # images at most
_NUMBERED = 12  # classes up to which the matrix has its numbers


@dataclass(frozen=True)
class Mistake:
    """One image.

    Args:
        image: ``(h, w, channels)``, 0..1.
        label, found: classes.
    """

    image: np.ndarray
    label: int
    found: int


@dataclass(frozen=True)
class Mistakes:
    """Of one network on one split.

    Args:
        classes: their names.
        confusion: images by class and by what was found, ``(classes, classes)``.
        shown: some of the images that it gets wrong, drawn at random.
    """

    classes: tuple[str, ...]
    confusion: np.ndarray
    shown: tuple[Mistake, ...]

    @property
    def accuracy(self) -> float:
        """Share of the images that are found right."""
        return float(np.trace(self.confusion) / max(1, self.confusion.sum()))


def find_mistakes(
    run: Callable[[Tensor], Any],
    batches: Iterable[Sequence[Tensor]],
    classes: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
) -> Mistakes:
    """Classify images and keep what goes wrong.

    Args:
        run: images ``(n, channels, h, w)`` to outputs ``(n, classes)``.
        batches: ``(x, y)`` with class indices ``(n,)``.
        classes: their names.
        mean, std: that ``x`` was normalised with, by channel.
    """
    confusion = torch.zeros(len(classes), len(classes), dtype=torch.int64)
    wrong: list[Mistake] = []
    count, draw = 0, random.Random(0)
    scale, shift = (torch.tensor(values).view(-1, 1, 1) for values in (std, mean))
    for x, y in batches:
        found = torch.as_tensor(run(x)).argmax(1).cpu()
        confusion += multiclass_confusion_matrix(found, y, len(classes))
        for i in (found != y).nonzero().flatten().tolist():
            count += 1
            place = len(wrong) if len(wrong) < SHOWN else draw.randrange(count)
            if place < SHOWN:  # a sample of all, without keeping them
                image = (x[i] * scale + shift).clamp(0, 1).permute(1, 2, 0).numpy()
                wrong[place : place + 1] = [Mistake(image, int(y[i]), int(found[i]))]
    return Mistakes(tuple(classes), confusion.numpy(), tuple(wrong))


def write_mistakes(found: Mistakes, title: str, path: Path) -> None:
    """Draw the confusion matrix and the images beside it as PNG; the file is replaced in one step."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(11, 4.6), dpi=160, layout="constrained")
    left, right = np.ravel(canvas.subfigures(1, 2, width_ratios=(1, 1.5), squeeze=False))
    _draw_matrix(left.subplots(), found)
    cells = right.subplots(3, 4)
    for axis in cells.flat:
        axis.axis("off")
    for axis, mistake in zip(cells.flat, found.shown, strict=False):
        grey = mistake.image.shape[2] == 1
        axis.imshow(mistake.image, cmap="gray" if grey else None, vmin=0, vmax=1)
        names = (found.classes[mistake.label], found.classes[mistake.found])
        axis.set_title("{}, taken for {}".format(*map(_plain, names)), fontsize=7)
    right.suptitle("Images that it gets wrong" if found.shown else "It gets no image wrong", fontsize=10)
    canvas.suptitle(_plain(title), fontsize=12, fontweight="bold")
    content = io.BytesIO()
    canvas.savefig(content, format="png")
    replace_file(path, content.getvalue())


def _draw_matrix(axis: Any, found: Mistakes) -> None:
    shares = found.confusion / np.maximum(found.confusion.sum(1, keepdims=True), 1)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    places = range(len(found.classes))
    size = 9 if len(found.classes) <= _NUMBERED else 5
    axis.set_xticks(places, [_plain(name) for name in found.classes], rotation=90 if len(found.classes) > 4 else 0)
    axis.set_yticks(places, [_plain(name) for name in found.classes])
    axis.tick_params(labelsize=size, length=0)
    axis.set_xlabel("found")
    axis.set_ylabel("label")
    axis.set_title(f"{found.accuracy:.2%} of {found.confusion.sum()} test images", fontsize=10)
    if len(found.classes) > _NUMBERED:
        return
    for row in places:
        for column in places:
            text = f"{found.confusion[row, column]}"
            if row == column:
                text += f"\n{shares[row, column]:.1%}"
            axis.text(column, row, text, ha="center", va="center", fontsize=size,
                      color="white" if shares[row, column] > 0.5 else "black")  # fmt: skip


def _plain(text: str) -> str:
    """Text that matplotlib takes for no formula."""
    return text.replace("$", r"\$")
