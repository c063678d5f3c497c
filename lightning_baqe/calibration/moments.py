"""Second moments of what a layer's weights are multiplied with: all that its mean squared error depends on.

| symbol | meaning | shape |
| --- | --- | --- |
| x, y | inputs of a layer as its weights see them (a patch for a convolution), in the float and in the quantized network | ``(groups, samples, d)`` |
| H | covariance of y | ``(groups, d, d)`` |
| C | covariance of x with y | ``(groups, d, d)`` |
| W | float weights of a group's channels | ``(groups, channels, d)`` |
| V | the quantized network's weights | likewise |

The mean squared difference of the outputs ``W x`` and ``V y``, channel by channel and without their means (biases
take care of these), is ``V H V' - 2 W C V' + W cov(x) W'``.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_baqe.calibration.walk import Values

Weighted = nn.Conv2d | nn.Conv1d | nn.Linear  # not transposed convolutions, whose inputs meet no patches
WANTED_SAMPLES, SAMPLES_EACH = 32_768, 8  # samples of a layer at least, if there are so many; and for each weight
_BLOCK_ELEMENTS = 2**24


@dataclass(frozen=True)
class Moments:
    """Covariances of a layer's inputs; the table above has the shapes. float64, on the CPU."""

    H: Tensor
    C: Tensor

    def error(self, weight: Tensor, other: Tensor) -> Tensor:
        """What of the mean squared error of each channel depends on V: ``V H V' - 2 W C V'``, ``(groups, channels)``.

        Args:
            weight, other: W and V, ``(groups, channels, d)`` float64.
        """
        return ((other @ self.H - 2 * weight @ self.C) * other).sum(-1)


def moments_of(layer: Weighted, floats: Values, quantized: Values) -> Moments:
    """Covariances over batches of a layer's inputs, over a part of all positions where there are many.

    Args:
        layer: a convolution or linear layer.
        floats, quantized: its inputs in the two networks, in the same order.
    """
    weight = layer.weight
    depth = weight[0].numel()
    positions = sum(_positions(layer, x) for x in floats)
    step = max(1, positions // max(WANTED_SAMPLES, SAMPLES_EACH * depth))
    sums = [torch.zeros((), dtype=torch.float64)] * 4
    count = 0
    for number, (x, y) in enumerate(zip(floats, quantized, strict=True)):
        for xs, ys in zip(_rows(layer, x, step, number), _rows(layer, y, step, number), strict=True):
            found = (ys.mT @ ys, xs.mT @ ys, xs.sum(1), ys.sum(1))
            sums = [total + part.double().cpu() for total, part in zip(sums, found, strict=True)]
            count += xs.shape[1]
    yy, xy, x_sum, y_sum = (value / count for value in sums)
    return Moments(yy - y_sum[:, :, None] * y_sum[:, None], xy - x_sum[:, :, None] * y_sum[:, None])


def _positions(layer: Weighted, x: Tensor) -> int:
    """Samples that a batch gives, about."""
    if isinstance(layer, nn.Linear):
        return x.numel() // layer.in_features
    strides = layer.stride if isinstance(layer.stride, tuple) else (layer.stride,)
    positions = x.numel() // layer.in_channels
    for stride in strides:
        positions //= stride
    return positions


def _rows(layer: Weighted, x: Tensor, step: int, number: int) -> Iterator[Tensor]:
    """Inputs as the weights see them, every ``step``-th or more often, ``(groups, samples, d)``, a few images at once.

    The positions that are taken move from image to image, so that borders count as much as they should.
    """
    x = x.detach()
    if isinstance(layer, nn.Linear):
        flat = x.flatten(0, -2)
        yield flat[number % step :: step][None]
        return
    groups = layer.groups
    if isinstance(layer, nn.Conv1d):
        x, kernel, stride, dilation = x[:, :, None], (1, *layer.kernel_size), (1, *layer.stride), (1, *layer.dilation)
        apart = (1, step)
    else:
        kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
        side = max(1, int(step**0.5))
        apart = (side, side)
    x = _padded(layer, x)
    per_image = max(1, x[0].numel() * kernel[0] * kernel[1] // (stride[0] * stride[1] * apart[0] * apart[1]))
    at_once = max(1, _BLOCK_ELEMENTS // per_image) if apart == (1, 1) else 1
    for place, images in enumerate(x.split(at_once), number):
        down, right = place % apart[0] * stride[0], place // apart[0] % apart[1] * stride[1]
        reach = [dilation[i] * (kernel[i] - 1) + 1 for i in (0, 1)]
        down = down if images.shape[2] - down >= reach[0] else 0
        right = right if images.shape[3] - right >= reach[1] else 0
        spread = (stride[0] * apart[0], stride[1] * apart[1])
        patches = functional.unfold(images[:, :, down:, right:], kernel, dilation, 0, spread)
        by_group = patches.unflatten(1, (groups, -1))  # (images, groups, d, positions)
        yield by_group.permute(1, 0, 3, 2).flatten(1, 2)


def _padded(layer: nn.Conv2d | nn.Conv1d, x: Tensor) -> Tensor:
    pads = list(layer._reversed_padding_repeated_twice)
    if not any(pads):
        return x
    if isinstance(layer, nn.Conv1d):
        pads = [*pads[:2], 0, 0]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    if isinstance(layer, nn.Conv1d) and mode != "constant":
        return functional.pad(x[:, :, 0], pads[:2], mode)[:, :, None]
    return functional.pad(x, pads, mode)


def by_group(layer: Weighted, weight: Tensor) -> Tensor:
    """Weights as ``(groups, channels, d)``, float64 on the CPU."""
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    return weight.detach().flatten(1).double().cpu().unflatten(0, (groups, -1))
