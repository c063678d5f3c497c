"""What calibration says about a network's tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_baqe import BitConfig, calibrate, quantize
from lightning_baqe.quantization.observer import RangeObserver
from lightning_baqe.quantization.pointwise import function


class Spread(nn.Module):
    """Of the features of one layer the small ones count, and a large one takes the grid."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(5))
        self.register_buffer("gain", torch.cat([torch.full((1,), gain), torch.ones(15)]))
        with torch.no_grad():
            self.layers[2].weight[:, 0] /= gain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            x = torch.tanh(layer(x * self.gain if number == 2 else x))
        return x


def calibrated(gain: float) -> None:
    torch.manual_seed(0)
    model, x = Spread(gain).eval(), torch.randn(64, 16)
    calibrate(quantize(model, BitConfig.uniform(model), x, activation_range="minmax").eval(), [x])


def test_where_eight_bits_lose_the_signal_is_said() -> None:
    with pytest.warns(UserWarning, match=r"signal to noise falls to 'layers_2' .* keep that layer float"):
        calibrated(500.0)


def test_usual_networks_are_quiet() -> None:
    calibrated(1.0)  # warnings are errors here


def test_ranges_are_those_that_a_function_needs() -> None:
    """The grid before a function alone is as fine as its values need it: of a sign hardly any value is 0."""

    class Signs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(16, 64), nn.Linear(64, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.sign(self.first(x)))

    torch.manual_seed(0)
    model, x = Signs().eval(), torch.randn(256, 16)
    quantized = calibrate(quantize(model, BitConfig.uniform(model), x).eval(), [x])
    grid = quantized.activation_quantizers.first

    def zeros() -> float:
        with torch.no_grad():
            return float((grid(model.first(x)) == 0).float().mean())

    few, grid.through = zeros(), None
    calibrate(quantized, [x])
    assert few < 0.1 * zeros()


def test_ranges_before_a_function_hold_for_all_classes_however_batches_are_sorted() -> None:
    """Samples that came in a period were once counted by one class alone, and the grid lost all others."""
    observer = RangeObserver()
    logits = torch.tensor([-7.0, -6.0, 5.0, 6.0]).repeat(16)
    observer.update(logits)
    sigmoid = function("sigmoid")
    low, high = observer.range(255, "mse", through=sigmoid)
    found = sigmoid(logits.clamp(low, high))
    assert torch.allclose(found, torch.sigmoid(logits), atol=0.01)


@pytest.mark.parametrize("period", [2, 4, 8, 64, 1024])
def test_samples_are_of_all_positions_of_a_period(period: int) -> None:
    observer = RangeObserver()
    for _ in range(40):
        observer.update(torch.arange(period, dtype=torch.float32).repeat(16384 // period))
    counts = torch.bincount(observer.samples.long(), minlength=period)
    assert counts.min() > 0.8 * counts.float().mean()
