"""Models of accuracy by bits, small enough to be kept as JSON: fitted to trained bit-configs, chosen by held-out error.

| symbol | meaning                                                  | shape |
| ------ | -------------------------------------------------------- | ----- |
| widths | bits of the searched layers, 4 to 8, or 32 = float       | n x l |
| z      | logit of the error, ln(e / (1 - e))                      | n     |
| x      | columns that a model sees of the widths                  | n x d |
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls
from scipy.stats import spearmanr
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, DotProduct, WhiteKernel
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import GroupKFold

from lightning_baqe.errors import ConfigError
from lightning_baqe.quantization.config import FLOAT_BITS

Array = npt.NDArray[np.float64]
_ALPHAS = tuple(10.0**p for p in np.arange(-2, 4.5, 0.5))
_SMALLEST = 1e-4  # errors are kept this far from 0 and 1


def logit(error: Array) -> Array:
    """``ln(e / (1 - e))``."""
    clipped = np.clip(error, _SMALLEST, 1 - _SMALLEST)
    return np.asarray(np.log(clipped / (1 - clipped)))


def from_logit(z: Array) -> Array:
    """The error of a logit."""
    return np.asarray(1 / (1 + np.exp(-z)))


def _noise(widths: Array) -> Array:
    """Power of a uniform quantizer's rounding error, 1 at 4 bits, a quarter with each bit more, none in float."""
    return np.where(widths == FLOAT_BITS, 0.0, 4.0 ** (4.0 - widths))


def _amplitude(widths: Array) -> Array:
    return np.sqrt(_noise(widths))


def _levels(widths: Array) -> Array:
    return np.concatenate([widths == level for level in (4, 5, 6, 7, 8)], axis=1).astype(np.float64)


def _mean_amplitude(widths: Array) -> Array:
    return np.asarray(_amplitude(widths).mean(1, keepdims=True))


def _total(widths: Array) -> Array:
    is_float = (widths == FLOAT_BITS).mean(1, keepdims=True)
    return np.concatenate([_noise(widths).mean(1, keepdims=True), _mean_amplitude(widths), is_float], axis=1)


# What a model sees of the widths: these parts, side by side.
COLUMNS: dict[str, tuple[Callable[[Array], Array], ...]] = {
    "total": (_total,),
    "amplitude": (_amplitude, _total),
    "noise": (_noise, _total),
    "amplitudes": (_amplitude, _mean_amplitude),
    "noises": (_noise,),
    "levels": (_levels, _total),
}


def _columns(name: str, widths: Array) -> Array:
    return np.concatenate([part(widths) for part in COLUMNS[name]], axis=1)


@dataclass(frozen=True)
class Additive:
    """``z = bias + x w``: every layer adds its part to the logit of the error.

    Args:
        columns: a key of :data:`COLUMNS`.
        weights: ``(d,)``.
        bias: of the logit.
    """

    columns: str
    weights: Array
    bias: float

    def predict(self, widths: Array) -> Array:
        """Errors 0..1 ``(n,)`` of widths ``(n, l)``."""
        return from_logit(_columns(self.columns, widths) @ self.weights + self.bias)

    def record(self) -> dict[str, Any]:
        """As JSON can hold it."""
        weights = [float(f"{weight:.6g}") for weight in self.weights]
        return {"kind": "additive", "columns": self.columns, "weights": weights, "bias": self.bias}


@dataclass(frozen=True)
class Process:
    """The mean of a Gaussian process on layers' amplitudes: a linear and a smooth kernel, ``z = bias + k(x, X) a``.

    Args:
        inputs: widths of the data ``(m, l)``.
        dual: ``a``, ``(m,)``.
        linear, smooth: variances of the kernels.
        length: scale of the smooth one, in root mean squares over layers.
        bias: of the logit.
    """

    inputs: Array
    dual: Array
    linear: float
    smooth: float
    length: float
    bias: float

    def predict(self, widths: Array) -> Array:
        """Errors 0..1 ``(n,)`` of widths ``(n, l)``."""
        x, data = process_inputs(widths), process_inputs(self.inputs)
        apart = ((x[:, None] - data[None]) ** 2).sum(-1)
        kernel = self.linear * (x @ data.T) + self.smooth * np.exp(-0.5 * apart / self.length**2)
        return from_logit(kernel @ self.dual + self.bias)

    def record(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "kind": "process",
            "inputs": self.inputs.astype(int).tolist(),
            "dual": [float(f"{value:.8g}") for value in self.dual],
            **{name: getattr(self, name) for name in ("linear", "smooth", "length", "bias")},
        }


AccuracyModel = Additive | Process


def process_inputs(widths: Array) -> Array:
    """Amplitudes, scaled so that distances are root mean squares over the layers."""
    return _amplitude(widths) / np.sqrt(widths.shape[1])


def from_record(record: Mapping[str, Any]) -> AccuracyModel:
    """A model of its record.

    Raises:
        ConfigError: a kind that this version does not know.
    """
    fields = {name: value for name, value in record.items() if name != "kind"}
    if record["kind"] == "additive":
        return Additive(**{**fields, "weights": np.array(fields["weights"])})
    if record["kind"] == "process":
        arrays = {name: np.array(fields[name], dtype=np.float64) for name in ("inputs", "dual")}
        return Process(**{**fields, **arrays})
    raise ConfigError(f"an accuracy model is additive or process, got {record['kind']!r}: update the package")


def fit_additive(columns: str, widths: Array, errors: Array) -> Additive:
    """Ridge regression, its strength by leave-one-out error."""
    x, z = _columns(columns, widths), logit(errors)
    scale = x.std(0) + 1e-9
    model = RidgeCV(alphas=_ALPHAS).fit(x / scale, z)
    return Additive(columns, np.asarray(model.coef_ / scale), float(model.intercept_))


def fit_monotone(columns: str, widths: Array, errors: Array) -> Additive:
    """As :func:`fit_additive`, with no layer whose coarser grid lowers the error; strength by cross-validation."""
    x, z = _columns(columns, widths), logit(errors)
    scale = x.std(0) + 1e-9

    def solve(rows: Array, targets: Array, alpha: float) -> tuple[Array, float]:
        middle = rows.mean(0)
        stacked = np.concatenate([(rows - middle) / scale, np.sqrt(alpha) * np.eye(len(scale))])
        wanted = np.concatenate([targets - targets.mean(), np.zeros(len(scale))])
        weights = nnls(stacked, wanted)[0] / scale
        return weights, float(targets.mean() - middle @ weights)

    def loss(alpha: float) -> float:
        total = 0.0
        for fold in range(5):
            test = np.arange(len(z)) % 5 == fold
            weights, bias = solve(x[~test], z[~test], alpha)
            total += float(((x[test] @ weights + bias - z[test]) ** 2).sum())
        return total

    return Additive(columns, *solve(x, z, min(_ALPHAS, key=loss)))


def fit_process(widths: Array, errors: Array) -> Process:
    """Hyperparameters by marginal likelihood."""
    z = logit(errors)
    bias, scale = float(z.mean()), float(z.std()) + 1e-9
    kernel = (
        ConstantKernel(0.5, (1e-4, 1e3)) * DotProduct(0.0, "fixed")
        + ConstantKernel(0.5, (1e-4, 1e2)) * RBF(0.5, (0.05, 10.0))
        + WhiteKernel(0.3, (1e-4, 10.0))
    )
    found = GaussianProcessRegressor(kernel, normalize_y=False, n_restarts_optimizer=0)
    with warnings.catch_warnings():
        # A part of the kernel that the data have no use for goes to its bound.
        warnings.simplefilter("ignore", ConvergenceWarning)
        found.fit(process_inputs(widths), (z - bias) / scale)
    both = found.kernel_.k1
    return Process(
        widths, np.asarray(found.alpha_) * scale, float(both.k1.k1.constant_value),
        float(both.k2.k1.constant_value), float(both.k2.k2.length_scale), bias,
    )  # fmt: skip


FITS: dict[str, Callable[[Array, Array], AccuracyModel]] = {
    **{f"additive {name}": partial(fit_additive, name) for name in ("total", "amplitude", "noise", "levels")},
    **{f"monotone {name}": partial(fit_monotone, name) for name in ("amplitudes", "noises")},
    "process": fit_process,
}


def held_out(fit: Callable[[Array, Array], AccuracyModel], widths: Array, errors: Array, folds: int = 10) -> Array:
    """Each row's error as predicted by a model that never saw its bits, ``(n,)``."""
    found = np.empty(len(errors))
    _, groups = np.unique(widths, axis=0, return_inverse=True)
    for train, test in GroupKFold(min(folds, len(set(groups.tolist())))).split(widths, errors, groups):
        found[test] = fit(widths[train], errors[train]).predict(widths[test])
    return found


def scores(errors: Array, predicted: Array) -> dict[str, float]:
    """``r2`` and ``mae`` of errors, and ``spearman``, the rank correlation; 0 where nothing varies."""
    variance = float(((errors - errors.mean()) ** 2).sum())
    varies = bool(np.ptp(predicted) > 0 and variance > 0)
    return {
        "r2": 1.0 - float(((errors - predicted) ** 2).sum()) / variance if variance else 0.0,
        "mae": float(np.abs(errors - predicted).mean()),
        "spearman": float(spearmanr(errors, predicted).statistic) if varies else 0.0,
    }


def choose(widths: Array, errors: Array) -> tuple[AccuracyModel, dict[str, dict[str, float]], str]:
    """The model with the smallest held-out squared error, fitted to all rows.

    Returns:
        the model, ``{name: scores of held-out predictions}`` of all, and the name of the chosen one.

    Raises:
        ConfigError: fewer than four different bit-configs.
    """
    if len(np.unique(widths, axis=0)) < 4:
        raise ConfigError(f"an accuracy model wants 4 or more bit-configs, got {len(np.unique(widths, axis=0))}")
    table = {name: scores(errors, held_out(fit, widths, errors)) for name, fit in FITS.items()}
    best = max(table, key=lambda name: table[name]["r2"])
    return FITS[best](widths, errors), table, best


def spread_of_repeats(keys: Sequence[Any], figures: Array) -> float:
    """Standard deviation of figures with equal keys, pooled; 0 without repeats."""
    groups: dict[Any, list[float]] = {}
    for key, figure in zip(keys, figures.tolist(), strict=True):
        groups.setdefault(key, []).append(figure)
    repeated = [np.array(group) for group in groups.values() if len(group) > 1]
    freedom = sum(len(group) - 1 for group in repeated)
    total = sum(float(((group - group.mean()) ** 2).sum()) for group in repeated)
    return float(np.sqrt(total / freedom)) if freedom else 0.0
