"""Changes of images that leave their class, drawn anew for each image of a batch from torch's global generator."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def flipped(images: Tensor, vertically: bool = False) -> Tensor:
    """Half of the images mirrored, left to right or upside down; ``(n, channels, h, w)``."""
    chosen = torch.rand(len(images)) < 0.5
    return torch.where(chosen.view(-1, 1, 1, 1), images.flip(2 if vertically else 3), images)


def shifted(images: Tensor, most: int) -> Tensor:
    """Images moved by up to ``most`` pixels in both directions; zeros come in. ``(n, channels, h, w)``."""
    count, _, height, width = images.shape
    windows = functional.pad(images, (most,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    down, right = torch.randint(0, 2 * most + 1, (2, count))
    return windows[torch.arange(count), :, down, right]


def turned(images: Tensor) -> Tensor:
    """Square images turned by 0 or 90 degrees; with both flips, all eight positions. ``(n, channels, side, side)``."""
    chosen = torch.rand(len(images)) < 0.5
    return torch.where(chosen.view(-1, 1, 1, 1), images.transpose(2, 3), images)
