"""Devices as data: what a YAML file in ``recipes/deploy/`` says of a device, checked when it is read.

A new device is a new file. ``detected`` stands for what this machine says of itself, where the device is local.

| key | meaning |
| --- | --- |
| version | of this format |
| target | the kernels: ``native`` or a name of :mod:`lightning_baqe.hardware.target` |
| instructions | instruction sets that the device must have, in Linux's spelling |
| cores | usable ones |
| caches | ``l1d_kib``, ``l2_kib``, ``l3_kib`` of a core; 0: none |
| bits | by operator (``convolution``, ``depthwise``, ``linear``): bits of ``weight`` and ``activation``, 32 = float |
| fuses | what its kernels end with: ``requantization``, always; ``residual``, else sums have kernels of their own |
| reach | how to get there: ``local`` |
| threads, repeats, warmup | of a measurement |
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import nn

from lightning_baqe.errors import BuildError, ConfigError
from lightning_baqe.hardware.options import BuildOptions
from lightning_baqe.hardware.target import cpu_flags, get_target, obstacle, usable_cores
from lightning_baqe.quantization.config import FLOAT_BITS, MAX_BITS, MIN_BITS, BitConfig, layers
from lightning_baqe.quantization.wrappers import unwrapped

VERSION = 1
Operator = Literal["convolution", "depthwise", "linear"]
Count = Annotated[int, Field(strict=True, ge=0)]
Positive = Annotated[int, Field(strict=True, ge=1)]
_SHOWN = 5


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Caches(_Part):
    """Cache sizes that one core sees, KiB; 0: there is none, or nobody knows."""

    l1d_kib: Count
    l2_kib: Count
    l3_kib: Count


class SupportedBits(_Part):
    """The bits that an operator has kernels for."""

    weight: tuple[Positive, ...]
    activation: tuple[Positive, ...]

    @field_validator("weight", "activation")
    @classmethod
    def _widths(cls, widths: tuple[int, ...]) -> tuple[int, ...]:
        wrong = [bits for bits in widths if bits != FLOAT_BITS and not MIN_BITS <= bits <= MAX_BITS]
        if wrong or not widths or len(set(widths)) < len(widths):
            raise ValueError(f"bits are {MIN_BITS}..{MAX_BITS} or {FLOAT_BITS} (float), each once and at least one")
        return widths

    @model_validator(mode="after")
    def _float_in_both(self) -> SupportedBits:
        if (FLOAT_BITS in self.weight) != (FLOAT_BITS in self.activation):
            raise ValueError(f"a layer is float in both or in neither: give {FLOAT_BITS} to both or to neither")
        return self

    @property
    def both(self) -> tuple[int, ...]:
        """Bits that weights and activations can have together."""
        return tuple(bits for bits in self.weight if bits in self.activation)


def _or_detected(detect: Callable[[], Any]) -> BeforeValidator:
    """``detected`` instead of a value is what this machine says of itself."""
    return BeforeValidator(lambda value: detect() if value == "detected" else value)


class DeviceDescription(_Part):
    """A device; see the table above for the fields."""

    version: int
    target: str
    instructions: Annotated[tuple[str, ...], _or_detected(lambda: tuple(sorted(cpu_flags())))]
    cores: Annotated[Positive, _or_detected(lambda: len(usable_cores()))]
    caches: Annotated[Caches, _or_detected(lambda: detected_caches())]
    bits: dict[Operator, SupportedBits]
    fuses: tuple[Literal["requantization", "residual"], ...]
    reach: Literal["local"]
    threads: Positive
    repeats: Positive
    warmup: Count

    @classmethod
    def of(cls, mapping: Mapping[str, Any]) -> DeviceDescription:
        """Check and take what a file says.

        Raises:
            ConfigError: another version, an unknown or missing key, or a value that cannot be right; all are named.
        """
        if mapping.get("version") != VERSION:
            raise ConfigError(
                f"deploy.version is {mapping.get('version')!r}, this package reads device descriptions of version "
                f"{VERSION}: write version: {VERSION} and the keys that recipes/deploy/native.yaml explains"
            )
        try:
            return cls.model_validate(dict(mapping))
        except ValidationError as error:
            wrong = [
                f"{'.'.join(['deploy', *map(str, e['loc'])])}: {e['msg']}, got {str(e['input'])[:80]}"
                for e in error.errors()
            ]
            raise ConfigError("the device's description cannot be right:\n  " + "\n  ".join(wrong)) from error

    @field_validator("target")
    @classmethod
    def _known_target(cls, target: str) -> str:
        try:
            get_target(target)
        except BuildError as error:
            raise ValueError(str(error)) from error
        return target

    @field_validator("fuses")
    @classmethod
    def _has_requantization(cls, fuses: tuple[str, ...]) -> tuple[str, ...]:
        if "requantization" not in fuses or len(set(fuses)) < len(fuses):
            raise ValueError(
                "all kernels end with requantization: write fuses: [requantization], or [requantization, residual] "
                "where convolutions may end with a residual sum, each once"
            )
        return fuses

    @property
    def options(self) -> BuildOptions:
        """What is compiled for the device."""
        return BuildOptions(get_target(self.target), self.threads, "residual" in self.fuses)

    @model_validator(mode="after")
    def _consistent(self) -> DeviceDescription:
        missing = {"convolution", "depthwise", "linear"} - set(self.bits)
        if missing:
            raise ValueError(f"bits says nothing about {', '.join(sorted(missing))}")
        if self.threads > self.cores:
            raise ValueError(f"threads is {self.threads}, but the device has {self.cores} cores")
        sizes = [size for _, size in self.caches if size]
        if sizes != sorted(sizes):
            raise ValueError(f"caches grow from l1d_kib to l3_kib, got {sizes}")
        return self

    def check_here(self) -> None:
        """Check that this machine is such a device.

        Raises:
            ConfigError: it lacks instructions.
        """
        missing = sorted(set(self.instructions) - cpu_flags())
        path = get_target(self.target).path
        why = obstacle(path)
        if missing or why is not None:
            raise ConfigError(
                "this machine is not the device that deploy describes: it lacks "
                f"{', '.join(missing) or f'{path}, {why}'}; choose deploy=native, or another device"
            )

    def choices(self, network: nn.Module, wanted: Iterable[int], names: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """The bits, of those wanted, that layers of a float network may have in weights and activations.

        Raises:
            ConfigError: a layer has none; names it and what it could have.
        """
        operators, offered = layer_operators(network), tuple(wanted)
        found = {name: tuple(b for b in offered if b in self.bits[operators[name]].both) for name in names}
        wrong = [
            f"{name!r} ({operators[name]}) has none of {list(offered)}, but {list(self.bits[operators[name]].both)}"
            for name, choices in found.items()
            if not choices
        ]
        _refuse(wrong, self.target)
        return found

    def check_bits(self, network: nn.Module, bits: BitConfig) -> None:
        """Check that the device has kernels for a bit-config.

        Raises:
            ConfigError: it has none for a layer; names the layer and what it could have.
        """
        wrong = []
        operators = layer_operators(network)
        for name in (name for name in operators if name in bits):
            supported, layer, about = self.bits[operators[name]], bits[name], f"{name!r} ({operators[name]}) has"
            weight = set(layer.weight if isinstance(layer.weight, tuple) else (layer.weight,))
            if not weight <= set(supported.weight):
                wrong.append(f"{about} weights of {list(supported.weight)} bit, not {sorted(weight)}")
            if layer.activation not in supported.activation:
                wrong.append(f"{about} inputs of {list(supported.activation)} bit, not {layer.activation}")
        _refuse(wrong, self.target)


def _refuse(wrong: list[str], target: str) -> None:
    if wrong:
        more = f"\n  and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        lines = "\n  ".join(wrong[:_SHOWN])
        raise ConfigError(f"the device ({target}) does not support these bits:\n  {lines}{more}")


def layer_operators(network: nn.Module) -> dict[str, Operator]:
    """``{layer: operator}`` of a float network, in the order of :func:`lightning_baqe.quantization.config.layers`."""
    found: dict[str, Operator] = {}
    for name in layers(network):
        module = unwrapped(network).get_submodule(name)
        depthwise = isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels == module.out_channels
        found[name] = "depthwise" if depthwise else "linear" if isinstance(module, nn.Linear) else "convolution"
    return found


def detected_caches(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> Caches:
    """The caches of the first core as Linux tells them; 0 where it tells nothing."""
    sizes = {"1": 0, "2": 0, "3": 0}
    for index in folder.glob("index*"):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        if level in sizes and kind != "Instruction":
            sizes[level] = int(size.removesuffix("K"))
    return Caches(l1d_kib=sizes["1"], l2_kib=sizes["2"], l3_kib=sizes["3"])
