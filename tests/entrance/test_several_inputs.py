"""Networks of several inputs: a tuple wherever a network of one takes a tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import lightning_baqe as baqe
from lightning_baqe.errors import CalibrationError, ConfigError

INPUTS = (torch.randn(4, 3, 8, 8), torch.randn(4, 5), torch.randn(4, 6, 10))


class Joined(nn.Module):
    """Pixels, numbers and a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear, self.rows = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(5, 8), nn.Conv1d(6, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, image: torch.Tensor, numbers: torch.Tensor, sequence: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv(image)).mean((2, 3))
        y = torch.maximum(x, torch.relu(self.linear(numbers)))
        return self.head(y + self.rows(sequence).amax(2))


def calibrated(model: nn.Module, batches: object) -> baqe.QuantizedModel:
    quantized = baqe.quantize(model, baqe.BitConfig.uniform(model), INPUTS).eval()
    return baqe.calibrate(quantized, batches)  # type: ignore[arg-type]


def test_from_end_to_end(tmp_path: Path) -> None:
    model = Joined().eval()
    quantized = calibrated(model, [INPUTS])
    graph = baqe.lower(quantized)
    assert graph.is_integer_only
    out = graph.run(INPUTS)
    assert torch.cosine_similarity(out.flatten(), model(*INPUTS).flatten(), 0) > 0.99
    assert (out - quantized(*INPUTS)).abs().max() < 0.05 * out.abs().max()
    artifact = baqe.build(graph, schedules="default")
    assert not any(baqe.verify(artifact, INPUTS).values())
    assert torch.equal(artifact.run(INPUTS, check=True), out)
    loaded = baqe.Artifact.load(artifact.save(tmp_path / "artifact"))
    assert torch.equal(loaded.run(INPUTS), out)


def test_larger_and_smaller_of_two() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.max(torch.min(self.a(x), self.b(x)), torch.minimum(self.c(x), self.b(x))).mean((2, 3))

    model, x = Both().eval(), INPUTS[0]
    graph = baqe.lower(baqe.calibrate(baqe.quantize(model, baqe.BitConfig.uniform(model), x).eval(), [x]))
    assert graph.is_integer_only
    assert torch.cosine_similarity(graph.run(x).flatten(), model(x).flatten(), 0) > 0.99


def test_float_graph_computes_the_network() -> None:
    model = Joined().eval()
    graph = baqe.lower(baqe.quantize(model, baqe.BitConfig.uniform(model, 32, 32), INPUTS))
    torch.testing.assert_close(graph.run(INPUTS), model(*INPUTS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "batch",
    [INPUTS, (INPUTS, torch.zeros(4)), (*INPUTS, torch.zeros(4)),
     {"sequence": INPUTS[2], "label": 1, "image": INPUTS[0], "numbers": INPUTS[1]}],
)  # fmt: skip
def test_batches(batch: object) -> None:
    model = Joined().eval()
    wanted, found = calibrated(model, [INPUTS]), calibrated(model, [batch])
    for name, quantizer in wanted.quantizers().items():
        assert quantizer.step() == found.quantizers()[name].step()


def test_what_does_not_fit_says_what_is_wanted() -> None:
    model = Joined().eval()
    with pytest.raises(CalibrationError, match="3 inputs image, numbers, sequence"):
        calibrated(model, [INPUTS[:2]])
    graph = baqe.lower(calibrated(model, [INPUTS]))
    with pytest.raises(ConfigError, match=r"tuple of 3 tensors .* \(n, 3, 8, 8\), \(n, 5\), \(n, 6, 10\)"):
        graph.run(INPUTS[0])
    with pytest.raises(ConfigError, match="tuple of 3 tensors"):
        graph.run(INPUTS[::-1])
    with pytest.raises(ConfigError, match=r"uint8.*wants floats: scale and normalise"):
        graph.run((INPUTS[0].to(torch.uint8), *INPUTS[1:]))
