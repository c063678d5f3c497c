"""The bit-config: the bit-widths of every layer, in the one format that every method reads and writes."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from torch import nn

from lightning_baqe.errors import ConfigError, DataError
from lightning_baqe.files import MIB, parse_json, read_file
from lightning_baqe.quantization.wrappers import refuse_lazy, unwrapped

FLOAT_BITS = 32
MIN_BITS, MAX_BITS = 2, 8
FORMAT_VERSION = 1
MAX_BYTES = 64 * MIB  # of a file
LAYER_TYPES = (nn.Conv2d, nn.Linear, nn.Conv1d, nn.ConvTranspose2d)


def _check_bits(what: str, bits: object, allow_float: bool = False) -> None:
    # bool is an int; True is no bit-width.
    is_number = isinstance(bits, int) and not isinstance(bits, bool)
    if is_number and (bits in range(MIN_BITS, MAX_BITS + 1) or (allow_float and bits == FLOAT_BITS)):
        return
    wanted = f"an integer within {MIN_BITS}..{MAX_BITS}" + (f" or {FLOAT_BITS} (float)" if allow_float else "")
    raise ConfigError(f"{what} must be {wanted}, got {bits!r}")


@dataclass(frozen=True)
class LayerBits:
    """The bit-widths of one layer: of its weights and of its input.

    Args:
        weight: 2 to 8, or 32 for a float layer; or one such number for each output channel.
        activation: 2 to 8, or 32 for a float layer.

    Raises:
        ConfigError: out of range, or only one of the two is 32.
    """

    weight: int | tuple[int, ...]
    activation: int

    def __post_init__(self) -> None:
        if isinstance(self.weight, list):
            object.__setattr__(self, "weight", tuple(self.weight))
        if isinstance(self.weight, tuple):
            if not self.weight:
                raise ConfigError("weight bits by channel must not be empty")
            for bits in self.weight:
                _check_bits("each of the weight bits by channel", bits)
        else:
            _check_bits("weight bits", self.weight, allow_float=True)
        _check_bits("activation bits", self.activation, allow_float=True)
        if (self.weight == FLOAT_BITS) != (self.activation == FLOAT_BITS):
            raise ConfigError(
                f"a layer is float in both or in neither: got weight {self.weight}, activation {self.activation}; "
                f"give {FLOAT_BITS} for both, or {MIN_BITS}..{MAX_BITS} for both"
            )

    @property
    def is_float(self) -> bool:
        return self.activation == FLOAT_BITS


def layers(model: nn.Module) -> tuple[str, ...]:
    """Paths of the modules that have bits: all of :data:`LAYER_TYPES`, in the order of definition."""
    named = unwrapped(model).named_modules()
    return tuple(name for name, module in named if isinstance(module, LAYER_TYPES))


def architecture_signature(model: nn.Module) -> str:
    """SHA-256 (hexadecimal) over the names and weight shapes of all layers.

    Raises:
        UnsupportedModelError: a lazy layer that has no shape yet.
    """
    digest = hashlib.sha256()
    for name in layers(model):
        weight = cast(nn.Parameter, unwrapped(model).get_submodule(name).weight)
        refuse_lazy(f"{name}.weight", weight)
        digest.update(f"{name}:{tuple(weight.shape)};".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class BitConfig(Mapping[str, LayerBits]):
    """Bit-widths by layer name, in network order; a read-only mapping.

    Args:
        layers: ``{layer name: LayerBits}``; names are module paths.
        ties: groups of layers that must have the same bits.
        other: bits of every tensor that is no layer's input (residual operands, pooling inputs), 2 to 8.
        signature: of the architecture (:func:`architecture_signature`), None if unknown. Ignored in comparisons.
        residual: bits of the operands of residual sums: None as ``other``, 2 to 8, or 32 to keep them in int32
            (HAWQ-V3, section III-C).

    Raises:
        ConfigError: a name, number or tie that cannot be right.
    """

    layers: Mapping[str, LayerBits]
    ties: tuple[tuple[str, ...], ...] = ()
    other: int = 8
    signature: str | None = field(default=None, compare=False)
    residual: int | None = None

    def __post_init__(self) -> None:
        if not self.layers:
            raise ConfigError("a bit-config needs at least one layer, got none")
        for name, bits in self.layers.items():
            if not isinstance(name, str) or not isinstance(bits, LayerBits):
                raise ConfigError(f"a bit-config maps layer names to LayerBits, got {name!r}: {bits!r}")
        _check_bits("other", self.other)
        if self.residual is not None:
            _check_bits("residual", self.residual, allow_float=True)
        object.__setattr__(self, "layers", MappingProxyType(dict(self.layers)))
        object.__setattr__(self, "ties", tuple(tuple(group) for group in self.ties))
        for group in self.ties:
            for name in group:
                self._require(name, "ties")
            different = {name: self.layers[name] for name in group}
            if len(set(different.values())) > 1:
                raise ConfigError(f"tied layers must have the same bits, got {different}; change all of them together")

    def of(self, name: str) -> LayerBits:
        """Bits of any layer of a traced network. One whose weight no module of the network's holds (fixed filters, raw
        parameters) is not listed: it has :attr:`other` bits, or is float where all layers are.
        """
        if name in self.layers:
            return self.layers[name]
        return LayerBits(*[FLOAT_BITS if all(bits.is_float for bits in self.layers.values()) else self.other] * 2)

    def __getitem__(self, name: str) -> LayerBits:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __hash__(self) -> int:
        return hash((tuple(self.layers.items()), self.ties, self.other, self.residual))

    def __reduce__(self) -> tuple[type[BitConfig], tuple[Any, ...]]:
        return BitConfig, (dict(self.layers), self.ties, self.other, self.signature, self.residual)

    def _require(self, name: str, where: str) -> None:
        if name not in self.layers:
            raise ConfigError(f"{where} names layer {name!r}, which the bit-config has not{near(name, self.layers)}")

    @classmethod
    def uniform(
        cls,
        model: nn.Module,
        weight: int = 8,
        activation: int = 8,
        first_last: int | None = 8,
        ties: tuple[tuple[str, ...], ...] = (),
        other: int = 8,
        residual: int | None = None,
    ) -> BitConfig:
        """The same bits everywhere, but for the first and the last layer.

        Args:
            weight, activation: bits of all layers, 2 to 8, or both 32.
            first_last: bits of the first and the last layer, None for no exception. With ``weight=32`` all are 32.

        Raises:
            ConfigError: the model has no layers, or bits are out of range.
        """
        names = layers(model)
        if not names:
            raise ConfigError(f"{type(model).__name__} has no nn.Conv2d and no nn.Linear: there is nothing to quantize")
        bits = dict.fromkeys(names, LayerBits(weight, activation))
        if first_last is not None and weight != FLOAT_BITS:
            bits[names[0]] = bits[names[-1]] = LayerBits(first_last, first_last)
        return cls(bits, ties, other, architecture_signature(model), residual)

    def replace(self, changes: Mapping[str, LayerBits] | None = None, /, **more: LayerBits) -> BitConfig:
        """A copy with other bits for some layers: ``bits.replace({"layer1.0.conv1": LayerBits(4, 4)}, conv1=...)``.

        Raises:
            ConfigError: an unknown layer, or a tie that no longer holds.
        """
        wanted = {**(changes or {}), **more}
        for name in wanted:
            self._require(name, "replace")
        return BitConfig({**self.layers, **wanted}, self.ties, self.other, self.signature, self.residual)

    def at_least(self, bits: int) -> BitConfig:
        """A copy whose layers have so many bits of weights and of inputs, or more where they had more."""

        def wider(layer: LayerBits) -> LayerBits:
            weight, activation = layer.weight, layer.activation
            many = tuple(max(of, bits) for of in weight) if isinstance(weight, tuple) else max(weight, bits)
            return LayerBits(many, max(activation, bits))

        return self.replace({name: wider(layer) for name, layer in self.layers.items()})

    def check(self, model: nn.Module) -> None:
        """Refuse a model that this bit-config was not made for.

        Raises:
            ConfigError: layers are missing or unknown, or the signature is another architecture's.
        """
        names = layers(model)
        unknown = [name for name in self.layers if name not in names]
        if unknown:
            raise ConfigError(
                f"the bit-config names layer {unknown[0]!r}, which {type(model).__name__} has not"
                f"{near(unknown[0], names)} ({len(unknown)} unknown in all)"
            )
        missing = [name for name in names if name not in self.layers]
        if missing:
            raise ConfigError(
                f"the bit-config has no bits for layer {missing[0]!r}{near(missing[0], self.layers)} "
                f"({len(missing)} missing in all); give every layer bits, 32 keeps one float"
            )
        if self.signature is not None and self.signature != architecture_signature(model):
            raise ConfigError(
                f"the bit-config was made for another architecture: weight shapes of this {type(model).__name__} "
                "differ (stale signature); make a new one with BitConfig.uniform(model)"
            )

    def to_json(self) -> str:
        """The format that :meth:`from_json` reads."""
        content = {
            "version": FORMAT_VERSION,
            "signature": self.signature,
            "other": self.other,
            "residual": self.residual,
            "ties": [list(group) for group in self.ties],
            "layers": {name: [bits.weight, bits.activation] for name, bits in self.layers.items()},
        }
        return json.dumps(content, indent=1)

    @classmethod
    def from_json(cls, source: str | Path) -> BitConfig:
        """Read what :meth:`to_json` wrote.

        Args:
            source: the JSON text, or the path of a file as a ``Path``.

        Raises:
            ConfigError: a file that cannot be read, another format, or a version that this release does not know; names
                the file.
        """
        if not isinstance(source, Path | str):
            raise ConfigError(
                f"got a {type(source).__name__}; a bit-config is given as its JSON text, or its file's Path"
            )
        name = str(source) if isinstance(source, Path) else "the text"
        try:
            content = parse_json(read_file(source, MAX_BYTES) if isinstance(source, Path) else source, name)
        except DataError as error:
            raise ConfigError(
                f"{error} This is not a bit-config; its file is given as a Path, its text as a str."
            ) from error
        try:
            return cls._parse(content)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error

    @classmethod
    def _parse(cls, content: Any) -> BitConfig:
        if not isinstance(content, dict) or not isinstance(content.get("layers"), dict):
            raise ConfigError('a bit-config is a JSON object with "layers": {name: [weight bits, activation bits]}')
        if content.get("version") != FORMAT_VERSION:
            raise ConfigError(
                f"bit-config of version {content.get('version')!r}, this release reads version {FORMAT_VERSION}"
            )
        parsed = {}
        for name, pair in content["layers"].items():
            if not isinstance(pair, list) or len(pair) != 2:
                raise ConfigError(f"layer {name!r} must be [weight bits, activation bits], got {pair!r}")
            try:
                parsed[name] = LayerBits(pair[0], pair[1])
            except ConfigError as error:
                raise ConfigError(f"layer {name!r}: {error}") from error
        ties, signature = content.get("ties", []), content.get("signature")
        groups = ties if isinstance(ties, list) else [ties]
        if not all(isinstance(group, list) and all(isinstance(name, str) for name in group) for group in groups):
            raise ConfigError(f"ties are lists of layer names, got {ties!r}")
        if not (signature is None or isinstance(signature, str)):
            raise ConfigError(f"signature is a text or null, got {signature!r}")
        return cls(parsed, tuple(map(tuple, groups)), content.get("other", 8), signature, content.get("residual"))


def near(name: str, names: Mapping[str, Any] | tuple[str, ...]) -> str:
    """``"; did you mean 'x'?"`` with the closest of the names, or nothing."""
    found = difflib.get_close_matches(name, list(names), n=3)
    return f"; did you mean {' or '.join(map(repr, found))}?" if found else ""
