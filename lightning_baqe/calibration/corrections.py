"""Corrections of a quantized network, without labels and without training.

| step | what it does |
| --- | --- |
| equalize | channels between two layers are scaled alike where that changes nothing in float (:mod:`lightning_baqe.calibration.equalization`); before ranges are chosen |
| make up | the layer's weights become those that give, from the quantized network's inputs, the float network's outputs in least squares, so that errors do not add up from layer to layer |
| round | each weight goes up or down such that the layer's output is closest (:mod:`lightning_baqe.calibration.rounding`) |
| centre | the mean of each output channel becomes the float network's, in the bias or in the statistics of the batch norm behind it (Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, section 4.2, with data: appendix D) |
| statistics | running mean and variance of the batch norm behind a layer move such that the normalised channels have the float network's mean and variance; for weights that are rounded without the steps above |
| reconstruct | whole blocks are rounded such that their outputs are closest, by gradient, as long as there is time (:mod:`lightning_baqe.calibration.reconstruction`) |

All but the first and the last go layer after layer, each on what the corrected layers before it give.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_baqe.calibration.moments import Weighted, by_group, moments_of
from lightning_baqe.calibration.rounding import (
    best_integers,
    best_step,
    closest,
    damped,
    error_of,
    nearest,
    refit_step,
)
from lightning_baqe.calibration.walk import Place, Values, channel_mean, side_by_side
from lightning_baqe.errors import ConfigError
from lightning_baqe.quantization.batch_norm import foldable
from lightning_baqe.quantization.convert import QuantizedModel
from lightning_baqe.quantization.functional import MIN_SCALE
from lightning_baqe.quantization.layers import QuantLayer
from lightning_baqe.quantization.train_modes import evaluating


@dataclass(frozen=True)
class Correction:
    """Which steps are taken; the table of :mod:`lightning_baqe.calibration.corrections` says what they do.

    Args:
        equalize, make_up, round, centre, statistics: whether. Without ``make_up`` and ``round`` weights are rounded to
            the nearest as they are.
        reconstruct_s: seconds for all blocks; 0: they are not reconstructed.
    """

    equalize: bool = False
    make_up: bool = False
    round: bool = False
    centre: bool = False
    statistics: bool = False
    reconstruct_s: float = 0.0

    @property
    def by_layer(self) -> bool:
        """Whether layers are corrected one after the other."""
        return self.make_up or self.round or self.centre or self.statistics


CORRECTIONS = {
    "none": Correction(),
    "fast": Correction(make_up=True, centre=True),
    "best": Correction(make_up=True, round=True, centre=True),
}


def correction_of(correct: str | Correction) -> Correction:
    """The steps of a preset, or those that are given.

    Raises:
        ConfigError: none of :data:`CORRECTIONS`, or seconds below 0.
    """
    if isinstance(correct, Correction):
        found = correct
    elif correct in CORRECTIONS:
        found = CORRECTIONS[correct]
    else:
        raise ConfigError(f"correct={correct!r}, wanted is one of {', '.join(map(repr, CORRECTIONS))}, or a Correction")
    seconds = found.reconstruct_s
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < float("inf"):
        raise ConfigError(f"reconstruct_s={seconds!r}, wanted are seconds, or 0 to reconstruct nothing")
    return found


def correct_layers(
    model: QuantizedModel,
    batches: Sequence[tuple[Tensor, ...]],
    correction: Correction,
    tell: Callable[[str, int, int], None] | None = None,
) -> None:
    """Correct all layers, in place.

    Args:
        model: calibrated.
        batches: the network's inputs, each a tensor for each input.
        correction: the steps.
        tell: called after each layer with its name, how many are done, and of how many.
    """
    norms: dict[nn.Module, nn.BatchNorm1d | nn.BatchNorm2d] = {pair.layer: pair.norm for pair in foldable(model)}
    total = sum(isinstance(module, QuantLayer) for module in model.modules())
    with evaluating(model), torch.no_grad():
        for number, place in enumerate(side_by_side(model, batches), 1):
            if isinstance(place.layer, Weighted) and (correction.make_up or correction.round):
                correct_weights(place, correction)
            norm = norms.get(place.layer)
            if correction.statistics and norm is not None:
                match_statistics(norm, place.float_output, place.output())
            elif correction.centre:
                centre(place.layer, norm, place.float_output, place.output())
            if tell is not None:
                tell(str(place.node.target), number, total)


def correct_weights(place: Place, correction: Correction) -> None:
    """Put a layer's weights on the grid, where its output is closest to the float network's."""
    layer = place.layer
    assert isinstance(layer, Weighted)
    quantizer = layer.weight_quantizer
    moments = damped(moments_of(layer, place.float_input, place.input))
    weight = by_group(layer, layer.weight)
    target = closest(weight, moments) if correction.make_up else weight
    shape = (*target.shape[:2], 1)
    known = quantizer.scale.detach().double().cpu().clamp_min(MIN_SCALE).reshape(shape)
    sign = torch.ones_like(known) if quantizer.sign is None else quantizer.sign.double().cpu().reshape(shape)
    target = target * sign
    qn, qp = (bound.double().cpu() if isinstance(bound, Tensor) else bound for bound in quantizer.bounds(shape))
    H = moments.H
    step = best_step(target, H, qn, qp, known)
    integers = nearest(target, step, qn, qp)
    if correction.round:
        integers = best_integers(target, step, H, qn, qp)
        refitted = refit_step(target, integers, step, H)
        again = best_integers(target, refitted, H, qn, qp)
        better = error_of(again * refitted - target, H) < error_of(integers * step - target, H)
        step = torch.where(better[..., None], refitted, step)
        integers = torch.where(better[..., None], again, integers)
    scale = step.flatten().to(quantizer.scale).clamp_min(MIN_SCALE)
    quantizer.scale.copy_(scale)
    on_grid = (integers * sign).flatten(0, 1).to(layer.weight) * scale[:, None].to(layer.weight)
    layer.weight.copy_(on_grid.reshape(layer.weight.shape))


def match_statistics(norm: nn.BatchNorm1d | nn.BatchNorm2d, wanted: Values, found: Values) -> None:
    """Let a batch norm give the mean and the variance of each channel that it gives in the float network.

    That is batch-norm re-estimation, relative to the float network's statistics on the same images: a few of them, of
    another kind than those of the training, do not move a network that is not rounded.

    Args:
        norm: behind the layer.
        wanted, found: outputs of the layer in the float and in the quantized network.
    """
    if norm.running_var is None or norm.running_mean is None:
        return
    before, after = _variance(wanted), _variance(found)
    ratio = torch.where((before > 0) & (after > 0), after / before, 1.0)
    running = norm.running_var.double().cpu() + norm.eps
    # What is divided by contains epsilon; a variance cannot be below 0.
    changed = (running * ratio - norm.eps).clamp_min(0.0)
    factor = torch.sqrt((changed + norm.eps) / running)
    shift = channel_mean(wanted, 1) - norm.running_mean.double().cpu()
    norm.running_var.copy_(changed)
    norm.running_mean.copy_(channel_mean(found, 1) - factor * shift)


def _variance(values: Values) -> Tensor:
    squares = channel_mean([value.double().square() for value in values], 1)
    return squares - channel_mean(values, 1).square()


def centre(layer: QuantLayer, norm: nn.BatchNorm1d | nn.BatchNorm2d | None, wanted: Values, found: Values) -> None:
    """Move each output channel such that its mean is what is wanted, where the layer has anything to move it by.

    Args:
        layer: whose bias takes it up. One without is left alone, so that the structure stays what the bit-config says:
            the layers behind it see the difference and make up for it.
        norm: of the batch norm that alone reads the layer, whose running mean takes it up instead.
        wanted, found: outputs of the float and of the quantized network.
    """
    channel = -1 if isinstance(layer, nn.Linear) else 1
    change = channel_mean(wanted, channel) - channel_mean(found, channel)
    if norm is not None and norm.running_mean is not None:
        norm.running_mean -= change.to(norm.running_mean)
    elif layer.bias is not None:
        layer.bias += change.to(layer.bias)
