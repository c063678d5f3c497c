"""Tensors with several readers: what different bits would convert."""

from __future__ import annotations

import torch
from torch import nn

import lightning_baqe as baqe
from lightning_baqe.quantization.sharing import shared_tensors


class Block(nn.Module):
    """A tensor `x` that two convolutions and a sum read, and one that a convolution alone reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right, self.last = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(image))
        left = torch.relu(self.left(x))
        return self.last(left) + self.right(x) + x


def test_readers_by_hand() -> None:
    bits = baqe.BitConfig({name: baqe.LayerBits(8, 8) for name in ("stem", "left", "right", "last")}, other=7)
    assert shared_tensors(Block().eval(), torch.zeros(1, 3, 8, 8), bits) == [(("left", "right"), (7,))]


def test_a_chain_shares_nothing() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 2)).eval()
    assert shared_tensors(net, torch.zeros(1, 3, 8, 8), baqe.BitConfig.uniform(net, 8, 8)) == []
