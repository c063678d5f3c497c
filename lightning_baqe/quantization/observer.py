"""What calibration remembers of a tensor, and the clipping range that it derives."""

from __future__ import annotations

import math

import torch

from lightning_baqe.errors import CalibrationError, ConfigError
from lightning_baqe.quantization.pointwise import Expression

RANGE_METHODS = ("mse", "minmax", "ema", "percentile")
DEFAULT_PERCENTILE = 99.99
MOMENTUM = 0.99
SAMPLE_PER_BATCH = 4096
SAMPLE_LIMIT = 32768
THROUGH_LIMIT = 8192  # of samples that go through a function
FRACTIONS = tuple(torch.linspace(1.0, 0.15, 35).tolist())
SMALL_FRACTIONS = (0.1, 0.07, 0.05, 0.03, 0.02, 0.01)  # where a function alone reads the tensor: a sign wants no range


def parse_range(method: str) -> tuple[str, float]:
    """Read how ranges are derived.

    Args:
        method: ``"mse"``, ``"minmax"``, ``"ema"``, ``"percentile"`` or a percentile of one's own,
            ``"percentile:99.9"``; see :meth:`RangeObserver.range`.

    Returns:
        the name, one of ``RANGE_METHODS``, and the percentile (99.99 where none was given).

    Raises:
        ConfigError: an unknown name, or a percentile that is no number above 50, up to 100.
    """
    name, colon, text = method.partition(":") if isinstance(method, str) else ("", "", "")
    if name not in RANGE_METHODS or (colon and name != "percentile"):
        known = ", ".join(map(repr, RANGE_METHODS))
        raise ConfigError(
            f"activation_range must be one of {known}, or 'percentile:' and a number, such as 'percentile:99.9'; "
            f"got {method!r}"
        )
    if not colon:
        return name, DEFAULT_PERCENTILE
    try:
        percentile = float(text)
    except ValueError:
        percentile = math.nan
    if not 50.0 < percentile <= 100.0:
        raise ConfigError(
            f"activation_range: the percentile must be a number above 50, up to 100 (per cent of the values that lie "
            f"within each end of the range), such as 'percentile:99.9'; got {method!r}"
        )
    return name, percentile


class RangeObserver:
    """Extremes, their running means, and a strided subsample: deterministic, no random numbers."""

    def __init__(self) -> None:
        self.low = 0.0
        self.high = 0.0
        self.mean_low = 0.0
        self.mean_high = 0.0
        self.batches = 0
        self.finite = True
        self._samples: list[torch.Tensor] = []

    def update(self, x: torch.Tensor) -> None:
        """Take in a batch, any shape."""
        if x.numel() == 0:
            return
        low, high = (float(value) for value in torch.aminmax(x))
        self.finite = self.finite and abs(low) < float("inf") and abs(high) < float("inf")
        self.low, self.high = min(self.low, low), max(self.high, high)
        momentum = MOMENTUM if self.batches else 0.0
        self.mean_low = momentum * self.mean_low + (1.0 - momentum) * low
        self.mean_high = momentum * self.mean_high + (1.0 - momentum) * high
        self.batches += 1
        self._samples.append(_spread(x.flatten(), SAMPLE_PER_BATCH).float().clone())
        if sum(sample.numel() for sample in self._samples) > SAMPLE_LIMIT:
            self._samples = [torch.cat(self._samples)[::3].clone()]

    @property
    def samples(self) -> torch.Tensor:
        """The subsample, float32, flat."""
        return torch.cat(self._samples)

    def check(self, name: str) -> None:
        """Raises CalibrationError if there is nothing to derive a range from."""
        if self.batches == 0:
            raise CalibrationError(f"quantizer {name!r} saw no data: give calibrate at least one non-empty batch")
        if not self.finite:
            raise CalibrationError(
                f"quantizer {name!r} saw values that are not finite (range {self.low}..{self.high}): check the data "
                "and the float model's outputs"
            )

    def range(
        self, qmax: int, method: str, symmetric: bool = False, through: Expression | None = None
    ) -> tuple[float, float]:
        """The clipping range ``low <= 0 <= high``, ``low < high``.

        | method | the ends |
        | --- | --- |
        | ``"minmax"`` | the least and the largest value of all |
        | ``"mse"`` | of fractions of these, those with the least squared error over the subsample (coordinate search) |
        | ``"ema"`` | running means of each batch's least and largest value, momentum 0.99; the first batch sets them (HAWQ-V3, appendix, training details) |
        | ``"percentile:p"`` | ``p`` per cent of the subsample lie below the high end, ``p`` per cent above the low one; 99.99 where ``p`` is not given |

        Where the ends so found enclose nothing but 0 (a percentile of a tensor that is nearly always 0), the range is
        ``"minmax"``'s. A tensor that was 0 throughout gets -1..1: it has no range to measure (a residual branch whose
        last batch norm starts at gain 0), and training will move it.

        Args:
            qmax: the range is cut into ``qmax`` steps.
            method: as in the table.
            symmetric: ``low = -high * (qmax + 1) / (qmax - 1)`` (fixed middle zero point) if the low end is negative.
            through: what alone reads the tensor: ``"mse"`` counts the error after it, so that values which it maps to
                one (all below a sigmoid's reach, all of one sign) take no part of the grid.

        Raises:
            ConfigError: unknown method.
        """  # noqa: E501
        name, percentile = parse_range(method)
        low, high = self._ends(name, percentile)
        if low == high:
            low, high = self.low, self.high
        if low == high:
            low, high = -1.0, 1.0
        if symmetric and low < 0:
            # Middle zero point (qmax + 1) / 2: that many steps below 0, one less above.
            step = max(-low / (qmax + 1), high / (qmax - 1)) * 2
            low, high = -step * (qmax + 1) / 2, step * (qmax - 1) / 2
        if name != "mse":
            return low, high
        values = self.samples if through is None else _spread(self.samples, THROUGH_LIMIT)
        wanted = values if through is None else through(values)
        if not bool(torch.isfinite(wanted).all()):
            through, wanted = None, values

        def error(low: float, high: float) -> float:
            found = _quantized(values, low, high, qmax)
            return float((found if through is None else through(found)).sub(wanted).square_().sum())

        fractions = FRACTIONS if through is None else FRACTIONS + SMALL_FRACTIONS
        if symmetric and low < 0:
            best = min(fractions, key=lambda f: error(low * f, high * f))
            return low * best, high * best
        best_low = best_high = min(fractions, key=lambda f: error(low * f, high * f))
        if low < 0 < high:
            best_low = min(fractions, key=lambda f: error(low * f, high * best_high))
            best_high = min(fractions, key=lambda f: error(low * best_low, high * f))
        return low * best_low, high * best_high

    def _ends(self, name: str, percentile: float) -> tuple[float, float]:
        """The range before anything is searched or made symmetric: ``low <= 0 <= high``."""
        if name == "ema":
            return min(self.mean_low, 0.0), max(self.mean_high, 0.0)
        if name == "percentile":
            values = self.samples.double()
            share = percentile / 100.0
            low, high = torch.quantile(values, values.new_tensor([1.0 - share, share])).tolist()
            return min(low, 0.0), max(high, 0.0)
        return self.low, self.high


def _spread(values: torch.Tensor, limit: int) -> torch.Tensor:
    """About ``limit`` of many values. The odd stride walks over all columns, channels and classes of even counts."""
    return values[:: max(len(values) // limit, 1) | 1]


def _quantized(values: torch.Tensor, low: float, high: float, qmax: int) -> torch.Tensor:
    step = (high - low) / qmax
    zero_point = round(-low / step)
    return torch.round(values / step).clamp_(-zero_point, qmax - zero_point).mul_(step)
