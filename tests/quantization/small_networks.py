"""Small networks in the styles that people write."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    """A residual block with an in-place ReLU that is used twice, as in torchvision."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class Residual(nn.Module):
    """Stem, two residual blocks, pooling, classifier."""

    def __init__(self, channels: int = 8, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.block1, self.block2 = Block(channels), Block(channels)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(torch.relu(self.bn(self.stem(x))))
        x = self.block2(self.block1(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class Functional(nn.Module):
    """Functional operators, sizes taken from tensors, dropout as a function, strided and grouped convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(3, 8, 3, padding="same"), nn.BatchNorm2d(8)
        self.c2, self.b2 = nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.BatchNorm2d(8)
        self.c3 = nn.Conv2d(8, 12, (3, 1), stride=(2, 1), dilation=(1, 1))
        self.fc = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.b1(self.c1(x)), inplace=True)
        y = torch.add(self.b2(self.c2(x)), x)
        y = functional.max_pool2d(y.relu(), 2)
        y = functional.relu6(self.c3(y))
        y = functional.dropout(y.mean((2, 3)), 0.3, training=self.training)
        return self.fc(y.view(y.size(0), -1))


class ManyReaders(nn.Module):
    """A tensor that a ReLU and an addition read, and a tensor that two layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.b, self.c = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn(self.a(x))
        y = functional.relu(x)
        z = self.b(y) + self.c(y)
        return self.fc((z + x).mean((2, 3)))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3 * 8 * 8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 4)
    )


NETWORKS = {"residual": Residual, "functional": Functional, "many_readers": ManyReaders, "mlp": mlp}
INPUT_SHAPE = (3, 8, 8)


def settled(name: str, seed: int = 0) -> nn.Module:
    """A network in eval mode whose batch norms have seen data; its gains and shifts are random, some gains negative."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = NETWORKS[name]()
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
                nn.init.normal_(module.weight, 0.5, 0.5)
                nn.init.normal_(module.bias, 0.0, 0.2)
        for _ in range(20):
            model(torch.randn(16, *INPUT_SHAPE))
    return model.eval()


def images(count: int = 8, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, *INPUT_SHAPE, generator=torch.Generator().manual_seed(seed))
