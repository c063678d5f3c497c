"""Targets: which instructions kernels may use. Chosen by the CPU's flags, never assumed."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_baqe.errors import BuildError


@dataclass(frozen=True)
class CpuTarget:
    """A CPU as code generation sees it.

    Args:
        name: ``native``, or the name of the path.
        path: which exact integer arithmetic is used: ``amx``, ``vnni512``, ``avxvnni``, ``avx2`` or ``portable``;
            ``amx_vnni`` and ``amx_plain`` run the kernels for AMX where there is none, slowly.
        mcpu: LLVM's name of the CPU.
        lanes: 32-bit lanes of one vector register.
        registers: vector registers.
        vbmi: it has AVX512-VBMI, which looks 64 bytes up at once.
    """

    name: str
    path: str
    mcpu: str
    lanes: int
    registers: int
    vbmi: bool = False

    @property
    def tvm(self) -> dict[str, Any]:
        """The target as ``tvm.target.Target`` takes it."""
        features: dict[str, Any] = {"mattr": ["+amx-tile", "+amx-int8"]} if self.path == "amx" else {}
        return {"kind": "llvm", "mcpu": self.mcpu, **features}


_PATHS = {
    "amx": CpuTarget("amx", "amx", "cascadelake", 16, 32),
    "vnni512": CpuTarget("vnni512", "vnni512", "cascadelake", 16, 32),
    "avxvnni": CpuTarget("avxvnni", "avxvnni", "alderlake", 8, 16),
    "avx2": CpuTarget("avx2", "avx2", "haswell", 8, 16),
    "portable": CpuTarget("portable", "portable", "x86-64", 4, 16),
    "amx_vnni": CpuTarget("amx_vnni", "amx_vnni", "cascadelake", 16, 32),
    "amx_plain": CpuTarget("amx_plain", "amx_plain", "x86-64", 16, 32),
}
NATIVE = ("vnni512", "avxvnni", "avx2", "portable")  # fastest first, of those that were measured
VNNI_PATHS = ("amx", "amx_vnni", "vnni512", "avxvnni")
_TILE_FLAGS = {"amx_tile", "amx_int8"}
_VNNI512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"}
NEEDED_FLAGS = {
    "amx": _VNNI512 | _TILE_FLAGS,
    "amx_vnni": _VNNI512,
    "amx_plain": set[str](),
    "vnni512": _VNNI512,
    "avxvnni": {"avx2", "fma", "avx_vnni"},
    "avx2": {"avx2", "fma"},
    "portable": set[str](),
}
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18  # x86-64's system call, its code, AMX's state


@functools.cache
def _cpu_info() -> dict[str, str]:
    """What Linux tells of the first CPU; empty on other systems."""
    info = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    for line in info.read_text().splitlines() if info.exists() else ():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    return fields


def usable_cores() -> list[int]:
    """Cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The instruction-set flags of this CPU, in the kernel's spelling; empty where the kernel tells none."""
    return frozenset(_cpu_info().get("flags", "").split())


def cpu_name() -> str:
    """Model name of this CPU with family and model, since several generations share one name."""
    fields = _cpu_info()
    if not fields:
        return platform.processor() or platform.machine()
    name = fields.get("model name", platform.machine())
    return f"{name} (family {fields.get('cpu family')}, model {fields.get('model')})"


@functools.cache
def ask_for_tiles() -> str | None:
    """Ask Linux for AMX's registers, once a process: without, its first tile instruction ends it.

    Threads that there are and will be share the permission, forks inherit it; a program that is started anew must ask.

    Returns:
        why they may not be used, in words; None: they may.
    """
    if not cpu_flags() >= _TILE_FLAGS:
        return "which this CPU does not have"
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype, libc.syscall.argtypes = ctypes.c_long, [ctypes.c_long] * 3
    if libc.syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0:
        return None
    number = ctypes.get_errno()
    return (
        f"which the system does not let this process use (arch_prctl: {errno.errorcode.get(number, number)}; "
        "containers can forbid it, kernels before 5.16 do not know it)"
    )


def can_run(path: str, vbmi: bool = False) -> bool:
    """Whether this process may execute the code of a path, with AVX512-VBMI besides if wanted."""
    return obstacle(path, vbmi) is None


def obstacle(path: str, vbmi: bool = False) -> str | None:
    """Why this process cannot execute the code of a path, in words that follow the name of its instructions; None: it
    can.
    """
    flags = NEEDED_FLAGS[path] | ({"avx512vbmi"} if vbmi else set())
    if not (cpu_flags() >= flags and (path == "portable" or platform.machine() == "x86_64")):
        return "which this CPU does not have"
    return ask_for_tiles() if path == "amx" else None


@functools.cache
def get_target(name: str = "native") -> CpuTarget:
    """Look a target up.

    Args:
        name: ``native`` (the best path that this CPU runs, tuned for it), or the name of a path. ``amx`` is never
            native so far: its kernels were not measured on such a CPU.

    Raises:
        BuildError: no such target.
    """
    if name in _PATHS:
        return _PATHS[name]
    if name != "native":
        raise BuildError(f"unknown target {name!r}; choose one of native, {', '.join(_PATHS)}")
    best = next(path for path in NATIVE if can_run(path))
    from tvm.target import Target, codegen

    base = replace(_PATHS[best], name="native")
    if best == "portable":
        return base
    detected = Target.from_device("cpu")
    # Both the CPU and what LLVM takes it for must have it.
    vbmi = can_run(best, vbmi=True) and bool(codegen.target_has_features("avx512vbmi", detected))
    return replace(base, mcpu=str(detected.attrs["mcpu"]), vbmi=vbmi)
