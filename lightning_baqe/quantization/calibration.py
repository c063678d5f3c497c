"""Initialise activation scales from data, in one pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch

from lightning_baqe.errors import BaqeError, CalibrationError
from lightning_baqe.quantization.batches import describe, network_input, network_inputs
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
            :mod:`lightning_baqe.quantization.batches`. For several inputs ``(x1, x2, ...)``, ``((x1, x2), ...)`` or a
            mapping with the names of forward's arguments. Moved to the model's device, floats to its type. One tensor or
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
            for inputs in _inputs(model, batches, max_batches):
                count += 1
                _run(model, inputs, count)
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


def _inputs(model: QuantizedModel, batches: Iterable[Any], max_batches: int | None) -> Iterator[tuple[torch.Tensor, ...]]:
    """What the network is shown: its inputs, where and as it wants them."""
    if isinstance(batches, Mapping):
        raise CalibrationError(f"batches is {describe(batches)}; wanted is an iterable of such batches: give [batch]")
    parameter, shapes = next(model.parameters(), None), model.record.input_shapes
    names = [str(node.target) for node in model.graph.find_nodes(op="placeholder")]
    whole = [batches] if isinstance(batches, torch.Tensor | np.ndarray) else batches
    for number, batch in enumerate(islice(whole, max_batches), 1):
        source = f"batch {number} of calibrate"
        given = (network_input(batch, source),) if len(names) == 1 else network_inputs(batch, names, source)
        found = []
        for x, shape in zip(given, shapes, strict=True):
            if x.ndim != len(shape) + 1:
                raise CalibrationError(
                    f"{source} gives {describe(batch)}, of which {describe(x)} was taken; wanted is the network's "
                    f"input, (n, {', '.join(map(str, shape))}) as in quantize's example_input"
                )
            if len(x) == 0:
                raise CalibrationError(f"{source} is empty, {describe(x)}; leave such batches out")
            if parameter is not None:
                is_float = x.is_floating_point() and parameter.is_floating_point()
                x = x.to(parameter.device, parameter.dtype if is_float else x.dtype)
            found.append(x)
        yield tuple(found)


def _run(model: QuantizedModel, inputs: tuple[torch.Tensor, ...], number: int) -> None:
    try:
        model(*inputs)
    except BaqeError:
        raise
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:  # torch's complaints about shapes and types
        shapes = " and ".join(f"(n, {', '.join(map(str, shape))})" for shape in model.record.input_shapes)
        raise CalibrationError(
            f"batch {number} of calibrate, {' and '.join(map(describe, inputs))}, does not go through the network; "
            f"wanted is its input of shape {shapes}, scaled as in training: {error}"
        ) from error
