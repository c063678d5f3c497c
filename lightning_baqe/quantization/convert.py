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
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from lightning_baqe.errors import ConfigError, UnsupportedModelError
from lightning_baqe.quantization.activation import (
    ACTIVATION_QUANTIZERS,
    STREAM_BITS,
    ActivationQuantizer,
    ResidualStream,
)
from lightning_baqe.quantization.config import FLOAT_BITS, BitConfig, LayerBits
from lightning_baqe.quantization.layers import QuantConv2d, QuantLinear
from lightning_baqe.quantization.observer import parse_range
from lightning_baqe.quantization.ops import TRANSPARENT, OpReader
from lightning_baqe.quantization.trace import trace
from lightning_baqe.quantization.weight import WEIGHT_INITS, WeightQuantizer

QUANTIZERS = "activation_quantizers"
_META = "lightning_baqe"


@dataclass(frozen=True)
class QuantizationRecord:
    """What :func:`quantize` was told; ``labels`` are readable names of graph nodes."""

    bits: BitConfig
    input_shape: tuple[int, ...] | None
    labels: dict[str, str]


class QuantizedModel(fx.GraphModule):
    """A fake-quantized network; made by :func:`quantize`."""

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

    def __reduce__(self) -> tuple[Any, ...]:
        function, arguments = super().__reduce__()[:2]
        return _restore, (function, arguments, self.meta[_META])


def _restore(function: Callable[..., fx.GraphModule], arguments: tuple[Any, ...], record: Any) -> QuantizedModel:
    plain = function(*arguments)
    model = QuantizedModel(plain, plain.graph)
    model.meta[_META] = record
    return model


def quantize(
    model: nn.Module,
    bits: BitConfig,
    example_input: torch.Tensor | None = None,
    weight_quantizer: str = "lsq",
    activation_quantizer: str = "lsq+",
    weight_init: str = "mse",
    activation_range: str = "mse",
) -> QuantizedModel:
    """A fake-quantized copy with learnable scales. The same arguments always give the same structure.

    Layers with bits become :class:`QuantConv2d` or :class:`QuantLinear` under their own names; activation quantizers
    stand at the graph's edges, under ``activation_quantizers``. They need :func:`calibrate`, a state_dict or training
    before evaluation. With 32 bits everywhere the result computes what ``model`` does.

    Args:
        model: the float network; untouched, nothing is shared with it.
        bits: for each of its layers.
        example_input: a batch of any size; :func:`lower` takes its shape.
        weight_quantizer: ``"lsq"``.
        activation_quantizer: ``"lsq+"`` (scale and offset learn), ``"lsq"`` (scale learns) or ``"static"`` (neither
            does: ranges stay as calibration sets them).
        weight_init: of the weight scales: ``"mse"``, or as published, ``"lsq"`` or ``"lsq+"``;
            see :func:`initial_weight_scale`.
        activation_range: what calibration derives ranges by: ``"mse"``, ``"minmax"``, ``"ema"``, ``"percentile"``
            (99.99 % at each end) or ``"percentile:99.9"``; see :meth:`RangeObserver.range`.

    Raises:
        ConfigError: bits that do not fit the model, or an unknown option.
        UnsupportedModelError: the model cannot be traced.
    """
    check_options(weight_quantizer, activation_quantizer, weight_init, activation_range)
    for name, module in model.named_modules():
        if isinstance(module, QuantConv2d | QuantLinear):
            raise ConfigError(f"layer {name!r} is quantized already; quantize the float model instead")
    bits.check(model)
    for name, layer_bits in bits.items():
        if isinstance(layer_bits.weight, tuple):
            raise ConfigError(f"layer {name!r}: weight bits by channel are not supported yet; give one number")
    root = copy.deepcopy(model)
    device = next((p.device for p in root.parameters()), None)
    graph = trace(root, None if example_input is None else example_input.to(device))
    reader = OpReader(root, graph)
    quantizer_type = ACTIVATION_QUANTIZERS[activation_quantizer]

    def make(name: str, width: int) -> ActivationQuantizer:
        kind = ResidualStream if width == STREAM_BITS else quantizer_type
        quantizer = kind(width, name, device, activation_range)
        quantizer.train(root.training)
        return quantizer

    labels = {node.name: _label(node) for node in graph.nodes}
    wants = plan(reader, bits)
    _insert_quantizers(root, graph, wants, make)
    for node, op in reader.ops.items():
        if op.kind == "layer" and not bits[str(node.target)].is_float:
            _swap(root, str(node.target), bits[str(node.target)], weight_init)
    quantized = QuantizedModel(root, graph, class_name=f"Quantized{type(model).__name__}")
    traced = set(root.modules())
    for module in quantized.modules():
        if module not in traced:  # containers that the graph module made; the others keep their modes
            module.training = model.training
    shape = None if example_input is None else tuple(example_input.shape[1:])
    quantized.meta[_META] = QuantizationRecord(bits, shape, labels)
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


def _label(node: fx.Node) -> str:
    """A readable name: the module's path, or the path of the module around an operator and the operator's name."""
    if node.op == "call_module":
        return str(node.target)
    stack = list(node.meta.get("nn_module_stack", {}))
    scope = stack[-1].split("@")[0] if stack else ""
    short = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.name)
    return f"{scope}.{short}" if scope else str(short)


def float_domain(reader: OpReader, bits: BitConfig) -> set[fx.Node]:
    """The tensors that no integer arithmetic has touched."""
    found: set[fx.Node] = set()
    for node, op in reader.ops.items():
        if op.kind == "layer":
            if bits[str(node.target)].is_float:
                found.add(node)
        elif op.kind not in ("value", "constant") and all(source in found for source in op.inputs):
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
    if op.kind == "layer":
        width = bits[str(node.target)].activation
        return bits.other if width == FLOAT_BITS and source not in in_float else width
    if op.kind == "output":
        return FLOAT_BITS if source in in_float or _is_accumulator(reader, source) else bits.other
    if reader.is_attached(node) or node in in_float or reader.is_collection(source) or reader.is_composed(source):
        return FLOAT_BITS
    if op.kind in TRANSPARENT and not reader.is_collection(node):
        alone = len(reader.consumers[source]) == 1 and source not in in_float
        return FLOAT_BITS if alone else bits.other
    if op.kind == "add" and bits.residual is not None:
        return STREAM_BITS if bits.residual == FLOAT_BITS else bits.residual
    return bits.other


def _is_accumulator(reader: OpReader, node: fx.Node) -> bool:
    """Whether a tensor is a layer's accumulators, perhaps reshaped, that nothing else reads."""
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
    graph: fx.Graph,
    wants: dict[tuple[fx.Node, fx.Node], int],
    make: Callable[[str, int], ActivationQuantizer],
) -> None:
    """Insert each tensor's primary quantizer and the narrower ones behind it, and let the consumers read them."""
    if hasattr(root, QUANTIZERS):
        raise UnsupportedModelError(f"the model has an attribute {QUANTIZERS!r} of its own; rename it")
    container = nn.Module()
    by_tensor: dict[fx.Node, dict[fx.Node, int]] = {}
    for (source, consumer), width in wants.items():
        by_tensor.setdefault(source, {})[consumer] = width
    for source in list(graph.nodes):
        consumers = by_tensor.get(source, {})
        last = source
        made: dict[int, fx.Node] = {}
        for width in sorted(set(consumers.values()), reverse=True):
            name = source.name if not made else f"{source.name}_{width}bit"
            container.add_module(name, make(name, width))
            if last is source:
                root.add_module(QUANTIZERS, container)
                primary = source
            with graph.inserting_after(last):
                made[width] = last = graph.call_module(f"{QUANTIZERS}.{name}", (primary,))
            if primary is source:
                primary = last
        for consumer, width in consumers.items():
            consumer.replace_input_with(source, made[width])


def _swap(root: nn.Module, name: str, bits: LayerBits, init: str) -> None:
    """Replace a float layer by its quantized kind, in place."""
    layer = root.get_submodule(name)
    if isinstance(layer, QuantConv2d | QuantLinear):
        return  # called more than once in the graph
    assert isinstance(bits.weight, int)
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    quantizer = WeightQuantizer(layer.weight, bits.weight, init)
    new = QuantConv2d(layer, quantizer) if isinstance(layer, nn.Conv2d) else QuantLinear(layer, quantizer)
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, new)
