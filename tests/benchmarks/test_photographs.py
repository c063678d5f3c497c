"""Crops of photographs that packages ship."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from lightning_baqe.benchmarks.photographs import crops, photographs
from lightning_baqe.errors import ConfigError


@pytest.mark.skipif(importlib.util.find_spec("skimage") is None, reason="scikit-image is not installed")
def test_crops_are_the_same_for_a_seed_and_of_all_pictures() -> None:
    assert all(path.is_file() for path in photographs())
    found = crops(20, 32, seed=0)
    assert found.shape == (20, 3, 32, 32)
    assert found.dtype == torch.uint8
    assert torch.equal(found, crops(20, 32, seed=0))
    assert not torch.equal(found, crops(20, 32, seed=1))
    assert len({image.numpy().tobytes() for image in found}) == 20


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="come with skimage, which is not installed: uv sync --group bench"):
        photographs()
