"""Everything that a quantized network can learn from data without labels and without training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from lightning_baqe.calibration.activation_ranges import inputs_of, set_ranges, warn_of_noise
from lightning_baqe.calibration.corrections import Correction, correct_layers, correction_of
from lightning_baqe.calibration.equalization import equalize
from lightning_baqe.calibration.reconstruction import check_gradients, reconstruct
from lightning_baqe.calibration.walk import float_twin
from lightning_baqe.quantization.convert import QuantizedModel


def calibrate(
    model: QuantizedModel,
    batches: Iterable[Any],
    max_batches: int | None = None,
    correct: str | Correction = "none",
    tell: Callable[[str, int, int], None] | None = None,
) -> QuantizedModel:
    """Initialise all activation quantizers from data, then correct weights and biases for what rounding does to them.

    | correct | what is done, layer after layer, each on what the corrected layers before it give |
    | --- | --- |
    | ``"none"`` | nothing: weights are rounded to the nearest |
    | ``"fast"`` | weights that make up for the errors of their inputs, then rounded to the nearest; biases such that the mean of each output channel is the float network's |
    | ``"best"`` | as ``"fast"``, and each weight is rounded up or down such that the layer's output is closest |

    Corrected weights lie on their grids, so that lowering and the device compute with the very same ones, and training
    can start from them. Runs in eval mode and restores each module's mode. Calibrating again starts afresh with the
    ranges, and from the weights that are there.

    Args:
        model: what :func:`quantize` returned.
        batches: of ``x``, ``(x, y, ...)`` or ``{"image": x, ...}``, x a tensor or array of shape ``(n, ...)``; see
            :mod:`lightning_baqe.quantization.batches`. For several inputs ``(x1, x2, ...)``, ``((x1, x2), ...)`` or a
            mapping with the names of forward's arguments. Moved to the model's device, floats to its type. One tensor
            or array is one batch. Corrections hold all of them in memory; some hundred images are enough.
        max_batches: stop after so many.
        correct: see the table, or a :class:`~lightning_baqe.calibration.corrections.Correction` of your own, such as
            ``Correction(make_up=True, round=True, centre=True, reconstruct_s=300)``: best, and then blocks are
            reconstructed for five minutes.
        tell: called after each corrected layer, and then after each block, with its name, how many are done, and of how
            many.

    Returns:
        The same model. Where all tensors have 8 bits, a warning names those that are far noisier than what is before
        them.

    Raises:
        CalibrationError: no data, batches that are not the network's input, or values that are not finite.
        ConfigError: an unknown ``correct``, or blocks to reconstruct in inference mode.
    """  # noqa: E501
    correction = correction_of(correct)
    if correction.reconstruct_s > 0:
        check_gradients()  # before minutes are spent on the steps before it
    if correction == Correction():
        last = set_ranges(model, batches, max_batches)
    else:
        kept = list(inputs_of(model, batches, max_batches))
        shown = [inputs if len(inputs) > 1 else inputs[0] for inputs in kept]
        last = set_ranges(model, shown)
        if correction.equalize:  # of data that was found fit
            equalize(model, kept)
            last = set_ranges(model, shown)
        twin = float_twin(model)  # of the weights before they are corrected
        if correction.by_layer:
            correct_layers(model, kept, correction, tell)
        if correction.reconstruct_s > 0:
            reconstruct(model, twin, kept, correction.reconstruct_s, tell)
    warn_of_noise(model, last)
    return model
