"""Residual networks for images of 32 pixels.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2: a 3x3 convolution, then three stages
of n residual units each with 16, 32 and 64 channels on maps of 32, 16 and 8 pixels, 6n + 2 layers. Where channels
change, the shortcut is a 1x1 convolution with a batch norm (their option B).
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

NAMES = tuple(f"resnet{6 * n + 2}" for n in (1, 2, 3, 5, 7, 9, 18))
_WIDTHS = (16, 32, 64)


class SmallResNet(nn.Module):
    """One of them, of :data:`NAMES`.

    Args:
        name: ``"resnet20"``.
        num_classes: outputs.
        in_channels: of the images.
        zero_init_residual: start the last batch norm of each unit at gain 0.
    """

    def __init__(self, name: str, num_classes: int, in_channels: int = 3, zero_init_residual: bool = False) -> None:
        super().__init__()
        depth = int(re.sub(r"\D", "", name))
        self.conv1 = nn.Conv2d(in_channels, _WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(_WIDTHS[0])
        self.relu = nn.ReLU(inplace=True)
        self.layer1, self.layer2, self.layer3 = (
            _stage(before, width, (depth - 2) // 6)
            for before, width in zip((_WIDTHS[0], *_WIDTHS), _WIDTHS, strict=False)
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(_WIDTHS[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(n, num_classes)`` of images ``(n, in_channels, h, w)``."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        found: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return found


def _stage(before: int, width: int, units: int) -> nn.Sequential:
    stride = 1 if before == width else 2
    shortcut = None
    if stride != 1:
        shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))
    first = BasicBlock(before, width, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(width, width) for _ in range(units - 1)))
