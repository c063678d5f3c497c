"""Activation scales from data, in one pass."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch

from lightning_baqe.errors import BaqeError, CalibrationError
from lightning_baqe.quantization.activation import ActivationQuantizer
from lightning_baqe.quantization.batches import describe, network_input, network_inputs
from lightning_baqe.quantization.convert import QuantizedModel
from lightning_baqe.quantization.observer import RangeObserver
from lightning_baqe.quantization.train_modes import evaluating

FAR_DB, POOR_DB = 12.0, 12.0  # below what was before, and in itself
SHOWN = 3
NOISE_IMAGES = 16


@torch.no_grad()
def set_ranges(
    model: QuantizedModel, batches: Iterable[Any], max_batches: int | None = None
) -> tuple[torch.Tensor, ...]:
    """Initialise all activation quantizers from data; values pass through unquantized meanwhile.

    Runs in eval mode and restores each module's mode. If it fails, scales stay as they were.

    Args:
        model, batches, max_batches: see :func:`lightning_baqe.calibrate`.

    Returns:
        the last batch, a tensor for each input.

    Raises:
        CalibrationError: no data, batches that are not the network's input, or values that are not finite.
    """
    observers = {quantizer: RangeObserver() for quantizer in model.quantizers().values()}
    count = 0
    try:
        for quantizer, observer in observers.items():
            quantizer.observer = observer
        with evaluating(model):
            for inputs in inputs_of(model, batches, max_batches):
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
    return inputs


@torch.no_grad()
def warn_of_noise(model: QuantizedModel, inputs: tuple[torch.Tensor, ...]) -> None:
    """Warn of tensors that the 8-bit network computes far worse than those before them.

    What each quantizer reads is compared with and without quantization. Noise grows slowly from layer to layer; a
    sudden loss is a layer whose 8 bits do not hold what it computes.
    """
    quantizers = list(model.quantizers().values())
    if not quantizers or any(quantizer.bits != 8 for quantizer in quantizers):
        return  # fewer bits are noisy because they were asked for
    inputs = tuple(x[:NOISE_IMAGES] for x in inputs)
    exact, found = _read(model, inputs, observed=True), _read(model, inputs, observed=False)
    ratios = {q.name: _decibels(exact[q], found[q]) for q in quantizers if q in exact}
    usual = statistics.median(ratios.values())
    bad, best_so_far = [], usual
    for name, ratio in ratios.items():
        if ratio < min(best_so_far - FAR_DB, POOR_DB):
            bad.append(f"{name!r} {ratio:.0f} dB")
        best_so_far = min(best_so_far, max(ratio, POOR_DB))
    if bad:
        more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        warnings.warn(
            f"8 bits lose what the network computes: signal to noise falls to {', '.join(bad[:SHOWN])}{more}, where "
            f"the median tensor has {usual:.0f} dB. Look at what is added, joined or scaled right before: values of "
            "very different size share a grid there. Scale them alike, keep that layer float (32 bits), or clip by "
            "activation_range='percentile:99.9'. A network that is not trained yet may do so everywhere",
            UserWarning,
            stacklevel=4,
        )


def _read(
    model: QuantizedModel, inputs: tuple[torch.Tensor, ...], observed: bool
) -> dict[ActivationQuantizer, torch.Tensor]:
    """Samples of what each quantizer reads; observed: while all pass on what they read."""
    quantizers, found = list(model.quantizers().values()), dict[ActivationQuantizer, torch.Tensor]()

    def keep(quantizer: Any, args: tuple[torch.Tensor, ...]) -> None:
        sample = RangeObserver()
        sample.update(args[0])
        found[quantizer] = sample.samples

    hooks = [quantizer.register_forward_pre_hook(keep) for quantizer in quantizers]
    try:
        for quantizer in quantizers:
            quantizer.observer = RangeObserver() if observed else None
        with evaluating(model):
            model(*inputs)
    finally:
        for hook, quantizer in zip(hooks, quantizers, strict=True):
            hook.remove()
            quantizer.observer = None
    return found


def _decibels(exact: torch.Tensor, found: torch.Tensor) -> float:
    """Power of a signal without its mean over that of its noise."""
    noise = float((found - exact).double().square().mean())
    signal = float(exact.double().var(correction=0))
    return 10 * math.log10(signal / noise) if noise and signal else math.inf


def inputs_of(
    model: QuantizedModel, batches: Iterable[Any], max_batches: int | None
) -> Iterator[tuple[torch.Tensor, ...]]:
    """What the network is shown: its inputs, where and as it wants them; CalibrationError for batches that are none."""
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
