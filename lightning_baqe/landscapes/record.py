"""What a landscape's file holds: one gzipped JSON object, :class:`Record`."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, Strict, TypeAdapter, model_validator

from lightning_baqe.errors import DataError
from lightning_baqe.files import MIB, check_schema, parse_json, read_file, replace_file, unpack_gzip
from lightning_baqe.tuning.network_space import SpaceRecord

FORMAT = 1
_MOST_BYTES = {"packed": 64 * MIB, "unpacked": 512 * MIB}

_Time = Annotated[float, Field(ge=0)]
_WidthKey = Annotated[str, Field(pattern=r"^([2-8]|32)$")]
_Positive = Annotated[int, Field(ge=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class _Reference(_Part):
    latency_us: Annotated[float, Field(gt=0)]
    size_bytes: _Positive


class _Size(_Part):
    layers: dict[str, dict[_WidthKey, Annotated[int, Field(ge=0)]]]
    operators: dict[str, Annotated[int, Field(ge=0)]]


class _Kernel(_Part):
    """Of all knobs, in the order of the space's grid."""

    latency_us: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)]
    seconds: _Time


class _Latency(_Part):
    kernels: list[_Kernel]
    of: dict[str, dict[_WidthKey, Annotated[int, Field(ge=0)]]]
    pixels: dict[str, _Time]
    correction: dict[str, float]
    spread: _Time


class _Accuracy(_Part):
    model: dict[str, JsonValue]
    layers: list[str]
    spread: _Time
    check: dict[str, JsonValue]


class _Seconds(_Part):
    train: _Time
    build: _Time
    measure: _Time


class Record(_Part):
    """A landscape as its file has it.

    Attributes:
        input_shape: of one image.
        space: what was measured; ``reference``: the float network's figures.
        latency: of every kernel with all knobs of the grid; ``of``: ``{layer: {bits: which kernel}}``; ``pixels``: of
            kernels without knobs; ``correction``: from the sum to whole networks.
        scores: ``{layer: {bits: sensitivity}}``.
        seconds: that a trial takes.
        about: CPU, versions, command, date, and what was found on held-out data.
    """

    format: Literal[1]
    name: str
    network: str
    num_classes: _Positive
    input_shape: Annotated[tuple[_Positive, _Positive, _Positive], Strict(False)]
    space: SpaceRecord
    reference: _Reference
    size: _Size
    latency: _Latency
    accuracy: _Accuracy
    scores: dict[str, dict[_WidthKey, float]] = {}
    seconds: _Seconds
    about: dict[str, JsonValue]

    @model_validator(mode="after")
    def _tables_are_whole(self) -> Record:
        for layer, by_bits in self.latency.of.items():
            points = math.prod(len(values) for values in self.space.knobs.get(layer, {}).values())
            for bits, index in by_bits.items():
                found = len(self.latency.kernels[index].latency_us) if index < len(self.latency.kernels) else 0
                if found != points:
                    raise ValueError(f"{layer} at {bits} bit has {points} choices of knobs, its kernel {found} figures")
        searched = set(self.space.bit_choices) | set(self.space.defaults)
        if missing := searched - set(self.latency.of):
            raise ValueError(f"{sorted(missing)[:3]} are searched, but not measured")
        parts = {
            "size.layers": set(self.size.layers) ^ set(self.latency.of),
            "accuracy.layers": set(self.accuracy.layers) - set(self.latency.of),
            "scores": set(self.scores) - set(self.latency.of),
            "space.knobs": set(self.space.knobs) - set(self.latency.of),
        }
        for part, strange in parts.items():
            if strange:
                raise ValueError(f"{part} and latency.of have different layers: {sorted(strange)[:3]}")
        for layer, choices in self.space.bit_choices.items():
            known = self.space.defaults.get(layer, {}).keys() & self.latency.of[layer].keys()
            if lacking := sorted({str(bits) for bits in choices} - known):
                raise ValueError(f"{layer} is searched at {', '.join(lacking)} bit, but not measured there")
        return self


_SCHEMA = TypeAdapter(Record)


def read(path: Path) -> dict[str, Any]:
    """What a file holds, checked.

    Raises:
        DataError: it is damaged, of another version or another schema; says where.
    """
    content = unpack_gzip(read_file(path, _MOST_BYTES["packed"]), _MOST_BYTES["unpacked"], str(path))
    found = parse_json(content, str(path))
    version = found.get("format") if isinstance(found, dict) else None
    if version != FORMAT:
        raise DataError(
            f"the landscape {path} has format {version!r}, this version reads {FORMAT}: measure it again "
            "(python -m lightning_baqe.benchmarks.landscape), or use the version that wrote it"
        )
    check_schema(_SCHEMA, found, str(path), "take an undamaged copy, or measure it again")
    record: dict[str, Any] = found
    return record


def write(record: Mapping[str, Any], path: Path) -> None:
    """Write a landscape; equal records give equal files. Keys keep their order, which tables of knobs follow."""
    replace_file(path, gzip.compress(json.dumps(record).encode(), mtime=0))
