"""Changes of images, each checked against what they may be."""

from __future__ import annotations

import torch

from lightning_baqe.data.augment import flipped, shifted, turned


def images() -> torch.Tensor:
    return torch.randint(0, 256, (200, 2, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_about_half_are_mirrored_and_turned() -> None:
    torch.manual_seed(0)
    x = images()
    for changed, other in (
        (flipped(x), x.flip(3)),
        (flipped(x, vertically=True), x.flip(2)),
        (turned(x), x.transpose(2, 3)),
    ):
        same, moved = ((changed == y).flatten(1).all(1) for y in (x, other))
        assert (same | moved).all()
        assert 60 < moved.sum() < 140


def test_images_are_moved_to_every_place_alike() -> None:
    torch.manual_seed(0)
    x = torch.zeros(2000, 1, 7, 7, dtype=torch.uint8)
    x[:, 0, 3, 3] = 255
    moved = shifted(x, 2)
    assert moved.shape == x.shape
    assert moved.dtype == torch.uint8
    counts = (moved[:, 0] == 255).sum(0)
    assert counts.sum() == 2000
    assert counts[1:6, 1:6].sum() == 2000
    assert counts[1:6, 1:6].min() > 40  # of 80
    assert torch.equal(shifted(x, 0), x)
