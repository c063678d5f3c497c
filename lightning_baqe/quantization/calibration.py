"""Initialise activation scales from data, in one pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from lightning_baqe.errors import CalibrationError
from lightning_baqe.quantization.convert import QuantizedModel
from lightning_baqe.quantization.observer import RangeObserver


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
    quantizers = model.quantizers()
    modes = {module: module.training for module in model.modules()}
    parameter = next(model.parameters(), None)
    count = 0
    model.eval()
    try:
        for quantizer in quantizers.values():
            quantizer.observer = RangeObserver()
        for batch in batches:
            if max_batches is not None and count >= max_batches:
                break
            x = batch[0] if isinstance(batch, tuple | list) else batch
            model(x if parameter is None else x.to(parameter.device))
            count += 1
        if count == 0:
            raise CalibrationError("calibrate got no batches; give at least one batch of x or (x, y)")
        observers = {quantizer: quantizer.observer for quantizer in quantizers.values()}
        for quantizer, observer in observers.items():
            assert observer is not None
            observer.check(quantizer.name)
        for quantizer, observer in observers.items():
            assert observer is not None
            quantizer.initialize(observer)
    finally:
        for quantizer in quantizers.values():
            quantizer.observer = None
        for module, training in modes.items():
            module.training = training
    return model
