"""Initialise activation scales from data, in one pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch

from lightning_baqe.errors import BaqeError, CalibrationError
from lightning_baqe.quantization.batches import describe, network_input
from lightning_baqe.quantization.convert import QuantizedModel
from lightning_baqe.quantization.observer import RangeObserver
from lightning_baqe.quantization.train_modes import evaluating


@torch.no_grad()
def calibrate(model: QuantizedModel, batches: Iterable[Any], max_batches: int | None = None) -> QuantizedModel:
    """Initialise all activation quantizers from data; values pass through unquantized meanwhile.

    Runs in eval mode and restores each module's mode. Calibrating again starts afresh. If it fails, scales stay as
    they were.

    Args:
        model: what :func:`quantize` returned.
        batches: of ``x``, ``(x, y, ...)`` or ``{"image": x, ...}``, x a tensor or array of shape ``(n, ...)``; see
            :mod:`lightning_baqe.quantization.batches`. Moved to the model's device, floats to its type. One tensor or
            array is one batch.
        max_batches: stop after so many.

    Returns:
        The same model.

    Raises:
        CalibrationError: no data, batches that are not the network's input, or values that are not finite.
    """
    observers = {quantizer: RangeObserver() for quantizer in model.quantizers().values()}
    count = 0
    try:
        for quantizer, observer in observers.items():
            quantizer.observer = observer
        with evaluating(model):
            for x in _inputs(model, batches, max_batches):
                count += 1
                _run(model, x, count)
    finally:
        for quantizer in observers:
            quantizer.observer = None
    if count == 0:
        raise CalibrationError("calibrate got no batches; give at least one batch of x or (x, y)")
    for quantizer, observer in observers.items():
        observer.check(quantizer.name)
    for quantizer, observer in observers.items():
        quantizer.initialize(observer)
    return model


def _inputs(model: QuantizedModel, batches: Iterable[Any], max_batches: int | None) -> Iterator[torch.Tensor]:
    """What the network is shown: its inputs, where and as it wants them."""
    if isinstance(batches, Mapping):
        raise CalibrationError(f"batches is {describe(batches)}; wanted is an iterable of such batches: give [batch]")
    parameter, shape = next(model.parameters(), None), model.record.input_shape
    whole = [batches] if isinstance(batches, torch.Tensor | np.ndarray) else batches
    for number, batch in enumerate(islice(whole, max_batches), 1):
        x = network_input(batch, f"batch {number} of calibrate")
        if shape is not None and x.ndim != len(shape) + 1:
            raise CalibrationError(
                f"batch {number} of calibrate gives {describe(batch)}, of which {describe(x)} was taken; wanted is the "
                f"network's input, (n, {', '.join(map(str, shape))}) as in quantize's example_input"
            )
        if len(x) == 0:
            raise CalibrationError(f"batch {number} of calibrate is empty, {describe(x)}; leave such batches out")
        if parameter is not None:
            is_float = x.is_floating_point() and parameter.is_floating_point()
            x = x.to(parameter.device, parameter.dtype if is_float else x.dtype)
        yield x


def _run(model: QuantizedModel, x: torch.Tensor, number: int) -> None:
    try:
        model(x)
    except BaqeError:
        raise
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:  # torch's complaints about shapes and types
        shape = model.record.input_shape
        wanted = "" if shape is None else f" of shape (n, {', '.join(map(str, shape))})"
        raise CalibrationError(
            f"batch {number} of calibrate, {describe(x)}, does not go through the network; wanted is its input{wanted}"
            f", scaled as in training: {error}"
        ) from error
