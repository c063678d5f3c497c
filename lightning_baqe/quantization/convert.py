"""From a float model and a bit-config to a fake-quantized model with learnable scales.

| word | meaning |
| --- | --- |
| tensor | the output of a graph node |
| float domain | tensors that no integer arithmetic has touched: the input, outputs of float layers and what follows them |
| integer domain | all others: the device stores them as integers |
| wants | the bits that a consumer reads a tensor at; None: as it is |
| primary quantizer | of a tensor: the widest that its consumers want. The device stores the tensor so; narrower quantizers are chained behind the primary one, since the device derives them from what it stores |

Transparent operators (ReLU, max pooling, concatenation, whatever moves elements) commute with quantization: the only
consumer of a tensor, they read it as it is, and their output is quantized; the device brings each producer's output onto
that grid at once. One of several consumers, they read it at ``BitConfig.other`` bits. A function whose only consumer is
another function is read as it is, too: one table stands for both.
"""  # noqa: E501

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from lightning_baqe.errors import ConfigError
from lightning_baqe.quantization.activation import (
    ACTIVATION_QUANTIZERS,
    STREAM_BITS,
    ActivationQuantizer,
    ResidualStream,
)
from lightning_baqe.quantization.aten import ORIGIN, Origin, origin
from lightning_baqe.quantization.config import FLOAT_BITS, BitConfig, LayerBits
from lightning_baqe.quantization.gradient_scaling import GradientScaling
from lightning_baqe.quantization.layers import QUANT_LAYERS, QuantLayer, outputs_first
from lightning_baqe.quantization.observer import parse_range
from lightning_baqe.quantization.ops import TRANSPARENT, OpReader
from lightning_baqe.quantization.pointwise import Expression
from lightning_baqe.quantization.weight import WEIGHT_INITS, WeightQuantizer

QUANTIZERS = "activation_quantizers"
_META = "lightning_baqe"


@dataclass(frozen=True)
class QuantizationRecord:
    """What a model was quantized with; ``origins`` tell where the nodes of its graph come from, by their names."""

    bits: BitConfig
    input_shapes: tuple[tuple[int, ...], ...]
    origins: dict[str, Origin]
    fallback: str = "refuse"

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one input, without the batch."""
        return self.input_shapes[0]


class QuantizedModel(fx.GraphModule):
    """A fake-quantized network; made by :func:`lightning_baqe.quantize`."""

    @property
    def record(self) -> QuantizationRecord:
        record: QuantizationRecord = self.meta[_META]
        return record

    @property
    def bits(self) -> BitConfig:
        """The bit-config that it was made with."""
        return self.record.bits

    def quantizers(self) -> dict[str, ActivationQuantizer]:
        """Activation quantizers by module path, in network order."""
        return {name: m for name, m in self.named_modules() if isinstance(m, ActivationQuantizer)}

    def scale_gradients(self, weights: GradientScaling, activations: GradientScaling) -> None:
        """Set how gradients pass the rounding; the best of Schaefer et al. are ``ewgs`` and ``invtanh``."""
        for module in self.modules():
            if isinstance(module, WeightQuantizer | ActivationQuantizer):
                module.gradient = weights if isinstance(module, WeightQuantizer) else activations

    def take_weights(self, trained: QuantizedModel) -> None:
        """Go on from the weights and batch norms of the same network at other bits; scales of weights are set anew from
        them, ranges are left to :func:`lightning_baqe.calibrate`.

        Raises:
            ConfigError: another network, or one whose batch norms are folded.
        """
        found, own = _without_quantizers(trained), _without_quantizers(self)
        differ = [n for n in {**own, **found} if n not in own or n not in found or own[n].shape != found[n].shape]
        if differ:
            raise ConfigError(f"take_weights wants the same network at other bits, but {differ[0]!r} differs")
        self.load_state_dict(found, strict=False)
        for module in self.modules():
            if isinstance(module, QuantLayer):
                module.weight_quantizer.initialize(outputs_first(module).detach())

    def __reduce__(self) -> tuple[Any, ...]:
        function, arguments = super().__reduce__()[:2]
        return _restore, (function, arguments, self.meta[_META])


def _without_quantizers(model: QuantizedModel) -> dict[str, torch.Tensor]:
    """Its state, but for what quantizers hold."""
    quantizers = {n for n, m in model.named_modules() if isinstance(m, WeightQuantizer | ActivationQuantizer)}
    return {name: of for name, of in model.state_dict().items() if name.rpartition(".")[0] not in quantizers}


def _restore(function: Callable[..., fx.GraphModule], arguments: tuple[Any, ...], record: Any) -> QuantizedModel:
    plain = function(*arguments)
    model = QuantizedModel(plain, plain.graph)
    model.meta[_META] = record
    for node in model.graph.nodes:
        if node.name in record.origins:
            node.meta[ORIGIN] = record.origins[node.name]
    return model


def fake_quantize(
    network: fx.GraphModule,
    bits: BitConfig,
    input_shapes: tuple[tuple[int, ...], ...],
    weight_quantizer: str = "lsq",
    activation_quantizer: str = "lsq+",
    weight_init: str = "mse",
    activation_range: str = "mse",
    fallback: str = "refuse",
) -> QuantizedModel:
    """A fake-quantized copy of a traced network; :func:`lightning_baqe.quantize` traces and checks before.

    Args:
        network: what :func:`lightning_baqe.quantization.trace.trace` returned; untouched, nothing is shared with it.
        bits: for each of its layers.
        input_shapes: of each input, without the batch.
        weight_quantizer, activation_quantizer, weight_init, activation_range, fallback: see
            :func:`lightning_baqe.quantize`.

    Raises:
        ConfigError: an unknown option.
    """
    check_options(weight_quantizer, activation_quantizer, weight_init, activation_range)
    for name, layer_bits in bits.items():
        if isinstance(layer_bits.weight, tuple):
            channels = len(outputs_first(network.get_submodule(name)))
            if len(layer_bits.weight) != channels:
                raise ConfigError(
                    f"layer {name!r} has {channels} output channels, and {len(layer_bits.weight)} weight bits by "
                    "channel; give one number for each, or one for all"
                )
    root = copy.deepcopy(network)
    graph = root.graph
    device = next((p.device for p in root.parameters()), None)
    reader = OpReader(root, graph)
    quantizer_type = ACTIVATION_QUANTIZERS[activation_quantizer]

    def make(name: str, width: int) -> ActivationQuantizer:
        kind = ResidualStream if width == STREAM_BITS else quantizer_type
        quantizer = kind(width, name, device, activation_range)
        quantizer.train(root.training)
        return quantizer

    layers = {node: origin(node).label for node, op in reader.ops.items() if op.kind == "layer"}
    _insert_quantizers(root, reader, plan(reader, bits), make)
    for node, name in layers.items():
        if not bits.of(name).is_float:
            _swap(root, str(node.target), bits.of(name), weight_init)
    quantized = QuantizedModel(root, graph, class_name=f"Quantized{type(network).__name__}")
    modes = {name: module.training for name, module in root.named_modules()}
    for name, module in quantized.named_modules():
        module.training = modes.get(name, root.training)
    origins = {node.name: node.meta[ORIGIN] for node in graph.nodes if ORIGIN in node.meta}
    quantized.meta[_META] = QuantizationRecord(bits, input_shapes, origins, fallback)
    return quantized


def check_options(
    weight_quantizer: str = "lsq",
    activation_quantizer: str = "lsq+",
    weight_init: str = "mse",
    activation_range: str = "mse",
) -> None:
    """Raises ConfigError for an option that :func:`quantize` does not know."""
    for option, value, known in (
        ("weight_quantizer", weight_quantizer, ("lsq",)),
        ("activation_quantizer", activation_quantizer, tuple(ACTIVATION_QUANTIZERS)),
        ("weight_init", weight_init, WEIGHT_INITS),
    ):
        if value not in known:
            raise ConfigError(f"{option} must be one of {known}, got {value!r}")
    parse_range(activation_range)


def float_domain(reader: OpReader, bits: BitConfig) -> set[fx.Node]:
    """The tensors that no integer arithmetic has touched."""
    found: set[fx.Node] = set()
    for node, op in reader.ops.items():
        if op.kind == "layer":
            if bits.of(origin(node).label).is_float:
                found.add(node)
        elif op.kind == "other":
            found.add(node)  # it stays float, whatever it reads
        elif op.kind not in ("value", "constant", "part") and all(source in found for source in op.inputs):
            found.add(node)
    return found


def plan(reader: OpReader, bits: BitConfig) -> dict[tuple[fx.Node, fx.Node], int]:
    """The bits that each consumer reads each tensor at: ``{(tensor, consumer): bits}``; what is missing is read as is.

    Raises:
        UnsupportedModelError: a tensor's consumer reads it in a way that no quantizer can stand for.
    """
    in_float = float_domain(reader, bits)
    wants: dict[tuple[fx.Node, fx.Node], int] = {}
    for node, op in reader.ops.items():
        for source in op.inputs:
            width = _wanted(reader, bits, in_float, source, node)
            if width != FLOAT_BITS:
                wants[source, node] = width
    return wants


def _wanted(reader: OpReader, bits: BitConfig, in_float: set[fx.Node], source: fx.Node, node: fx.Node) -> int:
    """The bits that ``node`` reads ``source`` at; 32: as it is."""
    op = reader[node]
    if origin(source).dtype == "bool":
        return FLOAT_BITS  # there is nothing to round
    if op.kind == "layer":
        width = bits.of(origin(node).label).activation
        return bits.other if width == FLOAT_BITS and source not in in_float else width
    if op.kind in ("output", "other"):
        return FLOAT_BITS if source in in_float or _is_accumulator(reader, source) else bits.other
    if reader.is_attached(node) or reader.is_chained(node) or node in in_float or reader.is_collection(source):
        return FLOAT_BITS
    if op.kind in TRANSPARENT and not reader.is_collection(node):
        alone = len(reader.consumers[source]) == 1 and source not in in_float
        return FLOAT_BITS if alone else bits.other
    if op.kind == "add" and bits.residual is not None:
        return STREAM_BITS if bits.residual == FLOAT_BITS else bits.residual
    return bits.other


def _is_accumulator(reader: OpReader, node: fx.Node) -> bool:
    """Whether a tensor is a layer's accumulators, perhaps moved, that nothing else reads."""
    while len(reader.consumers[node]) == 1:
        op = reader[node]
        if op.kind == "layer":
            return True
        if op.kind not in ("dropout", "identity", "movement") and not reader.is_attached(node):
            return False
        node = op.inputs[0]
    return False


def _insert_quantizers(
    root: nn.Module,
    reader: OpReader,
    wants: dict[tuple[fx.Node, fx.Node], int],
    make: Callable[[str, int], ActivationQuantizer],
) -> None:
    """Insert each tensor's primary quantizer and the narrower ones behind it, and let the consumers read them."""
    graph, container = reader.graph, nn.Module()
    container.train(root.training)
    by_tensor: dict[fx.Node, dict[fx.Node, int]] = {}
    for (source, consumer), width in wants.items():
        by_tensor.setdefault(source, {})[consumer] = width
    for source in list(graph.nodes):
        consumers = by_tensor.get(source, {})
        last = source
        made: dict[int, fx.Node] = {}
        for width in sorted(set(consumers.values()), reverse=True):
            name = source.name if not made else f"{source.name}_{width}bit"
            while hasattr(container, name):  # 'to', 'float' and whatever else a module has
                name += "_"
            quantizer = make(name, width)
            if len(consumers) == 1:
                quantizer.through = _function_alone(reader, next(iter(consumers)))
            container.add_module(name, quantizer)
            if last is source:
                root.add_module(QUANTIZERS, container)
                primary = source
            with graph.inserting_after(last):
                made[width] = last = graph.call_module(f"{QUANTIZERS}.{name}", (primary,))
            last.meta[ORIGIN] = replace(origin(source), label=f"{origin(source).label}.quantizer")
            if primary is source:
                primary = last
        for consumer, width in consumers.items():
            for reading in reader[consumer].options.get("parts", (consumer,)):
                reading.replace_input_with(source, made[width])


def _function_alone(reader: OpReader, consumer: fx.Node) -> Expression | None:
    """What a consumer does to each value, if it is a function without constants of the network."""
    steps = reader[consumer].options.get("steps", ())
    return Expression(steps) if steps and not any(isinstance(v, fx.Node) for step in steps for v in step) else None


def _swap(root: nn.Module, path: str, bits: LayerBits, init: str) -> None:
    """Replace a float layer by its quantized kind, in place."""
    layer = root.get_submodule(path)
    if type(layer) not in QUANT_LAYERS:
        return  # called more than once in the graph
    quantizer = WeightQuantizer(outputs_first(layer).detach(), bits.weight, init)
    new = QUANT_LAYERS[type(layer)](layer, quantizer)
    for name, child in layer.named_children():
        new.add_module(name, child)
    for name, parameter in layer._parameters.items():  # of the network's own, which other operators read
        if name not in new._parameters:
            new.register_parameter(name, parameter)
    for name, buffer in layer._buffers.items():
        new.register_buffer(name, buffer)
    parent, _, leaf = path.rpartition(".")
    root.get_submodule(parent).add_module(leaf, new)
