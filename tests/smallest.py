"""What the smallest form of every recipe runs on; recipes reach it as ``model._target_=smallest.network``."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_baqe.data import DigitsDataModule
from lightning_baqe.data.base import ImageTensorDataset, Split


class SmallestNet(nn.Module):
    """Three convolutions, one of them in a residual branch: ``(n, 3, h, w)`` to ``(n, num_classes)``."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.conv1 = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.conv2 = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8))
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.relu(x + self.conv2(self.conv1(x)))
        return self.fc(self.pool(x).flatten(1))


def network(name: str, num_classes: int, library: str) -> SmallestNet:
    """What `lightning_baqe.tasks.network` is called with."""
    return SmallestNet(num_classes)


def two_layers(name: str, num_classes: int, library: str) -> nn.Module:
    """A convolution and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes)
    )


class RoundDigits(DigitsDataModule):
    """Whether a digit has a loop (0, 6, 8, 9): one logit."""

    name = "round digits"

    @property
    def classes(self) -> tuple[str, ...]:
        return ("round",)

    def make_split(self, split: Split) -> ImageTensorDataset:
        data = super().make_split(split)
        data.labels = sum(data.labels == digit for digit in (0, 6, 8, 9))
        return data


SMALLEST = [
    "model._target_=smallest.network",
    "pretrain.epochs=1",
    "trainer.limit_train_batches=2",
    "trainer.enable_progress_bar=false",
    "deploy.repeats=3",
    "deploy.warmup=1",
]
LEARNED_BITS = [
    *("data=digits", "learned_bits.learn_epochs=2", "learned_bits.tune_epochs=1", "learned_bits.calibration_batches=1"),
    *("learned_bits.every=1", "learned_bits.learning_rate=0.5", "learned_bits.weights=5", "learned_bits.activations=6"),
]
HAWQ = [
    *("data=digits", "qat.steps=2", "qat.calibration_batches=1", "allocation.images=8", "allocation.tune_s=0"),
    *("sensitivity.samples=4", "allocation.baselines=[8]", "~allocation.budget.levels.medium"),
]
