"""Random user code: what is taken computes what the module does, what is not taken is refused by name."""

from __future__ import annotations

import pytest
import torch

from entrance.random_modules import images, make
from lightning_baqe import BitConfig, calibrate, lower, quantize
from lightning_baqe.errors import BaqeError

MANY, SOME = 500, 50
pytestmark = pytest.mark.filterwarnings("ignore")  # of PyTorch, about what such networks do


def take(seed: int) -> str:
    """What became of one network: ``"right"``, or why it was refused. AssertionError if it is silently wrong."""
    model, x = make(seed), images(8, seed)
    with torch.no_grad():
        wanted = model(x)
    try:
        quantized = quantize(model, BitConfig.uniform(model, 32, 32), x)
        eight = calibrate(quantize(model, BitConfig.uniform(model), x).eval(), [x])
        graphs = lower(quantized), lower(eight)
    except BaqeError as error:
        refusal = str(error)
        graphs = None
    if graphs is None:
        assert any(word in refusal for word in ("'", "forward", "network")), f"seed {seed}: names nothing: {refusal}"
        return refusal
    exact, close = (graph.run(x) for graph in graphs)
    scale = wanted.abs().max()
    assert (exact - wanted).abs().max() <= 2e-3 * scale, f"seed {seed}: float graph is off"
    similar = torch.cosine_similarity(close.flatten(), wanted.flatten(), 0)
    fake = torch.cosine_similarity(close.flatten(), eight(x).detach().flatten(), 0)
    assert fake > 0.995, f"seed {seed}: integers are not the fake-quantized network: {fake:.4f}"
    assert similar > 0.9, f"seed {seed}: cosine of 8 bit to float {similar:.4f}"
    return "right"


@pytest.mark.parametrize("seed", range(24))
def test_right_or_refused(seed: int) -> None:
    take(seed)


def test_most_are_right() -> None:
    assert sum(take(seed) == "right" for seed in range(24, 36)) >= 8


@pytest.mark.slow
@pytest.mark.parametrize("first", range(100, 100 + MANY, SOME))
def test_many_random_modules_are_right_or_refused(first: int) -> None:
    found = [take(seed) for seed in range(first, first + SOME)]
    assert found.count("right") >= 0.7 * SOME, [text[:150] for text in found if text != "right"]
