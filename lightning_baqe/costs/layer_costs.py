"""What a network costs by layer and bits: size, bit operations, and microseconds of a device, each to be summed up.

Latency: whole networks are measured with all free layers at each width, and kernels by themselves. A layer's figure is
its kernel's, plus its part of what the whole network says beyond the kernels: requantizations of tensors that others
read at more bits, where it takes more time than the reference; caches that narrower constants leave free, by bytes,
where less.
So sums are exact for the networks that were measured, and estimates between them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from lightning_baqe.deploy.plan import make_plan
from lightning_baqe.errors import ConfigError, MeasurementError
from lightning_baqe.hardware.options import BuildOptions
from lightning_baqe.integer.graph import MULTIPLIER_BYTES, SHIFT_BYTES, IntegerGraph, node_bytes, node_macs
from lightning_baqe.integer.layer_nodes import FloatLayer, Layer
from lightning_baqe.measurement.device import Device
from lightning_baqe.quantization.aten import origin
from lightning_baqe.quantization.config import FLOAT_BITS, BitConfig, LayerBits
from lightning_baqe.quantization.convert import plan
from lightning_baqe.quantization.ops import OpReader
from lightning_baqe.tuning.tuner import tune

SIZE, BOPS, LATENCY, MEAN_BITS = "size_bytes", "bops", "latency_us", "mean_bits"
Table = dict[str, dict[int, float]]  # {layer: {bits: value}}


@dataclass(frozen=True)
class LayerCosts:
    """Costs that are sums over layers.

    Args:
        tables: ``{cost: {layer: {bits: value}}}``; layers without a choice have one width.
        rest: ``{cost: of all that is no layer}``.
    """

    tables: Mapping[str, Table]
    rest: Mapping[str, float]

    def total(self, cost: str, bits: Mapping[str, int]) -> float:
        """Of a network."""
        return self.rest[cost] + sum(of[bits[layer]] for layer, of in self.tables[cost].items())

    def span(self, cost: str, pick: Callable[[list[float]], float]) -> float:
        """The smallest or largest that a network's can be: ``pick`` is ``min`` or ``max``."""
        return self.rest[cost] + sum(pick(list(of.values())) for of in self.tables[cost].values())

    def record(self) -> dict[str, Any]:
        """As JSON holds it."""
        tables = {
            cost: {layer: {str(bits): value for bits, value in of.items()} for layer, of in table.items()}
            for cost, table in self.tables.items()
        }
        return {"tables": tables, "rest": dict(self.rest)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> LayerCosts:
        """What :meth:`record` gave."""
        tables = {
            cost: {layer: {int(bits): float(value) for bits, value in of.items()} for layer, of in table.items()}
            for cost, table in record["tables"].items()
        }
        return cls(tables, {cost: float(value) for cost, value in record["rest"].items()})

    def restricted(self, widths: Sequence[int]) -> LayerCosts:
        """With these bits alone, where layers have a choice."""
        return LayerCosts({cost: only(table, widths) for cost, table in self.tables.items()}, self.rest)

    def joined(self, other: LayerCosts) -> LayerCosts:
        """These costs and others."""
        return LayerCosts({**self.tables, **other.tables}, {**self.rest, **other.rest})


def only(table: Mapping[str, Mapping[int, float]], widths: Sequence[int]) -> Table:
    """A table with these bits alone, where layers have a choice."""
    return {
        layer: {bits: value for bits, value in of.items() if bits in widths or len(of) == 1}
        for layer, of in table.items()
    }


def uniform_configs(base: BitConfig, free: tuple[str, ...], widths: tuple[int, ...]) -> dict[int, BitConfig]:
    """``{bits: all free layers at these bits, for weights and inputs}``, the others as in ``base``."""
    return {bits: base.replace({layer: LayerBits(bits, bits) for layer in free}) for bits in widths}


def static_costs(graphs: Mapping[int, IntegerGraph], configs: Mapping[int, BitConfig], reader: OpReader) -> LayerCosts:
    """Size (bytes), bit operations (HAWQ-V3, section III-E) and mean bits of weights: what follows from the graphs.

    No network is larger than its sum: it counts a requantization for every reader of a tensor beyond the first.

    Args:
        graphs: ``{bits: the lowered network}``, of each of ``configs``.
        configs: of :func:`uniform_configs`.
        reader: of the float network, for the tensors that layers share.
    """
    tables: dict[str, Table] = {SIZE: {}, BOPS: {}, MEAN_BITS: {}}
    counts: dict[str, int] = {}
    rest = 0.0
    for width, graph in graphs.items():
        own = {SIZE: dict[str, float](), BOPS: dict[str, float]()}
        for node in graph:
            if not isinstance(node, Layer | FloatLayer) or node.layer not in configs[width]:
                continue
            layer = node.layer
            bits = _label(configs[width], layer)
            own[SIZE][layer] = own[SIZE].get(layer, 0.0) + node_bytes(node)
            own[BOPS][layer] = own[BOPS].get(layer, 0.0) + node_macs(node) * bits * bits
            counts[layer] = node.weight.numel()
        for cost, values in own.items():
            for layer, value in values.items():
                tables[cost].setdefault(layer, {})[_label(configs[width], layer)] = value
        rest = max(rest, graph.size_bytes - sum(own[SIZE].values()))
    rest += (MULTIPLIER_BYTES + SHIFT_BYTES) * sum(max(0, len(c) - 1) for c in reader.consumers.values())
    for layer, of in tables[SIZE].items():
        tables[MEAN_BITS][layer] = {bits: bits * counts[layer] / sum(counts.values()) for bits in of}
    return LayerCosts(tables, {SIZE: rest, BOPS: 0.0, MEAN_BITS: 0.0})


def latency_costs(
    graphs: Mapping[int, IntegerGraph],
    configs: Mapping[int, BitConfig],
    reader: OpReader,
    options: BuildOptions,
    device: Device,
    sizes: Mapping[str, Mapping[int, float]],
    whole_us: Callable[[int, IntegerGraph], float],
    candidates: int = 4,
    tune_s: float = 20.0,
    tell: Callable[[str], None] = lambda what: None,
) -> LayerCosts:
    """Microseconds of the device.

    Args:
        graphs, configs: as for :func:`static_costs`; the widest integer network is the reference.
        reader: of the float network, for the tensors that layers share.
        options: what kernels are compiled for.
        device: measures, and keeps what it measured.
        sizes: of :func:`static_costs`, bytes.
        whole_us: builds and measures a network of these bits, with the best knobs known, and says its latency.
        candidates: knobs that are tried of each kernel, on average.
        tune_s: seconds for them at each width; each kernel is measured with its default knobs at least.
        tell: told what is being measured.

    Raises:
        ConfigError: no integer network.
        MeasurementError: a kernel could not be measured.
    """
    integer = [bits for bits in graphs if bits != FLOAT_BITS]
    if not integer:
        raise ConfigError(f"latencies by layer need an integer network to refer to, got {sorted(graphs)} bits alone")
    reference = max(integer)
    kernels: dict[int, dict[str, float]] = {}
    whole: dict[int, float] = {}
    for width, graph in sorted(graphs.items(), reverse=True):
        tell(f"measuring kernels of {width} bit")
        tune(graph, options, candidates, tune_s, device)
        kernels[width] = {}
        calls = Counter(call.layer for call in make_plan(graph, options).calls)
        for kernel in tune(graph, options, 1, None, device).kernels:  # what is known is not measured again
            if kernel.best_us is None:
                raise MeasurementError(
                    f"the kernel of {', '.join(kernel.layers)} at {width} bit has no latency: none of {kernel.known} "
                    "knobs worked; python train.py recipe=tune says why"
                )
            kernels[width].update(
                {layer: kernel.best_us * calls[layer] for layer in kernel.layers if layer in configs[width]}
            )
        tell(f"measuring the network of {width} bit")
        whole[width] = whole_us(width, graph)
    table: Table = {}
    for width in graphs:
        config = configs[width]
        free = [layer for layer in kernels[width] if config[layer] != configs[reference][layer] or width == reference]
        change = sum(kernels[width][layer] - kernels[reference].get(layer, 0.0) for layer in free)
        beyond = whole[width] - whole[reference] - change
        parts = converted_inputs(reader, config) if beyond > 0 and width != FLOAT_BITS else {}
        shares = {layer: parts.get(layer, 0.0) for layer in free}
        if not any(shares.values()):
            shares = {
                layer: abs(_size(sizes, configs, layer, width) - _size(sizes, configs, layer, reference))
                for layer in free
            }
        total = sum(shares.values()) or 1.0
        for layer in kernels[width]:
            if width == reference:
                value = kernels[width][layer]
            elif layer in shares:
                value = kernels[width][layer] + beyond * shares[layer] / total
            else:
                continue
            table.setdefault(layer, {})[_label(config, layer)] = value
    for layer in configs[reference]:  # those without a kernel of their own cost nothing that bits change
        table.setdefault(layer, dict.fromkeys({_label(config, layer) for config in configs.values()}, 0.0))
    rest = whole[reference] - sum(of[_label(configs[reference], layer)] for layer, of in table.items())
    return LayerCosts({LATENCY: table}, {LATENCY: rest})


def _size(sizes: Mapping[str, Mapping[int, float]], configs: Mapping[int, BitConfig], layer: str, width: int) -> float:
    return sizes.get(layer, {}).get(_label(configs[width], layer), 0.0)


def converted_inputs(reader: OpReader, bits: BitConfig) -> dict[str, float]:
    """``{layer: elements of its input that are requantized for it}``: of tensors that others read at more bits.
    Layers that read one such tensor at the same bits share it.
    """
    by_tensor: dict[fx.Node, dict[int, list[str | None]]] = {}
    for (tensor, consumer), width in plan(reader, bits).items():
        name = origin(consumer).label if reader[consumer].kind == "layer" else None
        by_tensor.setdefault(tensor, {}).setdefault(width, []).append(name)
    found: dict[str, float] = {}
    for tensor, widths in by_tensor.items():
        elements = math.prod(extent or 1 for extent in origin(tensor).shape[1:])
        for width, names in widths.items():
            if width == max(widths):
                continue
            for name in names:
                if name is not None:
                    found[name] = found.get(name, 0.0) + elements / len(names)
    return found


def _label(config: BitConfig, layer: str) -> int:
    weight = config[layer].weight
    assert isinstance(weight, int)
    return weight
