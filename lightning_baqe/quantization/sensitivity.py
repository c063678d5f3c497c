"""How much each layer's quantization alone disturbs a network, without training and without labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import fx, nn
from torch.nn import functional

from lightning_baqe.errors import ConfigError
from lightning_baqe.quantization.activation import ActivationQuantizer
from lightning_baqe.quantization.aten import origin
from lightning_baqe.quantization.convert import QuantizedModel
from lightning_baqe.quantization.layers import QuantLayer
from lightning_baqe.quantization.train_modes import evaluating
from lightning_baqe.quantization.weight import WeightQuantizer

OutputKind = Literal["classes", "labels", "values"]


def output_divergence(reference: torch.Tensor, found: torch.Tensor, kind: OutputKind = "classes") -> torch.Tensor:
    """How far outputs are from a reference, at least 0; the mean over all but dimension 1.

    Args:
        reference: ``(n, outputs, ...)``; no gradient flows there.
        found: of the same shape.
        kind: ``classes``: logits of exclusive classes along dimension 1, KL(reference || found) of their probabilities,
            in nats. ``labels``: logits of independent ones, the sum of each one's KL; so is a single class, whose
            probability among its like is always 1. ``values``: the squared difference over the reference's variance.

    Returns:
        scalar.
    """
    reference = reference.detach()
    if reference.ndim == 1:
        reference, found = reference[:, None], found[:, None]
    if kind == "values":
        return functional.mse_loss(found, reference) / reference.var(correction=0).clamp_min(1e-12)
    if kind == "labels" or reference.shape[1] == 1:
        theirs, ours = (torch.stack([functional.logsigmoid(x), functional.logsigmoid(-x)]) for x in (reference, found))
    else:
        theirs, ours = functional.log_softmax(reference, 1), functional.log_softmax(found, 1)
    places = reference.numel() / reference.shape[1]
    return functional.kl_div(ours, theirs, reduction="sum", log_target=True) / places


@torch.no_grad()
def layer_scores(model: QuantizedModel, images: torch.Tensor, kind: OutputKind = "classes") -> dict[str, float]:
    """The divergence of the outputs where one layer's weights and input alone are quantized.

    By default the mean over images of KL(float || quantized) of the class probabilities, in nats: the label-free loss
    that the layer's quantization adds.

    Args:
        model: calibrated; its modes and quantizers are restored.
        images: ``(n, channels, height, width)``; moved to the model's device.
        kind: of the outputs, for :func:`output_divergence`.

    Returns:
        ``{layer: at least 0}`` of every quantized layer, in network order.

    Raises:
        CalibrationError: an activation quantizer has no scale yet.
    """
    images = images.to(next(model.parameters()).device)
    everything = [m for m in model.modules() if isinstance(m, ActivationQuantizer | WeightQuantizer)]

    def outputs(idle: Sequence[nn.Module]) -> torch.Tensor:
        with _idle(idle):
            found: torch.Tensor = model(images)
            return found

    scores = {}
    with evaluating(model):
        reference = outputs(everything)
        for layer, own in quantizers_of_layers(model).items():
            found = outputs([q for q in everything if q is not own.weight and q not in own.inputs])
            scores[layer] = max(float(output_divergence(reference, found, kind)), 0.0)
    return scores


@dataclass(frozen=True)
class LayerQuantizers:
    """What stands between a float layer and its quantized kind.

    Attributes:
        path: of its module in the quantized model.
        weight: of its weights.
        calls: of its input, in the order in which it passes them, each time that the network calls it; an empty list:
            it reads its input as it is.
    """

    path: str
    weight: WeightQuantizer
    calls: list[list[ActivationQuantizer]] = field(default_factory=list)

    @property
    def width(self) -> int:
        """Bits of the weights; ConfigError where they differ by channel."""
        if isinstance(self.weight.bits, tuple):
            raise ConfigError(f"{self.path!r} has weight bits by channel, and layers are compared: give one number")
        return self.weight.bits

    @property
    def inputs(self) -> list[ActivationQuantizer]:
        """Of all calls."""
        return [quantizer for call in self.calls for quantizer in call]


def quantizers_of_layers(model: QuantizedModel) -> dict[str, LayerQuantizers]:
    """The quantizers of each quantized layer, by its name in the float network, in network order."""
    found: dict[str, LayerQuantizers] = {}
    for node in model.graph.nodes:
        layer = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(layer, QuantLayer):
            continue
        own = found.setdefault(origin(node).label, LayerQuantizers(str(node.target), layer.weight_quantizer))
        source, passed = node.args[0], []
        while isinstance(source, fx.Node) and source.op == "call_module":
            quantizer = model.get_submodule(str(source.target))
            if not isinstance(quantizer, ActivationQuantizer):
                break
            passed.append(quantizer)
            source = source.args[0]
        own.calls.append(passed[::-1])
    return found


@contextmanager
def _idle(quantizers: Sequence[nn.Module]) -> Iterator[None]:
    """Let values pass these quantizers unchanged."""
    handles = [quantizer.register_forward_hook(lambda module, inputs, output: inputs[0]) for quantizer in quantizers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
