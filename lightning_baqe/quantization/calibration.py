"""Initialise activation scales from data, in one pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from lightning_baqe.errors import CalibrationError
from lightning_baqe.quantization.convert import QuantizedModel
from lightning_baqe.quantization.observer import RangeObserver
from lightning_baqe.quantization.plain import evaluating


@torch.no_grad()
def calibrate(model: QuantizedModel, batches: Iterable[Any], max_batches: int | None = None) -> QuantizedModel:
    """Initialise all activation quantizers from data; values pass through unquantized meanwhile.

    Runs in eval mode and restores each module's mode. Calibrating again starts afresh. If it fails, scales stay as
    they were.

    Args:
        model: what :func:`quantize` returned.
        batches: of ``x`` or ``(x, y, ...)``, x of shape ``(n, ...)``; moved to the model's device.
        max_batches: stop after so many.

    Returns:
        The same model.

    Raises:
        CalibrationError: no data, or values that are not finite.
    """
    observers = {quantizer: RangeObserver() for quantizer in model.quantizers().values()}
    parameter = next(model.parameters(), None)
    count = 0
    try:
        for quantizer, observer in observers.items():
            quantizer.observer = observer
        with evaluating(model):
            for batch in batches:
                if max_batches is not None and count >= max_batches:
                    break
                x = batch[0] if isinstance(batch, tuple | list) else batch
                model(x if parameter is None else x.to(parameter.device))
                count += 1
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
