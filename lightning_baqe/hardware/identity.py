"""What a device is, as data: measured figures are only comparable where these agree."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning_baqe.hardware.target import cpu_flags, cpu_name

_FLAGS_THAT_MATTER = ("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm")
_PACKAGES = ("apache-tvm", "apache-tvm-ffi", "torch", "lightning-baqe")


_ENTRY_POINTS = ("plan", "compiler")  # all that generates code is what these two import


@functools.cache
def generator_sources() -> tuple[Path, ...]:
    """The sources of all that generates code and lays out its constants, found by following imports."""
    folder = Path(__file__).parent
    found: dict[str, Path] = {}
    waiting = list(_ENTRY_POINTS)
    while waiting:
        name = waiting.pop()
        path = folder / f"{name}.py"
        if name in found or not path.exists():
            continue
        found[name] = path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_baqe.deploy"):
                module = (node.module or "").removeprefix("lightning_baqe.deploy").removeprefix(".")
                waiting += [module] if module else [alias.name for alias in node.names]
    return tuple(found[name] for name in sorted(found))


@functools.cache
def code_digest() -> str:
    """Digest of :func:`generator_sources`.

    A whole network that was compiled or measured with other sources is neither loaded nor believed. (Kernels are told
    apart by their generated code, see :mod:`lightning_baqe.measurement.database`.)
    """
    sources = [path.name.encode() + b"\0" + path.read_bytes() for path in generator_sources()]
    return hashlib.sha256(b"\0".join(sources)).hexdigest()[:16]


@functools.cache
def versions() -> dict[str, str]:
    """Versions of what generates and runs the code, for people to read."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


def device_info(threads: int = 1) -> dict[str, Any]:
    """This machine's CPU: model, the instruction sets that matter, usable cores, threads of a measurement."""
    return {
        "cpu": cpu_name(),
        "machine": platform.machine(),
        "system": platform.system(),
        "flags": [flag for flag in _FLAGS_THAT_MATTER if flag in cpu_flags()],
        "flags_digest": hashlib.sha256(" ".join(sorted(cpu_flags())).encode()).hexdigest()[:16],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads,
    }


@functools.cache
def toolchain() -> dict[str, str]:
    """Versions of what turns a kernel's code into machine code."""
    from tvm.target import codegen  # heavy; most readers of device_info() do without

    names = ("apache-tvm", "apache-tvm-ffi")
    return {name: version(name) for name in names} | {"llvm": str(codegen.llvm_version_major())}


def device_key(info: Mapping[str, Any]) -> str:
    """Identifies a device: digest of those parts of :func:`device_info` that figures depend on, usable cores apart.

    Raises:
        KeyError: a part is missing.
    """
    return digest({name: info[name] for name in ("cpu", "machine", "system", "flags_digest", "threads")})


def digest(value: Any) -> str:
    """Digest of what JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]


def fingerprint(threads: int = 1) -> str:
    """Digest of the device and of what generates its code: versions and templates."""
    return digest([device_key(device_info(threads)), toolchain(), code_digest()])
