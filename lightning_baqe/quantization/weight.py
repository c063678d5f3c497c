"""The weight quantizer: symmetric, one learnable scale for each output channel."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from lightning_baqe.errors import ConfigError
from lightning_baqe.quantization.functional import MIN_SCALE, Bound, clamped, quantize_weight, scale_gradient
from lightning_baqe.quantization.gradient_scaling import STRAIGHT

WEIGHT_INITS = ("mse", "lsq", "lsq+", "max")


def weight_range(bits: int) -> tuple[int, int]:
    """``(Qn, Qp)``: weights become integers within -Qn..Qp.

    8 bits are narrow, -127..127, so that a sign can be flipped within 8 bits (a channel of negative batch-norm gain in
    engines that know positive scales only).
    """
    top = 2 ** (bits - 1) - 1
    return (top if bits == 8 else top + 1), top


def initial_weight_scale(weight: torch.Tensor, bits: int | tuple[int, ...], init: str = "mse") -> torch.Tensor:
    """First guess of the scales.

    Args:
        weight: ``(channels, ...)``.
        bits: 2 to 8, or one such number for each channel.
        init: ``"lsq"``: ``2 mean|w| / sqrt(Qp)`` (LSQ, section 2.1); ``"lsq+"``:
            ``max(|mean - 3 std|, |mean + 3 std|) / 2^(bits - 1)``, of a Gaussian (LSQ+, section 3.3); ``"max"``: the
            largest weight; ``"mse"``: the
            fraction of the largest weight with the least squared error, which costs a trained network least.

    Returns:
        ``(channels,)``, positive.

    Raises:
        ConfigError: unknown ``init``, or weights that are not finite.
    """
    if init not in WEIGHT_INITS:
        raise ConfigError(f"weight_init must be one of {WEIGHT_INITS}, got {init!r}")
    flat = weight.detach().flatten(1)
    if not bool(torch.isfinite(flat).all()):
        raise ConfigError("weights must be finite to be quantized; the float model has NaN or infinite ones")
    if isinstance(bits, tuple):
        scale, widths = torch.empty_like(flat[:, 0]), torch.tensor(bits, device=flat.device)
        for width in set(bits):
            scale[widths == width] = initial_weight_scale(flat[widths == width], width, init)
        return scale
    qn, qp = weight_range(bits)
    if init == "lsq":
        scale = 2 * flat.abs().mean(1) / math.sqrt(qp)
    elif init == "lsq+":
        mean, std = flat.mean(1), flat.std(1, correction=0)
        scale = torch.maximum((mean - 3 * std).abs(), (mean + 3 * std).abs()) / 2 ** (bits - 1)
    elif init == "max":
        scale = flat.abs().amax(1) / qp
    else:
        scale = _least_squares_scale(flat, qn, qp)
    return scale.clamp_min(MIN_SCALE)


def _least_squares_scale(flat: torch.Tensor, qn: int, qp: int) -> torch.Tensor:
    """Coarse-to-fine search by channel, over fractions of the largest weight."""
    widest = flat.abs().amax(1).clamp_min(MIN_SCALE) / qp
    # At 8 bits clipping hardly pays; at 2 bits the best is below half of the largest weight.
    coarse = torch.linspace(1.0, 0.6 if qp > 31 else 0.1, 16).tolist()
    spacing = (coarse[0] - coarse[1]) / 4
    best, error = _search(flat, widest, torch.full_like(widest, math.inf), [widest * f for f in coarse], qn, qp)
    around = [best + widest * spacing * offset for offset in (-3, -2, -1, 1, 2, 3)]
    return _search(flat, best, error, around, qn, qp)[0]


def _search(
    flat: torch.Tensor, best: torch.Tensor, best_error: torch.Tensor, candidates: list[torch.Tensor], qn: int, qp: int
) -> tuple[torch.Tensor, torch.Tensor]:
    buffer = torch.empty_like(flat)
    for scale in candidates:
        step = scale.clamp_min(MIN_SCALE)[:, None]
        torch.div(flat, step, out=buffer).round_().clamp_(-qn, qp).mul_(step).sub_(flat)
        error = torch.linalg.vecdot(buffer, buffer)
        better = error < best_error
        best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)
    return best, best_error


class WeightQuantizer(nn.Module):
    """LSQ: ``s * clamp(round(w / s), -Qn, Qp)`` for each output channel.

    The scales are the parameter ``scale``, shape ``(channels,)``. Their gradient is multiplied by
    ``1 / sqrt(weights per channel * Qp)`` (LSQ, section 2.2). A scale that training drives below 1e-8 acts as 1e-8.

    The buffer ``sign``, ``(channels,)`` of 1 and -1, or None for 1 throughout, makes it ``s * sign * clamp(round(sign *
    w / s), -Qn, Qp)``: a channel that folding multiplied by a negative gain keeps its integers.

    Attributes:
        gradient: how gradients pass the rounding; ``QuantizedModel.scale_gradients`` sets it.

    Args:
        weight: the weights to initialise the scales from, shape ``(channels, ...)``.
        bits: 2 to 8, or one such number for each channel.
        init: see :func:`initial_weight_scale`.
    """

    sign: torch.Tensor | None
    qn: Bound
    qp: Bound

    def __init__(self, weight: torch.Tensor, bits: int | tuple[int, ...], init: str = "mse") -> None:
        super().__init__()
        self.bits, self.init = bits, init
        if isinstance(bits, tuple):
            for name, values in zip(("qn", "qp"), zip(*map(weight_range, bits), strict=True), strict=True):
                self.register_buffer(name, torch.tensor(values, dtype=weight.dtype, device=weight.device), False)
        else:
            self.qn, self.qp = weight_range(bits)
        self.gradient = STRAIGHT
        self.scale = nn.Parameter(initial_weight_scale(weight, bits, init))
        self.register_buffer("sign", None)  # no key in a state_dict until there is one

    @torch.no_grad()
    def initialize(self, weight: torch.Tensor) -> None:
        """Set the scales from weights, shape ``(channels, ...)``, as the first ones were."""
        self.scale.copy_(initial_weight_scale(weight, self.bits, self.init))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        scale = scale_gradient(self.scale, (weight[0].numel() * self.qp) ** -0.5)
        if self.sign is None:
            return quantize_weight(weight, scale, self.qn, self.qp, self.gradient)
        sign = self.sign.reshape(-1, *[1] * (weight.ndim - 1))
        return quantize_weight(weight * sign, scale, self.qn, self.qp, self.gradient) * sign

    @torch.no_grad()
    def integers(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The integer weights (int64, same shape) and the scales in float64, shape ``(channels,)``, of any sign."""
        scale = self.scale.detach().clamp_min(MIN_SCALE)
        step = scale.to(weight.dtype)
        if self.sign is not None:
            scale, step = scale * self.sign, step * self.sign.to(weight.dtype)
        step = step.reshape(-1, *[1] * (weight.ndim - 1))
        values = clamped(torch.round(weight.detach() * step.reciprocal()), *self.bounds(step.shape))
        return values.to(torch.int64), scale.to(torch.float64)

    def bounds(self, shape: Sequence[int]) -> tuple[Bound, Bound]:
        """Qn and Qp; where they differ by channel, of this shape of as many elements."""
        if isinstance(self.qn, torch.Tensor) and isinstance(self.qp, torch.Tensor):
            return self.qn.reshape(tuple(shape)), self.qp.reshape(tuple(shape))
        return self.qn, self.qp

    def extra_repr(self) -> str:
        if isinstance(self.bits, tuple):
            return f"bits={min(self.bits)}..{max(self.bits)} by channel"
        return f"bits={self.bits}, range={-self.qn}..{self.qp}"
