"""A float network and its quantized twin, computed side by side, node after node, on the same data.

Each layer can so be changed on what the changed layers before it give, at the cost of one pass.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from lightning_baqe.quantization.activation import ActivationQuantizer
from lightning_baqe.quantization.convert import QuantizedModel
from lightning_baqe.quantization.layers import QuantLayer
from lightning_baqe.quantization.weight import WeightQuantizer

Values = list[torch.Tensor]  # a tensor for each batch


@dataclass(frozen=True)
class Place:
    """A quantized layer on the walk.

    Args:
        node: its call.
        layer: of the quantized network; may be changed now.
        float_input, float_output: what the float network has there.
        input: what the quantized network has there.
    """

    node: fx.Node
    layer: QuantLayer
    float_input: Values
    float_output: Values
    input: Values

    def output(self) -> Values:
        """What the layer gives as it is now."""
        return [self.layer(x) for x in self.input]


def float_twin(model: QuantizedModel) -> fx.GraphModule:
    """A copy that rounds nothing: the float network by the same graph."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, ActivationQuantizer | WeightQuantizer):
            parent, _, leaf = name.rpartition(".")
            setattr(twin.get_submodule(parent), leaf, nn.Identity())
    return twin


class Walk:
    """A network computed node after node, on several batches, without gradients and in its present mode.

    What a node gives is held in memory until its last reader has run.

    Args:
        model: its graph is walked.
        batches: the network's inputs, each a tensor for each input.
    """

    def __init__(self, model: fx.GraphModule, batches: Sequence[tuple[torch.Tensor, ...]]) -> None:
        self._runs = [fx.Interpreter(model) for _ in batches]
        for run, inputs in zip(self._runs, batches, strict=True):
            run.env, run.args_iter = {}, iter(inputs)
        last_reader = {source: node for node in model.graph.nodes for source in node.all_input_nodes}
        self._done: dict[fx.Node, list[fx.Node]] = {}
        for source, reader in last_reader.items():
            self._done.setdefault(reader, []).append(source)

    def step(self, node: fx.Node) -> None:
        """Compute a node, whose inputs were computed and are not dropped."""
        with torch.no_grad():
            for run in self._runs:
                run.env[node] = run.run_node(node)

    def drop(self, node: fx.Node) -> None:
        """Forget what nothing reads once this node was computed."""
        for source in self._done.get(node, []):
            for run in self._runs:
                del run.env[source]

    def values(self, node: fx.Node) -> Values:
        """What a node gave."""
        return [run.env[node] for run in self._runs]


def side_by_side(model: QuantizedModel, batches: Sequence[tuple[torch.Tensor, ...]]) -> Iterator[Place]:
    """The quantized layers in network order; each may be changed before the next is asked for.

    Layers that the network calls more than once are passed over. Both networks run in their present modes, without
    gradients.

    Args:
        model: calibrated.
        batches: the network's inputs, each a tensor for each input.
    """
    twin = float_twin(model)
    calls = [str(node.target) for node in model.graph.nodes if node.op == "call_module"]
    here, there = Walk(model, batches), Walk(twin, batches)
    # Both graphs have the same nodes in the same order.
    twins = dict(zip(model.graph.nodes, twin.graph.nodes, strict=True))
    for node, other in twins.items():
        if node.op == "output":
            return
        there.step(other)
        layer = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, QuantLayer) and calls.count(str(node.target)) == 1:
            source = node.all_input_nodes[0]
            yield Place(node, layer, there.values(twins[source]), there.values(other), here.values(source))
        here.step(node)
        here.drop(node)
        there.drop(other)


def channel_mean(values: Values, channel: int) -> torch.Tensor:
    """Mean over everything but the channels, float64 ``(channels,)``; ``channel`` is their dimension."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for value in values:
        by_channel = value.detach().transpose(0, channel).flatten(1)
        total = total + by_channel.double().sum(1).cpu()
        count += by_channel.shape[1]
    return total / max(count, 1)
