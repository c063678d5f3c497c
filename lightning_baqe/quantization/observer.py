"""What calibration remembers of a tensor, and the clipping range that it derives."""

from __future__ import annotations

import torch

from lightning_baqe.errors import CalibrationError, ConfigError

RANGE_METHODS = ("mse", "minmax")
SAMPLE_PER_BATCH = 4096
SAMPLE_LIMIT = 32768
FRACTIONS = tuple(torch.linspace(1.0, 0.15, 35).tolist())


class RangeObserver:
    """Running minimum and maximum, and a strided subsample: deterministic, no random numbers."""

    def __init__(self) -> None:
        self.low = 0.0
        self.high = 0.0
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
        self.batches += 1
        # An odd stride walks over all columns and channels of the usual even shapes.
        stride = max(x.numel() // SAMPLE_PER_BATCH, 1) | 1
        self._samples.append(x.flatten()[::stride].float().clone())
        if sum(sample.numel() for sample in self._samples) > SAMPLE_LIMIT:
            self._samples = [torch.cat(self._samples)[::2].clone()]

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

        A tensor that was 0 throughout gets -1..1: it has no range to measure (a residual branch whose last batch norm
        starts at gain 0), and training will move it.

        Args:
            qmax: the range is cut into ``qmax`` steps.
            method: ``"minmax"``: all that was seen; ``"mse"``: of fractions of both ends, those with the least squared
                error over the subsample (coordinate search).
            symmetric: ``low = -high * (qmax + 1) / (qmax - 1)`` (fixed middle zero point) if anything was negative.

        Raises:
            ConfigError: unknown method.
        """
        if method not in RANGE_METHODS:
            raise ConfigError(f"range must be one of {RANGE_METHODS}, got {method!r}")
        low, high = self.low, self.high
        if low == high:
            low, high = -1.0, 1.0
        if symmetric and low < 0:
            # Middle zero point (qmax + 1) / 2: that many steps below 0, one less above.
            step = max(-low / (qmax + 1), high / (qmax - 1)) * 2
            low, high = -step * (qmax + 1) / 2, step * (qmax - 1) / 2
        if method == "minmax":
            return low, high
        values = torch.cat(self._samples)
        if symmetric and low < 0:
            best = min(FRACTIONS, key=lambda f: _squared_error(values, low * f, high * f, qmax))
            return low * best, high * best
        best_low = best_high = best = min(FRACTIONS, key=lambda f: _squared_error(values, low * f, high * f, qmax))
        if low < 0 < high:
            best_low = min(FRACTIONS, key=lambda f: _squared_error(values, low * f, high * best_high, qmax))
            best_high = min(FRACTIONS, key=lambda f: _squared_error(values, low * best_low, high * f, qmax))
        return low * best_low, high * best_high


def _squared_error(values: torch.Tensor, low: float, high: float, qmax: int) -> float:
    step = (high - low) / qmax
    zero_point = round(-low / step)
    quantized = torch.round(values / step).clamp_(-zero_point, qmax - zero_point).mul_(step)
    return float(quantized.sub_(values).square_().sum())
