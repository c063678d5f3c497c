"""SqueezeNext: networks of very few weights (Gholami et al., CVPR Workshops 2018, section 3, Table 1 and Figure 3).

A block reduces its channels twice with 1x1 convolutions, to a half and to a quarter, convolves 3x1 and 1x3, and expands
again; a shortcut is added, through a 1x1 convolution where shape or width changes. Behind four stages a 1x1 bottleneck
feeds the classifier.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Depths of the four stages, and the factor of all widths.
NAMES = {
    "squeezenext_1.0": ((6, 6, 8, 1), 1.0),
    "squeezenext_1.0_v5": ((2, 4, 14, 1), 1.0),
    "squeezenext_2.0": ((6, 6, 8, 1), 2.0),
    "squeezenext_2.0_v5": ((2, 4, 14, 1), 2.0),
}
_STEM, _WIDTHS, _BOTTLENECK = 64, (32, 64, 128, 256), 128


class SqueezeNext(nn.Module):
    """One of them, of :data:`NAMES`; 23 layers deep, ``v5`` with fewer blocks on large maps.

    Args:
        name: ``"squeezenext_2.0"``: the wide one of Schaefer et al.
        num_classes: outputs.
        in_channels: of the images.
    """

    def __init__(self, name: str, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        depths, factor = NAMES[name]
        width = int(_STEM * factor)
        self.stem = nn.Sequential(*_convolution(in_channels, width, 7, 2, 1), nn.MaxPool2d(3, 2, ceil_mode=True))
        stages = []
        for place, (base, depth) in enumerate(zip(_WIDTHS, depths, strict=True)):
            out, blocks = int(base * factor), []
            for block in range(depth):
                blocks.append(_Block(width, out, 2 if block == 0 and place else 1))
                width = out
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.bottleneck = nn.Sequential(*_convolution(width, int(_BOTTLENECK * factor), 1, 1, 0))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(int(_BOTTLENECK * factor), num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(n, num_classes)`` of images ``(n, in_channels, h, w)``."""
        x = self.bottleneck(self.stages(self.stem(x)))
        found: Tensor = self.fc(torch.flatten(self.pool(x), 1))
        return found


class _Block(nn.Module):
    def __init__(self, before: int, out: int, stride: int) -> None:
        super().__init__()
        # A block that halves the map keeps more channels, since its shortcut carries less.
        share = 1.0 if stride == 2 else 0.25 if before > out else 0.5
        half, quarter = int(before * share), int(before * share / 2)
        self.body = nn.Sequential(
            *_convolution(before, half, 1, stride, 0),
            *_convolution(half, quarter, 1, 1, 0),
            *_convolution(quarter, half, (1, 3), 1, (0, 1)),
            *_convolution(half, half, (3, 1), 1, (1, 0)),
            *_convolution(half, out, 1, 1, 0),
        )
        self.shortcut = nn.Sequential()
        if stride == 2 or before != out:
            self.shortcut = nn.Sequential(*_convolution(before, out, 1, stride, 0))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + self.shortcut(x))


def _convolution(
    before: int, out: int, kernel: int | tuple[int, int], stride: int, padding: int | tuple[int, int]
) -> list[nn.Module]:
    convolution = nn.Conv2d(before, out, kernel, stride, padding, bias=False)
    return [convolution, nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
