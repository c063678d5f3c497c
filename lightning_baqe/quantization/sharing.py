"""Which layers read the same tensors, and what else reads them: where different bits bring conversions."""

from __future__ import annotations

import torch
from torch import fx, nn

from lightning_baqe.quantization.aten import origin
from lightning_baqe.quantization.config import BitConfig
from lightning_baqe.quantization.convert import plan
from lightning_baqe.quantization.ops import OpReader
from lightning_baqe.quantization.trace import trace

Shared = tuple[tuple[str, ...], tuple[int, ...]]


def shared_tensors(network: nn.Module, example: torch.Tensor, bits: BitConfig) -> list[Shared]:
    """The tensors that something else than one layer alone reads.

    Each bit-width that such a tensor is read at, beyond the first, is one more conversion.

    Args:
        network: float.
        example: a batch ``(n, channels, height, width)``.
        bits: with no float layer, of which only those of residual sums and other operators count.

    Returns:
        For each tensor the layers that read it, and the different bits that other operators read it at.

    Raises:
        UnsupportedModelError: the network cannot be traced.
    """
    graph = trace(network, (example.expand(2, *example.shape[1:])[:2] if len(example) < 2 else example[:2],))
    return shared_in(OpReader(graph, graph.graph), bits)


def shared_in(reader: OpReader, bits: BitConfig) -> list[Shared]:
    """As :func:`shared_tensors`, of a traced network."""
    layers: dict[fx.Node, dict[str, None]] = {}
    others: dict[fx.Node, set[int]] = {}
    for (tensor, consumer), width in plan(reader, bits).items():
        layers.setdefault(tensor, {})
        others.setdefault(tensor, set())
        if reader[consumer].kind == "layer":
            layers[tensor][origin(consumer).label] = None
        else:
            others[tensor].add(width)
    return [
        (tuple(names), tuple(sorted(others[tensor])))
        for tensor, names in layers.items()
        if names and len(names) + len(others[tensor]) > 1
    ]
