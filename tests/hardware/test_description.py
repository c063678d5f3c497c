"""Devices as data: what is checked when a description is read, and before a network is trained for it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import nn

import lightning_baqe.recipes
from lightning_baqe.errors import ConfigError
from lightning_baqe.hardware import target
from lightning_baqe.hardware.description import Caches, DeviceDescription, detected_caches, layer_operators
from lightning_baqe.quantization.config import BitConfig, LayerBits

FILES = sorted((Path(lightning_baqe.recipes.__file__).parent / "deploy").glob("*.yaml"))


def _read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


@pytest.fixture
def mapping() -> dict[str, Any]:
    return _read(next(path for path in FILES if path.stem == "native"))


@pytest.fixture
def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1, groups=2), nn.Linear(8, 2)
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_descriptions(path: Path) -> None:
    description = DeviceDescription.of(_read(path))
    assert description.repeats > 0
    if path.stem != "native":  # what a file promises is what its kernels need
        assert target.NEEDED_FLAGS[target.get_target(description.target).path] <= set(description.instructions)


def test_every_path_of_the_targets_has_a_description() -> None:
    assert {_read(path)["target"] for path in FILES} >= {"native", "vnni512", "avxvnni", "avx2", "portable"}


def test_this_machine_is_native(mapping: dict[str, Any]) -> None:
    description = DeviceDescription.of(mapping)
    description.check_here()
    assert set(description.instructions) == target.cpu_flags()


def test_another_machine_is_refused(mapping: dict[str, Any]) -> None:
    description = DeviceDescription.of({**mapping, "instructions": ["amx_of_the_future"]})
    with pytest.raises(ConfigError, match="lacks amx_of_the_future"):
        description.check_here()


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "version": ({"version": 2}, "version is 2, this package reads .* 1"),
    "no version": ({"version": None}, "version is None"),
    "unknown key": ({"colour": "red"}, "deploy.colour"),
    "text": ({"threads": "1"}, "deploy.threads"),
    "truth": ({"threads": True}, "deploy.threads"),
    "no thread": ({"threads": 0}, "deploy.threads"),
    "more threads than cores": ({"cores": 2, "threads": 3}, "device has 2 cores"),
    "target": ({"target": "gpu"}, "unknown target 'gpu'.*avx2"),
    "reach": ({"reach": "ssh"}, "deploy.reach.*local"),
    "no requantization": ({"fuses": ["residual"]}, r"deploy.fuses.*all kernels end with requantization.*\['residual'"),
    "fuses nothing": ({"fuses": []}, "deploy.fuses.*all kernels end with requantization"),
    "fuses twice": ({"fuses": ["requantization", "requantization"]}, "each once"),
    "fuses something else": ({"fuses": ["requantization", "attention"]}, "deploy.fuses.1"),
    "caches": ({"caches": {"l1d_kib": 64, "l2_kib": 32, "l3_kib": 0}}, "caches grow"),
    "cache of text": ({"caches": {"l1d_kib": "big", "l2_kib": 32, "l3_kib": 0}}, "deploy.caches.l1d_kib"),
    "instructions": ({"instructions": "avx2"}, "deploy.instructions"),
}


def test_residual_sums_are_fused_where_the_device_says_so(mapping: dict[str, Any]) -> None:
    assert DeviceDescription.of(mapping).options.fuse_residual
    assert not DeviceDescription.of({**mapping, "fuses": ["requantization"]}).options.fuse_residual


@pytest.mark.parametrize("name", WRONG)
def test_wrong_descriptions(name: str, mapping: dict[str, Any]) -> None:
    changes, reason = WRONG[name]
    with pytest.raises(ConfigError, match=reason):
        DeviceDescription.of({**mapping, **changes})


@pytest.mark.parametrize(
    ("widths", "reason"),
    [
        ({"weight": [8, 9], "activation": [8]}, "deploy.bits.linear.weight.*2..8"),
        ({"weight": [8, 8], "activation": [8]}, "once"),
        ({"weight": [], "activation": [8]}, "at least one"),
        ({"weight": [8, 32], "activation": [8]}, "float in both"),
        ({"weight": [8]}, "deploy.bits.linear.activation"),
        ({"weight": ["8"], "activation": [8]}, "deploy.bits.linear.weight"),
    ],
)
def test_wrong_bits(widths: dict[str, Any], reason: str, mapping: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=reason):
        DeviceDescription.of({**mapping, "bits": {**mapping["bits"], "linear": widths}})


def test_missing_and_unknown_operators(mapping: dict[str, Any]) -> None:
    some = copy.deepcopy(mapping)
    del some["bits"]["depthwise"]
    with pytest.raises(ConfigError, match="nothing about depthwise"):
        DeviceDescription.of(some)
    with pytest.raises(ConfigError, match="attention"):
        DeviceDescription.of({**mapping, "bits": {**mapping["bits"], "attention": mapping["bits"]["linear"]}})


@pytest.mark.parametrize("key", ["target", "bits", "threads", "caches"])
def test_missing_keys(key: str, mapping: dict[str, Any]) -> None:
    del mapping[key]
    with pytest.raises(ConfigError, match=f"deploy.{key}: Field required"):
        DeviceDescription.of(mapping)


def test_operators(network: nn.Module) -> None:
    assert layer_operators(network) == {"0": "convolution", "1": "depthwise", "2": "convolution", "3": "linear"}


def _with_depthwise(mapping: dict[str, Any], weight: list[int], activation: list[int]) -> DeviceDescription:
    bits = {**mapping["bits"], "depthwise": {"weight": weight, "activation": activation}}
    return DeviceDescription.of({**mapping, "bits": bits})


def test_only_supported_bits_are_offered(mapping: dict[str, Any], network: nn.Module) -> None:
    device = _with_depthwise(mapping, [4, 8, 32], [8, 32])
    assert device.choices(network, [4, 8, 32], ["0", "1"]) == {"0": (4, 8, 32), "1": (8, 32)}
    assert device.choices(network, [2, 3], ["0", "2"]) == {"0": (2, 3), "2": (2, 3)}
    with pytest.raises(ConfigError, match=r"'1' \(depthwise\) has none of \[2, 4\], but \[8, 32\]"):
        device.choices(network, [2, 4], ["0", "1"])


def test_bits_without_kernels_are_refused(mapping: dict[str, Any], network: nn.Module) -> None:
    device = _with_depthwise(mapping, [4, 8], [8])
    good = BitConfig.uniform(network, 8, 8)
    device.check_bits(network, good.replace({"1": LayerBits(4, 8)}))
    device.check_bits(network, good.replace({"1": LayerBits((4, 8) * 4, 8)}))
    with pytest.raises(ConfigError, match=r"'1' \(depthwise\) has inputs of \[8\] bit, not 4"):
        device.check_bits(network, good.replace({"1": LayerBits(8, 4)}))
    with pytest.raises(ConfigError, match=r"'1' \(depthwise\) has weights of \[4, 8\] bit, not \[3, 4\]"):
        device.check_bits(network, good.replace({"1": LayerBits((3, 4) * 4, 8)}))


def test_caches_of_linux(tmp_path: Path) -> None:
    for index, (level, kind, size) in enumerate(
        [("1", "Data", "48K"), ("1", "Instruction", "32K"), ("2", "Unified", "1024K"), ("3", "Unified", "32768K")]
    ):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, text in (("level", level), ("type", kind), ("size", size)):
            (folder / name).write_text(f"{text}\n")
    assert detected_caches(tmp_path) == Caches(l1d_kib=48, l2_kib=1024, l3_kib=32768)
    assert detected_caches(tmp_path / "none") == Caches(l1d_kib=0, l2_kib=0, l3_kib=0)
