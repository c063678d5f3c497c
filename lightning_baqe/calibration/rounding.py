"""Weights on their grids such that a layer's output stays closest, by the moments of its inputs alone.

| symbol | meaning | shape |
| --- | --- | --- |
| W, V, H, C | see :mod:`lightning_baqe.calibration.moments` | |
| T | the weights that make the layer's output closest if nothing were rounded | ``(groups, channels, d)`` |
| s, Qn, Qp | step and range of a channel's grid: V = s q with integers q within -Qn..Qp | ``(groups, channels, 1)`` |

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020: rounding to the nearest is not
the rounding that changes a layer's output least; that minimises ``(V - T) H (V - T)'`` over the grid (their eq. 13).
It is minimised here as in Behdin et al., "QuantEase: Optimization-based Quantization for Language Models", 2023: one
weight of all channels after the other takes the grid's best value, the others held. Each change lowers the error, so
it never ends above that of rounding to the nearest, where it begins.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_baqe.calibration.moments import Moments
from lightning_baqe.quantization.functional import Bound, clamped

DAMPING = 0.1  # of the mean variance of an input
SWEEPS = 4
_FRACTIONS = tuple(1.0 - 0.04 * i for i in range(20))  # of the largest weight, that a grid may reach to
_BLOCK = 64
_TINY = 1e-60  # of a variance: what it is divided by stays within float64's range


def damped(moments: Moments, damping: float = DAMPING) -> Moments:
    """Moments as if every input had some more variance, the same in both networks and independent of all others.

    It keeps weights near the float ones where the data say little: where there are few samples, and since other data
    differ from those.
    """
    mean = moments.H.diagonal(dim1=1, dim2=2).mean(1).clamp_min(_TINY)
    more = damping * mean[:, None, None] * torch.eye(moments.H.shape[1], dtype=torch.float64)
    return Moments(moments.H + more, moments.C + more)


def closest(weight: Tensor, moments: Moments) -> Tensor:
    """T: the weights with which the quantized network's inputs give the float network's outputs, in least squares.

    ``T H = W C``. With inputs that are equal in both networks these are the float weights.

    Args:
        weight: W.
        moments: damped ones, so that H has an inverse.
    """
    solved: Tensor = torch.linalg.solve(moments.H, (weight @ moments.C).mT)
    return solved.mT


def error_of(difference: Tensor, H: Tensor) -> Tensor:
    """``(V - T) H (V - T)'`` of each channel, ``(groups, channels)``."""
    return ((difference @ H) * difference).sum(-1)


def nearest(target: Tensor, step: Tensor, qn: Bound, qp: Bound) -> Tensor:
    """Integers on the grid nearest to T; its bounds are those of all channels, or ``(groups, channels, 1)``."""
    return clamped(torch.round(target / step), qn, qp)


def best_step(target: Tensor, H: Tensor, qn: Bound, qp: Bound, known: Tensor) -> Tensor:
    """The steps, of fractions of each channel's largest weight and of the known ones, with the least error when T is
    rounded to the nearest.
    """
    widest = target.abs().amax(-1, keepdim=True).clamp_min(1e-8) / qp
    best, least = known, error_of(nearest(target, known, qn, qp) * known - target, H)
    for fraction in _FRACTIONS:
        step = widest * fraction
        error = error_of(nearest(target, step, qn, qp) * step - target, H)
        better = error < least
        best, least = torch.where(better[..., None], step, best), torch.where(better, error, least)
    return best


def best_integers(target: Tensor, step: Tensor, H: Tensor, qn: Bound, qp: Bound, sweeps: int = SWEEPS) -> Tensor:
    """Integers whose error is locally least: no single one could be changed for the better, if sweeps suffice.

    Args:
        target, step, H: T, s and H.
        qn, qp: of the grid; of all channels, or ``(groups, channels, 1)``.
        sweeps: over all weights, at most.

    Returns:
        q, float64, with an error of at most that of :func:`nearest`.
    """
    order = H.diagonal(dim1=1, dim2=2).mean(0).argsort(descending=True)
    back = order.argsort()
    H, target = H[:, order][:, :, order], target[:, :, order]
    variance = H.diagonal(dim1=1, dim2=2)[:, None].clamp_min(_TINY)
    q = nearest(target, step, qn, qp)
    slope = (q * step - target) @ H  # half the error's gradient
    unit = step[..., 0]
    bounds = [bound[..., 0] if isinstance(bound, Tensor) else bound for bound in (qn, qp)]
    for _ in range(sweeps):
        changed = False
        for start in range(0, q.shape[2], _BLOCK):
            block = slice(start, start + _BLOCK)
            near, local, moved = H[:, block, block], slope[:, :, block].clone(), torch.zeros_like(q[:, :, block])
            for i in range(moved.shape[2]):
                at = start + i
                wanted = q[:, :, at] - local[:, :, i] / (variance[:, :, at] * unit)
                value = clamped(torch.round(wanted), *bounds)
                moved[:, :, i] = (value - q[:, :, at]) * unit
                q[:, :, at] = value
                local += moved[:, :, i, None] * near[:, None, i]
            if bool(moved.any()):
                changed = True
                slope += moved @ H[:, block]
        if not changed:
            break
    return q[:, :, back]


def refit_step(target: Tensor, integers: Tensor, step: Tensor, H: Tensor) -> Tensor:
    """The steps that suit given integers best: ``q H T' / q H q'``; as they were where that is not positive."""
    reached = integers @ H
    fitted = (reached * target).sum(-1, keepdim=True) / (reached * integers).sum(-1, keepdim=True)
    return torch.where(torch.isfinite(fitted) & (fitted > 0), fitted, step)
