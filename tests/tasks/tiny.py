"""A network and data small enough to train in a test."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class TinyNet(nn.Module):
    """Two convolutions with batch norm, one of them in a residual branch: ``(n, 3, 8, 8)`` to ``(n, 4)``."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())
        self.branch = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels))
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.relu(x + self.branch(x))
        return self.fc(self.pool(x).flatten(1))


class TinyData(pl.LightningDataModule):
    """32 images of 4 brightnesses, the same for every split, in a fixed order."""

    num_classes = 4
    example_input = torch.zeros(1, 3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.y = torch.arange(32) % 4
        self.x = torch.randn(32, 3, 8, 8, generator=generator) * 0.3 + self.y.view(-1, 1, 1, 1)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(self.x, self.y), batch_size=8)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def tiny_net(seed: int = 0, channels: int = 8) -> TinyNet:
    """A tiny network with the random weights of `seed`; the global generator stays as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TinyNet(channels)
