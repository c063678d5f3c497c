"""Our kernels beside the peers' own profiles, layer by layer.

A layer is a convolution or linear layer of the float network with all that an engine fuses into it (bias, activation,
requantization, residual sum). Peers name their nodes after the ONNX graph's, which is exported from the same network:
its i-th convolution or matrix product is the network's i-th layer.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_baqe.errors import ConfigError

INPUT, POOL, REST = "input", "pool", "rest"
KINDS = ("stem", "3x3", "1x1", "depthwise", "other conv", "linear", INPUT, POOL, REST)
_LAYERS = ("Conv", "Gemm", "MatMul")
_ACTIVATIONS = ("Relu", "Clip", "HardSwish", "Sigmoid")
_NOT_LAYERS = ("Reorder",)  # OpenVINO names what converts between two layers' layouts after both


@dataclass
class Layer:
    """A layer of the float network.

    Args:
        name: path of the module.
        kind: of :data:`KINDS`; the stem is the first convolution.
        macs: multiply-accumulates for one image.
        aliases: what ONNX calls it and the activation after it.
    """

    name: str
    kind: str
    macs: int
    aliases: set[str]


def network_layers(module: nn.Module, onnx_file: Path, size: int) -> list[Layer]:
    """The layers of a network in the order of execution; ConfigError where the ONNX graph has not as many."""
    import onnx

    names = {part: name for name, part in module.named_modules()}
    layers: list[Layer] = []

    def note(part: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        weight = part.weight
        assert isinstance(weight, torch.Tensor)
        macs = output[0, 0].numel() * weight.numel() if isinstance(part, nn.Conv2d) else weight.numel()
        layers.append(Layer(names[part], _kind(part, first=not layers), macs, set()))

    hooks = [part.register_forward_hook(note) for part in module.modules() if isinstance(part, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        module(torch.zeros(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    nodes = list(onnx.load(str(onnx_file)).graph.node)
    found = [node for node in nodes if node.op_type in _LAYERS]
    if len(found) != len(layers):
        raise ConfigError(
            f"{onnx_file} has {len(found)} convolutions and matrix products, the network {len(layers)} layers: "
            "leave --layers out"
        )
    readers: dict[str, list[Any]] = {}
    for node in nodes:
        for value in node.input:
            readers.setdefault(value, []).append(node)
    for layer, node in zip(layers, found, strict=True):
        layer.aliases |= {node.name, *node.output}
        after = readers.get(node.output[0], [])
        if len(after) == 1 and after[0].op_type in _ACTIVATIONS:
            layer.aliases |= {after[0].name, *after[0].output}
    return layers


def _kind(part: nn.Module, first: bool) -> str:
    if isinstance(part, nn.Linear):
        return "linear"
    assert isinstance(part, nn.Conv2d)
    if first:
        return "stem"
    if part.groups == part.in_channels > 1:
        return "depthwise"
    kind = f"{part.kernel_size[0]}x{part.kernel_size[1]}"
    return kind if kind in KINDS else "other conv"


def assign(rows: list[dict[str, Any]], layers: list[Layer]) -> list[dict[str, Any]]:
    """Add ``"layer"``, None for what is none, and ``"kind"`` to each row of an engine's profile.

    A row is a layer's if one of its names is the layer's, or starts with one of the layer's aliases; of several the
    longest counts. What runs before the first layer is of the kind ``"input"``.
    """
    aliases = {alias: layer for layer in layers for alias in layer.aliases}
    by_name = {layer.name: layer for layer in layers}
    assigned = []
    started = False
    for row in rows:
        layer = None
        if row["op"] not in _NOT_LAYERS:
            exact = [by_name[name] for name in row["names"] if name in by_name]
            starts = [(len(a), a) for a in aliases for name in row["names"] if name.startswith(a)]
            layer = exact[0] if exact else aliases[max(starts)[1]] if starts else None
        started = started or layer is not None
        pools = "pool" in row["op"].lower() or "reducemean" in row["op"].lower()
        other = INPUT if not started else POOL if pools else REST
        assigned.append({**row, "layer": layer.name if layer else None, "kind": layer.kind if layer else other})
    return assigned


def median_rows(bursts: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of one engine, each with the median over its bursts."""
    taken: dict[tuple[str, int], list[float]] = {}
    for rows in bursts:
        for key, row in _numbered(rows):
            taken.setdefault(key, []).append(row["us"])
    return [{**row, "us": statistics.median(taken[key])} for key, row in _numbered(bursts[0])]


def _numbered(rows: list[dict[str, Any]]) -> Iterator[tuple[tuple[str, int], dict[str, Any]]]:
    """Rows with a key of their own: two layers may share a kernel."""
    seen: Counter[str] = Counter()
    for row in rows:
        yield (row["name"], seen[row["name"]]), row
        seen[row["name"]] += 1


def layer_rows(profiles: dict[str, list[dict[str, Any]]], layers: list[Layer]) -> list[dict[str, Any]]:
    """One row a layer, of ``{engine: its rows, assigned}``.

    Returns ``{"layer", "kind", "macs", "us": {engine: sum of its rows of the layer, None if it has none}}``.
    """
    rows = []
    for layer in layers:
        own = {engine: [row["us"] for row in of if row["layer"] == layer.name] for engine, of in profiles.items()}
        us = {engine: sum(taken) if taken else None for engine, taken in own.items()}
        rows.append({"layer": layer.name, "kind": layer.kind, "macs": layer.macs, "us": us})
    return rows


def kind_rows(profiles: dict[str, list[dict[str, Any]]], layers: list[Layer]) -> list[dict[str, Any]]:
    """One row a kind, as :func:`layer_rows`, and their sum."""
    rows = []
    for kind in KINDS:
        us = {engine: sum(r["us"] for r in assigned if r["kind"] == kind) for engine, assigned in profiles.items()}
        if any(us.values()):
            macs = sum(layer.macs for layer in layers if layer.kind == kind)
            rows.append({"layer": f"all {kind}", "kind": kind, "macs": macs, "us": us})
    total = {engine: sum(row["us"] for row in assigned) for engine, assigned in profiles.items()}
    return [*rows, {"layer": "sum", "kind": "", "macs": sum(layer.macs for layer in layers), "us": total}]
