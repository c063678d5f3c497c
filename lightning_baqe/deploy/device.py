"""What a device is, as data: measured figures are only comparable where these agree."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning_baqe.deploy.target import cpu_flags, cpu_name

_FLAGS_THAT_MATTER = ("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm")
_PACKAGES = ("apache-tvm", "apache-tvm-ffi", "torch", "lightning-baqe")


_GENERATORS = (
    "conv_template", "depthwise_template", "pixel_templates", "pool_template", "movement_templates", "float_functions",
    "emit", "requantize", "dot", "layout", "kernels", "values", "plan_pixels", "plan", "compiler",
)  # fmt: skip


@functools.cache
def code_digest() -> str:
    """Digest of the source of all that generates code and lays out its constants.

    What was compiled or measured with other sources is neither loaded nor believed.
    """
    folder = Path(__file__).parent
    sources = [(folder / f"{name}.py").read_bytes() for name in _GENERATORS]
    return hashlib.sha256(b"\0".join(sources)).hexdigest()[:16]


@functools.cache
def versions() -> dict[str, str]:
    """Versions of what generates and runs the code."""
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


def fingerprint(threads: int = 1) -> str:
    """Digest of the device and of what generates its code: versions and templates."""
    info = {key: value for key, value in device_info(threads).items() if key != "cores"}
    code = {name: versions()[name] for name in ("apache-tvm", "apache-tvm-ffi")} | {"templates": code_digest()}
    return hashlib.sha256(json.dumps([info, code], sort_keys=True).encode()).hexdigest()[:24]
