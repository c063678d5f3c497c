"""How much each layer's quantization alone disturbs a network, without training and without labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import fx, nn
from torch.nn import functional

from lightning_baqe.quantization.activation import ActivationQuantizer
from lightning_baqe.quantization.convert import QuantizedModel
from lightning_baqe.quantization.layers import QuantConv2d, QuantLinear
from lightning_baqe.quantization.plain import evaluating
from lightning_baqe.quantization.weight import WeightQuantizer


@torch.no_grad()
def layer_scores(model: QuantizedModel, images: torch.Tensor) -> dict[str, float]:
    """The divergence of the class probabilities where one layer's weights and input alone are quantized.

    The mean over images of KL(float || quantized), in nats: the label-free loss that the layer's quantization adds.

    Args:
        model: calibrated; its modes and quantizers are restored.
        images: ``(n, channels, height, width)``; moved to the model's device.

    Returns:
        ``{layer: at least 0}`` of every quantized layer, in network order.

    Raises:
        CalibrationError: an activation quantizer has no scale yet.
    """
    images = images.to(next(model.parameters()).device)
    everything = [m for m in model.modules() if isinstance(m, ActivationQuantizer | WeightQuantizer)]

    def log_probabilities(idle: Sequence[nn.Module]) -> torch.Tensor:
        with _idle(idle):
            return functional.log_softmax(model(images).flatten(1), dim=1)

    scores = {}
    with evaluating(model):
        reference = log_probabilities(everything)
        for layer, own in _quantizers_of_layers(model).items():
            found = log_probabilities([quantizer for quantizer in everything if quantizer not in own])
            divergence = functional.kl_div(found, reference, reduction="batchmean", log_target=True)
            scores[layer] = max(float(divergence), 0.0)
    return scores


def _quantizers_of_layers(model: QuantizedModel) -> dict[str, list[nn.Module]]:
    """Each quantized layer's weight quantizer and the quantizers of its input."""
    owners: dict[str, list[nn.Module]] = {}
    for node in model.graph.nodes:
        layer = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(layer, QuantConv2d | QuantLinear):
            continue
        own = owners.setdefault(str(node.target), [layer.weight_quantizer])
        source = node.args[0]
        while isinstance(source, fx.Node) and source.op == "call_module":
            quantizer = model.get_submodule(str(source.target))
            if not isinstance(quantizer, ActivationQuantizer):
                break
            own.append(quantizer)
            source = source.args[0]
    return owners


@contextmanager
def _idle(quantizers: Sequence[nn.Module]) -> Iterator[None]:
    """Let values pass these quantizers unchanged."""
    handles = [quantizer.register_forward_hook(lambda module, inputs, output: inputs[0]) for quantizer in quantizers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
