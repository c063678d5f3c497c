"""Integer graphs as a JSON-able description and plain arrays, weights packed to their bits. No pickle.

A tensor field of a node is described by ``{"array": name, "form": ..., "bits": ..., "shape": ...}``; packed weights are
two's complement, little endian within and across bytes: two 4-bit weights per byte, the first in the low nibble.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from lightning_baqe.errors import ConfigError
from lightning_baqe.integer.dyadic import Dyadic
from lightning_baqe.integer.graph import IntegerGraph
from lightning_baqe.integer.nodes import NODE_TYPES, Layer, Node, TensorType

FORMAT_VERSION = 3


def pack_bits(values: torch.Tensor, bits: int) -> np.ndarray:
    """Integers of ``bits`` signed bits as a dense bit string.

    Args:
        values: int64, any shape, each within ``-2^(bits-1) .. 2^(bits-1) - 1``.
        bits: 1 to 32.

    Returns:
        uint8, shape ``(ceil(numel * bits / 8),)``; value i occupies bits ``i * bits`` and up, least significant first.

    Raises:
        ConfigError: a value does not fit, or bits are out of range.
    """
    _check_width(bits)
    flat = values.detach().cpu().reshape(-1).to(torch.int64).numpy()
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    if flat.size and (flat.min() < low or flat.max() > high):
        raise ConfigError(
            f"values {flat.min()}..{flat.max()} do not fit {bits} signed bits, {low}..{high}; pack them with more bits"
        )
    if bits == 8:
        return flat.astype(np.int8).view(np.uint8)
    octets = np.ascontiguousarray(flat, dtype="<i8").view(np.uint8).reshape(-1, 8)[:, : (bits + 7) // 8]
    return np.packbits(np.unpackbits(octets, axis=1, count=bits, bitorder="little").reshape(-1), bitorder="little")


def unpack_bits(packed: np.ndarray, bits: int, count: int) -> torch.Tensor:
    """The inverse of :func:`pack_bits`: int64, shape ``(count,)``. ConfigError where the array has another length than
    ``count`` values take.
    """
    _check_width(bits)
    wanted = (count * bits + 7) // 8
    if packed.dtype != np.uint8 or packed.shape != (wanted,):
        raise ConfigError(
            f"{count} values of {bits} bits are {wanted} bytes of uint8, got {packed.dtype} of shape {packed.shape}; "
            "the file is damaged or of another graph"
        )
    if bits == 8:
        return torch.from_numpy(packed.view(np.int8).astype(np.int64))
    planes = np.unpackbits(packed, count=count * bits, bitorder="little").reshape(count, bits)
    octets = np.zeros((count, 4), np.uint8)
    octets[:, : (bits + 7) // 8] = np.packbits(planes, axis=1, bitorder="little")
    sign = np.uint32(1 << (bits - 1))  # two's complement: the top bit counts negative
    return torch.from_numpy(((octets.view("<u4").reshape(-1) ^ sign) - sign).view("<i4").astype(np.int64))


def graph_to_parts(graph: IntegerGraph) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Describe a graph: ``(JSON-able description, arrays by name)``."""
    arrays: dict[str, np.ndarray] = {}
    nodes = [_describe(node, index, arrays) for index, node in enumerate(graph.nodes)]
    bits = {layer: list(pair) for layer, pair in graph.bits.items()}
    returned = None if graph.returned is None else list(graph.returned)
    return {"version": FORMAT_VERSION, "bits": bits, "nodes": nodes, "returned": returned}, arrays


def graph_from_parts(description: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> IntegerGraph:
    """The graph that :func:`graph_to_parts` described, equal in every number; ``arrays`` may be an opened ``.npz``.

    ConfigError for another version, an unknown kind of node, missing or damaged arrays.
    """
    version = description.get("version")
    if version != FORMAT_VERSION:
        raise ConfigError(f"integer graph of version {version!r}, this release reads version {FORMAT_VERSION}")
    nodes = tuple(_restore(entry, arrays) for entry in description["nodes"])
    bits = {layer: (int(pair[0]), int(pair[1])) for layer, pair in description["bits"].items()}
    returned = description["returned"]
    return IntegerGraph(nodes, bits, None if returned is None else tuple(map(int, returned)))


def _check_width(bits: int) -> None:
    if not 1 <= bits <= 32:
        raise ConfigError(f"packed integers have 1 to 32 bits, got {bits}")


def _describe(node: Node, index: int, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    entry: dict[str, Any] = {"kind": node.kind}
    for item in dataclasses.fields(node):
        value = getattr(node, item.name)
        key = f"{index}.{item.name}"
        if isinstance(value, TensorType):
            value = dataclasses.asdict(value) | {"shape": list(value.shape)}
        elif isinstance(value, Dyadic):
            value = {"multiplier": _store(value.multiplier, 32, key, arrays), "shift": value.shift}
        elif isinstance(value, torch.Tensor):
            width = node.weight_bits if isinstance(node, Layer) and item.name == "weight" else 32
            value = _store(value, width, key, arrays)
        elif isinstance(value, Mapping):
            value = {"tensors": {name: _store(part, 32, f"{key}.{name}", arrays) for name, part in value.items()}}
        elif isinstance(value, tuple):
            value = _lists(value)
        entry[item.name] = value
    return entry


def _lists(value: Any) -> Any:
    return [_lists(part) for part in value] if isinstance(value, tuple | list) else value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(part) for part in value) if isinstance(value, list) else value


def _store(value: torch.Tensor, bits: int, key: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    if not value.is_floating_point() and bits < 32:
        arrays[key] = pack_bits(value, bits)
        return {"array": key, "form": "packed", "bits": bits, "shape": list(value.shape)}
    form = "float32"
    if value.dtype == torch.bool:
        form = "bool"
    elif not value.is_floating_point():
        fits = value.numel() == 0 or -(2**31) <= int(value.min()) <= int(value.max()) < 2**31
        form = "int32" if fits else "int64"
    elif value.dtype != torch.float32:
        raise ConfigError(f"array {key!r}: float constants are float32, got {value.dtype}")
    arrays[key] = value.detach().cpu().numpy().astype(form)
    return {"array": key, "form": form}


def _load(entry: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> torch.Tensor:
    key, form = entry["array"], entry["form"]
    if key not in arrays:
        raise ConfigError(f"array {key!r} is missing; the file is damaged or of another graph")
    if form == "packed":
        shape = tuple(entry["shape"])
        count = int(np.prod(shape, dtype=np.int64))
        return unpack_bits(np.asarray(arrays[key]), entry["bits"], count).reshape(shape)
    if form not in ("float32", "int32", "int64", "bool"):
        raise ConfigError(f"array {key!r} has the unknown form {form!r}; this release may be too old for the file")
    array = np.asarray(arrays[key])
    if array.dtype != form:
        raise ConfigError(f"array {key!r} must be {form}, got {array.dtype}; the file is damaged or of another graph")
    tensor = torch.from_numpy(array.copy())
    return tensor if form in ("float32", "bool") else tensor.to(torch.int64)


def _restore(entry: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Node:
    kind = entry.get("kind")
    if kind not in NODE_TYPES:
        raise ConfigError(
            f"unknown kind of node {kind!r}, known are {sorted(NODE_TYPES)}; is the file of a later release?"
        )
    cls = NODE_TYPES[kind]
    names = {item.name for item in dataclasses.fields(cls)}
    if (given := set(entry) - {"kind"}) != names:
        raise ConfigError(f"a node of kind {kind!r} has the fields {sorted(names)}, got {sorted(given)}")
    fields: dict[str, Any] = {}
    for name in names:
        value = entry[name]
        if name == "type":
            value = TensorType(**{**value, "shape": tuple(value["shape"])})
        elif isinstance(value, Mapping) and "multiplier" in value:
            value = Dyadic(_load(value["multiplier"], arrays), value["shift"])
        elif isinstance(value, Mapping) and "tensors" in value:
            value = {key: _load(part, arrays) for key, part in value["tensors"].items()}
        elif isinstance(value, Mapping):
            value = _load(value, arrays)
        elif isinstance(value, list):
            value = _tuples(value)
        fields[name] = value
    return cls(**fields)
