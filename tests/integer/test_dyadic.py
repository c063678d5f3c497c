from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_baqe.errors import ConfigError
from lightning_baqe.integer.dyadic import Dyadic, rounding_shift

FACTORS = st.floats(2.0**-31, 2.0**29, allow_nan=False).flatmap(lambda f: st.sampled_from([f, -f]))


def half_up(value: Fraction) -> int:
    return math.floor(value + Fraction(1, 2))


@given(FACTORS)
def test_relative_error_of_one_factor(factor: float) -> None:
    dyadic = Dyadic.from_real(factor)
    exact = Fraction(int(dyadic.multiplier), 2**dyadic.shift)
    assert abs(exact - Fraction(factor)) <= abs(Fraction(factor)) / 2**31


@given(st.lists(FACTORS, min_size=1, max_size=8))
def test_error_of_a_vector_of_factors(factors: list[float]) -> None:
    dyadic = Dyadic.from_real(factors)
    bound = Fraction(max(map(abs, factors))) / 2**31
    for multiplier, factor in zip(dyadic.multiplier.tolist(), factors, strict=True):
        assert abs(Fraction(multiplier, 2**dyadic.shift) - Fraction(factor)) <= bound


@given(st.integers(-(2**31) + 1, 2**31 - 1), st.floats(-4.0, 4.0))
def test_apply_rounds_half_up(value: int, factor: float) -> None:
    dyadic = Dyadic.from_real(factor)
    exact = Fraction(value) * Fraction(int(dyadic.multiplier), 2**dyadic.shift)
    assert int(dyadic.apply(torch.tensor([value]))) == half_up(exact)


@given(st.integers(-(2**61), 2**61), st.integers(1, 60))
def test_rounding_shift(value: int, shift: int) -> None:
    assert int(rounding_shift(torch.tensor([value]), shift)) == half_up(Fraction(value, 2**shift))


def test_vector_along_a_channel_dimension() -> None:
    dyadic = Dyadic.from_real([0.5, 2.0])
    values = torch.tensor([[[3, -3], [3, -3]]])
    assert dyadic.apply(values, 1).tolist() == [[[2, -1], [6, -6]]]
    with pytest.raises(ConfigError, match="channel_dim"):
        dyadic.apply(values)


def test_refuses_what_cannot_be() -> None:
    for factor in (float("nan"), float("inf"), 2.0**30):
        with pytest.raises(ConfigError, match="finite and below"):
            Dyadic.from_real(factor)
    with pytest.raises(ConfigError, match="int64"):
        Dyadic(torch.tensor(1.0), 3)
    with pytest.raises(ConfigError, match="shift"):
        Dyadic(torch.tensor(1), 63)
    with pytest.raises(ConfigError, match="below"):
        Dyadic(torch.tensor(2**31), 3)
    assert int(Dyadic.from_real(0.0).multiplier) == 0
