"""Activation quantizers: one scale for a tensor, learned or static, a zero point that stands for 0 exactly."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn

from lightning_baqe.errors import CalibrationError
from lightning_baqe.quantization.functional import MIN_SCALE, quantize_activation, scale_gradient
from lightning_baqe.quantization.gradient_scaling import STRAIGHT
from lightning_baqe.quantization.observer import RangeObserver
from lightning_baqe.quantization.pointwise import Expression

STREAM_BITS = 31  # a residual stream in int32: integers within 2^30 of 0


class ActivationQuantizer(nn.Module, ABC):
    """Base: ``s * (clamp(round(x / s) + z, 0, Q) - z)`` with ``Q = 2^bits - 1`` and an integer ``z`` within 0..Q.

    The scale is the parameter ``scale``, shape ``()``; its gradient is multiplied by ``1 / sqrt(N * Q)``, N the number
    of elements per sample (LSQ, section 2.2). The buffer ``initialized`` tells whether data have set the scale. Until
    then the first batch in training mode sets it, as LSQ does; evaluation mode refuses. While ``observer`` is set,
    values pass through unchanged and are observed instead.

    Attributes:
        learns: whether the scale does.
        gradient: how gradients pass the rounding; ``QuantizedModel.scale_gradients`` sets it.
        symmetric: whether the zero point of a range with negative values is the middle one.
        through: the function that alone reads the tensor, if one does; see :meth:`RangeObserver.range`.

    Args:
        bits: 2 to 8.
        name: for error messages.
        range_method: of the initial clipping range; see :meth:`RangeObserver.range`.
    """

    learns = True
    symmetric = False
    initialized: torch.Tensor

    def __init__(
        self, bits: int, name: str = "", device: torch.device | None = None, range_method: str = "mse"
    ) -> None:
        super().__init__()
        self.bits = bits
        self.low, self.qmax = 0, 2**bits - 1
        self.name = name
        self.range_method = range_method
        self.observer: RangeObserver | None = None
        self.gradient = STRAIGHT
        self.through: Expression | None = None
        self.scale = nn.Parameter(torch.ones((), device=device), requires_grad=self.learns)
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool, device=device))
        self._is_set = False  # whether `initialized` was seen true: reading a tensor at each call would stall a GPU

    def zero_point(self) -> int:
        """The integer that stands for 0, within 0..Q."""
        return int(self._zero_point())

    @abstractmethod
    def _zero_point(self) -> torch.Tensor:
        """The same where it is computed, shape ``()``; NaN where training diverged."""

    @abstractmethod
    def _set_range(self, low: float, high: float) -> None:
        """What :meth:`set_range` does."""

    def _offset(self) -> torch.Tensor:
        """The tensor that receives the offset's gradient, shape ``()``."""
        return self.scale.detach()

    @torch.no_grad()
    def initialize(self, observer: RangeObserver) -> None:
        """Set scale and zero point from what was observed.

        Raises:
            CalibrationError: nothing was observed, or values that are not finite.
        """
        observer.check(self.name)
        self.set_range(*observer.range(self.qmax, self.range_method, self.symmetric, self.through))

    @torch.no_grad()
    def set_range(self, low: float, high: float) -> None:
        """Set scale and zero point from a clipping range with ``low <= 0 <= high``, ``low < high``."""
        self._set_range(low, high)
        self.initialized.fill_(True)
        self._is_set = True

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._is_set = not self.initialized.is_meta and bool(self.initialized)

    def step(self) -> float:
        """The scale as it acts."""
        return float(self.scale.detach().clamp_min(MIN_SCALE))

    def _is_finite(self) -> bool:
        return math.isfinite(self.step()) and math.isfinite(float(self._offset().detach()))

    def require_initialized(self) -> None:
        """Raises CalibrationError unless data have set the scale."""
        if not bool(self.initialized):
            raise CalibrationError(
                f"quantizer {self.name!r} has no scale yet: call lightning_baqe.calibrate(model, batches) first, "
                "load a state_dict of a calibrated model, or train"
            )
        if not self._is_finite():
            raise CalibrationError(
                f"quantizer {self.name!r} has the scale {self.step()} and the offset {float(self._offset().detach())}: "
                "training diverged; use a lower learning rate or clip gradients"
            )

    def _ready(self, x: torch.Tensor) -> bool:
        """Whether the scale acts on ``x``: an observer only looks at it; the first batch of a training sets the scale.

        Raises:
            CalibrationError: there is no scale, and nothing is trained.
        """
        if self.observer is not None:
            self.observer.update(x.detach())
            return False
        if not self._is_set:
            self._set_by_first(x)
        return True

    @torch.compiler.disable
    def _set_by_first(self, x: torch.Tensor) -> None:
        self._is_set = bool(self.initialized)
        if not self._is_set:
            if not self.training:
                self.require_initialized()
            first = RangeObserver()
            first.update(x.detach())
            self.initialize(first)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self._ready(x):
            return x
        # Where training diverged scale or zero point are not finite, and so is the output: the loss must show it.
        factor = 1.0 / math.sqrt(max(x[:1].numel() if x.ndim else 1, 1) * self.qmax)
        scale, offset = scale_gradient(self.scale, factor), scale_gradient(self._offset(), factor)
        return quantize_activation(x, scale, offset, self._zero_point(), self.qmax, self.gradient)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, name={self.name!r}"


class LSQPlusActivation(ActivationQuantizer):
    """LSQ+ (Bhalgat et al., 2020): the offset is learned, too; ``z = clamp(round(-offset / scale), 0, Q)``."""

    def __init__(
        self, bits: int, name: str = "", device: torch.device | None = None, range_method: str = "mse"
    ) -> None:
        super().__init__(bits, name, device, range_method)
        self.offset = nn.Parameter(torch.zeros((), device=device))

    def _zero_point(self) -> torch.Tensor:
        offset = self.offset.detach()
        whole = (-offset / self.scale.detach().clamp_min(MIN_SCALE)).round().clamp(0, self.qmax)
        return whole + 0 * offset  # an infinite offset is no zero point, though it can be clamped

    def _offset(self) -> torch.Tensor:
        return self.offset

    def _set_range(self, low: float, high: float) -> None:
        self.scale.fill_(max((high - low) / self.qmax, MIN_SCALE))
        self.offset.fill_(low)


class _FixedZeroPoint(ActivationQuantizer):
    """The zero point is the buffer ``fixed_zero_point``, which the initial range sets."""

    fixed_zero_point: torch.Tensor

    def __init__(
        self, bits: int, name: str = "", device: torch.device | None = None, range_method: str = "mse"
    ) -> None:
        super().__init__(bits, name, device, range_method)
        self.register_buffer("fixed_zero_point", torch.zeros((), dtype=torch.int64, device=device))

    def _zero_point(self) -> torch.Tensor:
        return self.fixed_zero_point

    def _set_range(self, low: float, high: float) -> None:
        step = (high - low) / self.qmax
        self.scale.fill_(max(step, MIN_SCALE))
        self.fixed_zero_point.fill_(min(max(round(-low / step), 0), self.qmax))


class LSQActivation(_FixedZeroPoint):
    """LSQ (Esser et al., 2020): only the scale is learned; unsigned for inputs that are never negative, else signed.

    Signed means the fixed zero point ``2^(bits - 1)``.
    """

    symmetric = True


class StaticActivation(_FixedZeroPoint):
    """A range that calibration sets and that stays: neither scale nor zero point learns, and training moves neither.

    Asymmetric, as HAWQ-V3's activations are (section III-A); gradients go straight through to values within the range.
    """

    learns = False


class ResidualStream(ActivationQuantizer):
    """A residual stream that stays in int32, as in HAWQ-V3 (section III-C): nothing is rounded in training.

    The device holds it on a grid of ``2^20`` steps for the largest value that calibration saw, with 2^10 times that as
    headroom; a step is so far below those of 8-bit tensors that fake-quant leaves the values alone. ``bits`` are
    :data:`STREAM_BITS`; the range is always ``"minmax"``'s.
    """

    learns = False

    def __init__(self, bits: int, name: str = "", device: torch.device | None = None, range_method: str = "") -> None:
        super().__init__(bits, name, device, "minmax")
        self.low, self.qmax = -(2**30), 2**30

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._ready(x)
        return x

    def _zero_point(self) -> torch.Tensor:
        return torch.zeros_like(self.scale)

    def _set_range(self, low: float, high: float) -> None:
        self.scale.fill_(max(abs(low), abs(high)) / 2**20)


ACTIVATION_QUANTIZERS: dict[str, type[ActivationQuantizer]] = {
    "lsq": LSQActivation,
    "lsq+": LSQPlusActivation,
    "static": StaticActivation,
}
