"""A small residual network in a LightningModule that knows nothing of this package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + x)


class SmallResNet(nn.Module):
    def __init__(self, channels: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
        self.block = Block(channels)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(functional.max_pool2d(self.stem(x), 2)).mean((2, 3)))


class ForeignModule(pl.LightningModule):
    """Somebody's module: own loss, own optimiser, the classifier two attributes deep."""

    def __init__(self, poison: Callable[[int], bool] = lambda step: False) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"classifier": SmallResNet()})
        self.poison = poison
        self.installed: list[set[int]] = []

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        x, y = batch
        logits = self.body.classifier(x)
        loss = functional.cross_entropy(logits, y, label_smoothing=0.05)
        return loss * float("nan") if self.poison(int(self.global_step)) else loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val/loss", functional.cross_entropy(self.body.classifier(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.installed.append({id(p) for p in self.parameters()})
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def random_loader(n: int = 64) -> DataLoader[Any]:
    """Images and labels without meaning."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 3, 32, 32, generator=generator), torch.randint(0, 10, (n,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=32)
