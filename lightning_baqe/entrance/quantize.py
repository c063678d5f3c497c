"""From a user's network to a fake-quantized one."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_baqe.entrance.admission import Network, admit
from lightning_baqe.errors import ConfigError
from lightning_baqe.quantization.config import BitConfig
from lightning_baqe.quantization.convert import QuantizedModel, check_options, fake_quantize


def quantize(
    model: nn.Module | Network,
    bits: BitConfig,
    example_input: Any = None,
    weight_quantizer: str = "lsq",
    activation_quantizer: str = "lsq+",
    weight_init: str = "mse",
    activation_range: str = "mse",
    output: str | int | None = None,
    fallback: str = "refuse",
) -> QuantizedModel:
    """A fake-quantized copy with learnable scales. The same arguments always give the same structure.

    The network is traced first, and the trace compared with what the network itself computes (:func:`admit`). Layers
    with bits become quantized ones under their own names; activation quantizers stand at the graph's edges, under
    ``activation_quantizers``. They need :func:`calibrate`, a state_dict or training before evaluation. With 32 bits
    everywhere the result computes what ``model`` does.

    Args:
        model: the float network, or what :func:`admit` made of it; untouched, nothing is shared with it.
        bits: for each of its layers.
        example_input: a batch of any size of real inputs, or a tuple of batches for several inputs.
        weight_quantizer: ``"lsq"``.
        activation_quantizer: ``"lsq+"`` (scale and offset learn), ``"lsq"`` (scale learns) or ``"static"`` (neither
            does: ranges stay as calibration sets them).
        weight_init: of the weight scales: ``"mse"``, ``"max"``, or as published, ``"lsq"`` or ``"lsq+"``;
            see :func:`initial_weight_scale`.
        activation_range: what calibration derives ranges by: ``"mse"``, ``"minmax"``, ``"ema"``, ``"percentile"``
            (99.99 % at each end) or ``"percentile:99.9"``; see :meth:`RangeObserver.range`.
        fallback: of operators without an integer meaning: ``"refuse"``, or ``"float"``: they stay float between
            integers. With a :class:`Network` its own counts.
        output: where the network returns several tensors, the key or number of the one that is wanted.

    Raises:
        ConfigError: bits that do not fit the model, or an argument that cannot be right.
        UnsupportedModelError: the network cannot be traced or lowered; names the module and the reason.
    """
    check_options(weight_quantizer, activation_quantizer, weight_init, activation_range)
    if not isinstance(model, Network):
        if example_input is None:
            raise ConfigError(
                "quantize needs example_input, a batch of real inputs: the network is traced with it, and the trace is "
                "compared with the network"
            )
        model = admit(model, example_input, output, fallback)
    bits.check(model.model)
    return fake_quantize(
        model.graph,
        bits,
        model.input_shapes,
        weight_quantizer,
        activation_quantizer,
        weight_init,
        activation_range,
        model.fallback,
    )
