"""Recurrent networks: their steps are unrolled, the batch lies in the middle, the first state is a constant."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lightning_baqe as baqe
from lightning_baqe.errors import UnsupportedModelError


class Recurrent(nn.Module):
    """The classes of a sequence, or of the rows of an image."""

    def __init__(self, kind: type[nn.RNNBase], batch_first: bool, bidirectional: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = kind(8, 6, batch_first=batch_first, bidirectional=bidirectional)
        self.head = nn.Linear(12 if bidirectional else 6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, first = x.flatten(0, -3), self.body.batch_first
        found = self.body(rows if first else rows.transpose(0, 1))[0].mean(1 if first else 0)
        return self.head(found.reshape(x.shape[0], -1, found.shape[-1]).mean(1))


def data(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(6, 5, 8), (6, 3, 5, 8)], ids=["sequence", "rows of an image"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_networks_are_right(
    kind: type[nn.RNNBase], batch_first: bool, bidirectional: bool, shape: tuple[int, ...]
) -> None:
    model, x = Recurrent(kind, batch_first, bidirectional).eval(), data(*shape)
    quantized = baqe.quantize(model, baqe.BitConfig.uniform(model), x, fallback="float").eval()
    graph = baqe.lower(baqe.calibrate(quantized, [x]))
    with torch.no_grad():
        assert torch.nn.functional.cosine_similarity(graph.run(x).flatten(), model(x).flatten(), 0) > 0.998
    artifact = baqe.build(graph)
    assert not any(baqe.verify(artifact, x).values())


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_without_fallback_they_are_refused_by_class(kind: type[nn.RNNBase]) -> None:
    model, x = Recurrent(kind, True, False).eval(), data(6, 5, 8)
    with pytest.raises(UnsupportedModelError, match=rf"add in module 'body' \({kind.__name__}\): the batch must stay"):
        baqe.quantize(model, baqe.BitConfig.uniform(model), x)
