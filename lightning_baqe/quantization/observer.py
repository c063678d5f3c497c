"""What calibration remembers of a tensor, and the clipping range that it derives."""

from __future__ import annotations

import math

import torch

from lightning_baqe.errors import CalibrationError, ConfigError

RANGE_METHODS = ("mse", "minmax", "ema", "percentile")
DEFAULT_PERCENTILE = 99.99
MOMENTUM = 0.99
SAMPLE_PER_BATCH = 4096
SAMPLE_LIMIT = 32768
FRACTIONS = tuple(torch.linspace(1.0, 0.15, 35).tolist())


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
        # An odd stride walks over all columns and channels of the usual even shapes.
        stride = max(x.numel() // SAMPLE_PER_BATCH, 1) | 1
        self._samples.append(x.flatten()[::stride].float().clone())
        if sum(sample.numel() for sample in self._samples) > SAMPLE_LIMIT:
            self._samples = [torch.cat(self._samples)[::2].clone()]

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

    def range(self, qmax: int, method: str, symmetric: bool = False) -> tuple[float, float]:
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
        values = self.samples
        if symmetric and low < 0:
            best = min(FRACTIONS, key=lambda f: _squared_error(values, low * f, high * f, qmax))
            return low * best, high * best
        best_low = best_high = best = min(FRACTIONS, key=lambda f: _squared_error(values, low * f, high * f, qmax))
        if low < 0 < high:
            best_low = min(FRACTIONS, key=lambda f: _squared_error(values, low * f, high * best_high, qmax))
            best_high = min(FRACTIONS, key=lambda f: _squared_error(values, low * best_low, high * f, qmax))
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


def _squared_error(values: torch.Tensor, low: float, high: float, qmax: int) -> float:
    step = (high - low) / qmax
    zero_point = round(-low / step)
    quantized = torch.round(values / step).clamp_(-zero_point, qmax - zero_point).mul_(step)
    return float(quantized.sub_(values).square_().sum())
