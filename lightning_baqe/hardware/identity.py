"""What a device is, as data: measured figures are only comparable where these agree."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from lightning_baqe.hardware.target import cpu_flags, cpu_name, usable_cores

_FLAGS_THAT_MATTER = ("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm")
_PACKAGES = ("apache-tvm", "apache-tvm-ffi", "torch", "lightning-baqe")


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
        "cores": len(usable_cores()),
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
