"""Models of accuracy by bits."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lightning_baqe.costs.accuracy_models import (
    COLUMNS,
    FITS,
    choose,
    from_logit,
    from_record,
    held_out,
    logit,
    scores,
    spread_of_repeats,
)
from lightning_baqe.errors import ConfigError

LAYERS = 8


def data(n: int, noise: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Bit-configs whose layers add to the logit of the error as their grids get coarser."""
    rng = np.random.default_rng(0)
    widths = rng.choice([4, 5, 6, 7, 8, 32], (n, LAYERS)).astype(np.float64)
    amplitude = np.where(widths == 32, 0.0, 2.0 ** (4 - widths))
    z = -2.0 + amplitude @ rng.uniform(0, 0.5, LAYERS) + noise * rng.standard_normal(n)
    return widths, from_logit(z)


def test_the_logit_has_an_inverse() -> None:
    errors = np.array([0.01, 0.3, 0.9])
    np.testing.assert_allclose(from_logit(logit(errors)), errors)
    assert np.isfinite(logit(np.array([0.0, 1.0]))).all()


@pytest.mark.parametrize("name", list(FITS))
def test_what_is_kept_predicts_the_same(name: str) -> None:
    widths, errors = data(40, 0.02)
    model = FITS[name](widths, errors)
    again = from_record(json.loads(json.dumps(model.record())))
    np.testing.assert_allclose(again.predict(widths), model.predict(widths), rtol=1e-4)
    one = model.predict(widths[:1])
    assert one.shape == (1,)
    assert 0 < one[0] < 1


def test_the_best_model_finds_what_layers_add() -> None:
    widths, errors = data(80, 0.01)
    model, table, best = choose(widths, errors)
    assert set(table) == set(FITS)
    assert table[best]["r2"] > 0.9
    assert table[best]["spearman"] > 0.9
    fresh, truth = data(80)
    assert scores(truth, model.predict(fresh))["mae"] < 0.01


def test_no_coarser_grid_lowers_the_error_of_a_monotone_model() -> None:
    widths, errors = data(30, 0.5)
    for name in ("monotone amplitudes", "monotone noises"):
        model = FITS[name](widths, errors)
        for layer in range(LAYERS):
            finer = widths.copy()
            finer[:, layer] = 8
            coarser = widths.copy()
            coarser[:, layer] = 4
            assert (model.predict(coarser) >= model.predict(finer) - 1e-12).all()


def test_held_out_rows_share_no_bits_with_those_that_are_fitted() -> None:
    widths, errors = data(20)
    doubled = np.concatenate([widths, widths])
    seen: list[set[tuple[float, ...]]] = []

    class Constant:
        def predict(self, rows: np.ndarray) -> np.ndarray:
            assert not {tuple(row) for row in rows.tolist()} & seen[-1]
            return np.zeros(len(rows))

        def record(self) -> dict[str, float]:
            return {}

    def fit(rows: np.ndarray, _: np.ndarray) -> Constant:
        seen.append({tuple(row) for row in rows.tolist()})
        return Constant()

    assert (held_out(fit, doubled, np.concatenate([errors, errors]), 5) == 0).all()
    assert len(seen) == 5


def test_spread_is_that_of_equal_bits() -> None:
    assert spread_of_repeats(["a", "a", "b"], np.array([0.1, 0.3, 0.9])) == pytest.approx(np.std([0.1, 0.3], ddof=1))
    assert spread_of_repeats(["a", "b"], np.array([0.1, 0.3])) == 0.0
    latencies = np.log([100.0, 102.0, 7.0])
    assert spread_of_repeats(["a", "a", "b"], latencies) == pytest.approx(np.log(1.02) / np.sqrt(2))


def test_too_few_rows_and_unknown_kinds() -> None:
    widths, errors = data(3)
    with pytest.raises(ConfigError, match="wants 4 or more"):
        choose(widths, errors)
    with pytest.raises(ConfigError, match="additive or process"):
        from_record({"kind": "oracle"})
    assert all(part(widths).shape[0] == 3 for parts in COLUMNS.values() for part in parts)
