"""How calibration derives clipping ranges: closed forms, the options that choose, and networks that follow them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_baqe import BitConfig, calibrate, lower, quantize
from lightning_baqe.errors import ConfigError
from lightning_baqe.quantization.activation import StaticActivation
from lightning_baqe.quantization.observer import RANGE_METHODS, RangeObserver, parse_range
from quantization.small_networks import images, settled

BATCHES = st.lists(st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=20), min_size=1, max_size=6)
METHODS = st.sampled_from([*RANGE_METHODS, "percentile:90"])


def observed(*batches: torch.Tensor) -> RangeObserver:
    observer = RangeObserver()
    for batch in batches:
        observer.update(batch)
    return observer


@settings(deadline=None)
@given(BATCHES, METHODS, st.integers(2, 8), st.booleans())
def test_every_range_holds_0_and_lies_within_what_was_seen(
    batches: list[list[float]], method: str, bits: int, symmetric: bool
) -> None:
    low, high = observed(*map(torch.tensor, batches)).range(2**bits - 1, method, symmetric)
    assert low <= 0 <= high
    assert low < high
    values = [value for batch in batches for value in batch]
    if any(values) and not symmetric:
        assert min(0.0, *values) - 1e-6 <= low
        assert high <= max(0.0, *values) + 1e-6


@given(BATCHES)
def test_ema_is_the_running_mean_of_the_extremes(batches: list[list[float]]) -> None:
    low, high = min(batches[0]), max(batches[0])
    for batch in batches[1:]:
        low, high = 0.99 * low + 0.01 * min(batch), 0.99 * high + 0.01 * max(batch)
    found = observed(*map(torch.tensor, batches)).range(255, "ema")
    if min(low, 0.0) < max(high, 0.0):
        assert found == pytest.approx((min(low, 0.0), max(high, 0.0)))


def test_ema_of_batches_that_stay_the_same_is_minmax() -> None:
    observer = observed(*[torch.linspace(-1, 3, 50)] * 5)
    assert observer.range(15, "ema") == pytest.approx(observer.range(15, "minmax"))


def test_ema_hardly_sees_one_late_outlier() -> None:
    observer = observed(torch.tensor([-1.0, 2.0]), torch.tensor([-101.0, 202.0]))
    assert observer.range(15, "minmax") == (-101.0, 202.0)
    assert observer.range(15, "ema") == pytest.approx((-2.0, 4.0))


@pytest.mark.parametrize("percentile", [60.0, 99.0, 99.9, 100.0])
def test_percentiles_of_a_ramp(percentile: float) -> None:
    # 2001 values evenly from -1 to 1: p per cent of them lie below 2p/100 - 1.
    found = observed(torch.linspace(-1, 1, 2001)).range(255, f"percentile:{percentile}")
    assert found == pytest.approx((1 - percentile / 50, percentile / 50 - 1), abs=1e-6)


def test_the_percentile_is_99_99_where_none_is_given() -> None:
    observer = observed(torch.randn(4000, generator=torch.Generator().manual_seed(0)))
    assert observer.range(255, "percentile") == observer.range(255, "percentile:99.99")
    assert observer.range(255, "percentile") != observer.range(255, "percentile:99.9")


def test_the_percentile_clips_outliers() -> None:
    values = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    values[7] = 1000.0
    low, high = observed(values).range(255, "percentile:99.9")
    assert low == 0.0
    assert 0.99 < high < 1.0


def test_a_percentile_that_leaves_only_0_takes_all_that_was_seen() -> None:
    values = torch.zeros(1000)
    values[3], values[5] = -2.0, 5.0
    assert observed(values).range(15, "percentile:90") == (-2.0, 5.0)


@pytest.mark.parametrize("method", ["ema", "percentile:99"])
def test_symmetric_ranges_have_the_zero_point_in_the_middle(method: str) -> None:
    observer = observed(torch.linspace(-1, 3, 1001))
    low, high = observer.range(15, method, symmetric=True)
    assert low / high == pytest.approx(-8 / 7)
    assert high == pytest.approx(observer.range(15, method)[1])
    assert observed(torch.linspace(0, 3, 1001)).range(15, method, symmetric=True)[0] == 0


def test_parse_range() -> None:
    assert [parse_range(name) for name in RANGE_METHODS] == [(name, 99.99) for name in RANGE_METHODS]
    assert parse_range("percentile:97.5") == ("percentile", 97.5)


@pytest.mark.parametrize(
    ("method", "wanted"),
    [
        ("best", r"one of 'mse', 'minmax', 'ema', 'percentile'.*got 'best'"),
        ("mse:3", "one of 'mse'"),
        ("", "one of 'mse'"),
        (None, "got None"),
        ("percentile:", "above 50"),
        ("percentile:50", "above 50"),
        ("percentile:100.1", "up to 100"),
        ("percentile:nan", "got 'percentile:nan'"),
        ("percentile:many", "got 'percentile:many'"),
    ],
)
def test_what_is_no_range_is_refused(method: Any, wanted: str) -> None:
    model = settled("mlp")
    with pytest.raises(ConfigError, match=wanted):
        quantize(model, BitConfig.uniform(model), activation_range=method)


@pytest.mark.parametrize("method", ["mse", "minmax", "ema", "percentile:99"])
def test_calibration_follows_the_option(method: str) -> None:
    model, batches = settled("residual"), [images(8, seed) * (1 + seed) for seed in range(3)]
    quantized = calibrate(
        quantize(
            model,
            BitConfig.uniform(model, 4, 4),
            batches[0],
            activation_quantizer="static",
            activation_range=method,
        ),
        batches,
    )
    quantizer = quantized.get_submodule("activation_quantizers.x")
    assert isinstance(quantizer, StaticActivation)
    low, high = observed(*batches).range(255, method)
    assert quantizer.step() == pytest.approx((high - low) / 255)
    assert quantizer.zero_point() == round(-low / quantizer.step())
    others = [observed(*batches).range(255, other) for other in ("mse", "minmax", "ema", "percentile:99")]
    assert len(set(others)) == 4  # else the test could not tell them apart


def test_static_ranges_stay_while_weights_train() -> None:
    model, x = settled("residual"), images()
    quantized = calibrate(quantize(model, BitConfig.uniform(model, 4, 4), x, activation_quantizer="static"), [x])
    before = {name: value.clone() for name, value in quantized.state_dict().items()}
    quantized.train()
    optimizer = torch.optim.SGD([p for p in quantized.parameters() if p.requires_grad], 0.1)
    quantized(x).square().sum().backward()
    optimizer.step()
    moved = {name for name, value in quantized.state_dict().items() if not torch.equal(value, before[name])}
    assert "block1.conv1.weight" in moved
    assert "block1.conv1.weight_quantizer.scale" in moved
    assert not [name for name in moved if name.startswith("activation_quantizers")]


def test_static_ranges_lower_and_restore() -> None:
    model, x = settled("residual"), images()
    bits = BitConfig.uniform(model, 4, 4)
    quantized = calibrate(quantize(model, bits, x, activation_quantizer="static"), [x])
    graph = lower(quantized)
    assert torch.cosine_similarity(graph.run(x).flatten(), quantized(x).detach().flatten(), 0) > 0.995
    again = quantize(settled("residual", seed=3), bits, x, activation_quantizer="static")
    again.load_state_dict(quantized.state_dict())
    assert torch.equal(lower(again).run(x), graph.run(x))
