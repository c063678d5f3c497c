"""Integer graphs as a JSON-able description and plain arrays, weights packed to their bits. No pickle.

A tensor field of a node is described by ``{"array": name, "form": ..., "bits": ..., "shape": ...}``; packed weights are
two's complement, little endian within and across bytes: two 4-bit weights per byte, the first in the low nibble. The
schema of a node follows from its class: :func:`_schema` reads the types of its fields.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, Strict, TypeAdapter, create_model

from lightning_baqe.errors import BaqeError, ConfigError, DataError
from lightning_baqe.files import check_schema
from lightning_baqe.integer.dyadic import Dyadic
from lightning_baqe.integer.graph import IntegerGraph
from lightning_baqe.integer.nodes import NODE_TYPES, Layer, Node, TensorType

FORMAT_VERSION = 3
_UNION: Any = typing.Union  # of types that are known when it runs
_TUPLE: Any = tuple


def pack_bits(values: torch.Tensor, bits: int | tuple[int, ...]) -> np.ndarray:
    """Integers of ``bits`` signed bits as a dense bit string.

    Args:
        values: int64, any shape, each within ``-2^(bits-1) .. 2^(bits-1) - 1``.
        bits: 1 to 32; or one such number for each entry of the first dimension.

    Returns:
        uint8, of as many bytes as all bits take, rounded up; each value lies behind the one before it, least
        significant bit first: value i occupies bits ``i * bits`` and up.

    Raises:
        ConfigError: a value does not fit, or bits are out of range.
    """
    if isinstance(bits, tuple):
        if len(bits) != len(values):
            raise ConfigError(f"{len(bits)} numbers of bits for the {len(values)} channels of the values")
        planes = (
            np.unpackbits(pack_bits(row, width), count=row.numel() * width, bitorder="little")
            for row, width in zip(values, bits, strict=True)
        )
        return np.packbits(np.concatenate(list(planes)), bitorder="little")
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


def unpack_bits(packed: np.ndarray, bits: int | tuple[int, ...], count: int) -> torch.Tensor:
    """The inverse of :func:`pack_bits`: int64, shape ``(count,)``. ConfigError where the array has another length than
    ``count`` values take.
    """
    by_channel = bits if isinstance(bits, tuple) else (bits,)
    for width in by_channel:
        _check_width(width)
    each, left = divmod(count, len(by_channel))
    if left:
        raise ConfigError(f"{count} values are no channels of {len(by_channel)}; the file is damaged")
    wanted = (each * sum(by_channel) + 7) // 8
    if packed.dtype != np.uint8 or packed.shape != (wanted,):
        raise ConfigError(
            f"{count} values of {bits} bits are {wanted} bytes of uint8, got {packed.dtype} of shape {packed.shape}; "
            "the file is damaged or of another graph"
        )
    if isinstance(bits, tuple):
        parts = np.split(np.unpackbits(packed, bitorder="little"), np.cumsum([each * width for width in bits]))
        rows = (
            unpack_bits(np.packbits(row, bitorder="little"), width, each)
            for row, width in zip(parts, bits, strict=False)  # behind the last are bits that fill a byte
        )
        return torch.cat(list(rows))
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
    bits = {layer: _lists(pair) for layer, pair in graph.bits.items()}
    returned = None if graph.returned is None else list(graph.returned)
    return {"version": FORMAT_VERSION, "bits": bits, "nodes": nodes, "returned": returned}, arrays


def graph_from_parts(
    description: Any, arrays: Mapping[str, np.ndarray], name: str = "the integer graph"
) -> IntegerGraph:
    """The graph that :func:`graph_to_parts` described, equal in every number, and proven.

    Args:
        description: as JSON has it.
        arrays: an opened ``.npz`` will do.
        name: what messages call it: the file.

    Raises:
        DataError: another version, a field of another type, missing or damaged arrays, or a graph that is not what it
            says; names the node.
    """
    version = description.get("version") if isinstance(description, Mapping) else None
    if version != FORMAT_VERSION:
        raise DataError(f"{name} has version {version!r}, this release reads version {FORMAT_VERSION}")
    parts = check_schema(_schema(), description, name, "take an undamaged copy, or the release that wrote it")
    try:
        return IntegerGraph(tuple(_restore(entry, arrays) for entry in parts.nodes), parts.bits, parts.returned)
    except BaqeError as error:
        raise DataError(f"{name}: {error}") from error


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class _Plain(_Part):
    array: str
    form: Literal["float32", "int32", "int64", "bool"]


_Width = Annotated[int, Field(ge=1, le=32)]
_Widths = Annotated[tuple[_Width, ...], Strict(False), Field(min_length=1)]


class _Packed(_Part):
    array: str
    form: Literal["packed"]
    bits: _Width | _Widths
    shape: Annotated[tuple[Annotated[int, Field(gt=0)], ...], Strict(False)]


_Array = Annotated[_Plain | _Packed, Field(discriminator="form")]


class _Factors(_Part):
    multiplier: _Array
    shift: int


class _Tensors(_Part):
    tensors: dict[str, _Array]


_LayerWidth = Annotated[int, Field(ge=2, le=32)]
_Bits = Annotated[
    tuple[_LayerWidth | Annotated[tuple[_LayerWidth, ...], Strict(False), Field(min_length=1)], _LayerWidth],
    Strict(False),
]


class _Graph(_Part):
    version: int
    bits: dict[str, _Bits]
    nodes: list[Any]
    returned: Annotated[tuple[int, ...], Strict(False)] | None


@functools.cache
def _schema() -> TypeAdapter[_Graph]:
    """Of a graph's description; every node has exactly the fields of its class, each of the type that it has there."""
    type_fields: dict[str, Any] = {
        name: (_stored(kind), ...) for name, kind in typing.get_type_hints(TensorType).items()
    }
    stored_type = create_model("_Type", __base__=_Part, **type_fields)
    models = []
    for kind, cls in NODE_TYPES.items():
        hints = {name: hint for name, hint in typing.get_type_hints(cls).items() if name != "kind"}
        fields = {name: (stored_type if hint is TensorType else _stored(hint), ...) for name, hint in hints.items()}
        models.append(create_model(cls.__name__, __base__=_Part, kind=(Literal[kind], ...), **fields))  # type: ignore[call-overload]
    node: Any = Annotated[_UNION[tuple(models)], Field(discriminator="kind")]
    graph = create_model("Graph", __base__=_Graph, nodes=(list[node], ...))
    return TypeAdapter(graph)


def _stored(hint: Any) -> Any:
    """How a field of a node is stored, by its type."""
    replaced = {torch.Tensor: _Array, Dyadic: _Factors, Mapping[str, torch.Tensor]: _Tensors}
    if hint in replaced:
        return replaced[hint]
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _UNION[tuple(map(_stored, parts))]
    if origin is tuple:
        return Annotated[_TUPLE[tuple(part if part is ... else _stored(part) for part in parts)], Strict(False)]
    return hint


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
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _store(value: torch.Tensor, bits: int | tuple[int, ...], key: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    if not value.is_floating_point() and bits != 32:
        arrays[key] = pack_bits(value, bits)
        return {"array": key, "form": "packed", "bits": _lists(bits), "shape": list(value.shape)}
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


def _load(entry: _Plain | _Packed, arrays: Mapping[str, np.ndarray]) -> torch.Tensor:
    key = entry.array
    if key not in arrays:
        raise ConfigError(f"array {key!r} is missing; the file is damaged or of another graph")
    array = np.asarray(arrays[key])
    if isinstance(entry, _Packed):
        return unpack_bits(array, entry.bits, math.prod(entry.shape)).reshape(entry.shape)
    if array.dtype != entry.form:
        raise ConfigError(f"array {key!r} must be {entry.form}, got {array.dtype}; the file is damaged")
    tensor = torch.from_numpy(array.copy())
    return tensor if entry.form in ("float32", "bool") else tensor.to(torch.int64)


def _restore(entry: Any, arrays: Mapping[str, np.ndarray]) -> Node:
    cls = NODE_TYPES[entry.kind]
    fields = {item.name: _value(getattr(entry, item.name), arrays) for item in dataclasses.fields(cls)}
    fields["type"] = TensorType(**dict(entry.type))
    return cls(**fields)


def _value(value: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    match value:
        case _Plain() | _Packed():
            return _load(value, arrays)
        case _Factors():
            return Dyadic(_load(value.multiplier, arrays), value.shift)
        case _Tensors():
            return {name: _load(part, arrays) for name, part in value.tensors.items()}
    return _tuples(value)
