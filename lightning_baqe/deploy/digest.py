"""A digest of all that generates code: what was compiled or measured by other sources is not believed."""

from __future__ import annotations

import ast
import functools
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_baqe.hardware.identity import device_key, digest, toolchain

PACKAGE = Path(__file__).parent.parent
ENTRY_POINTS = ("lightning_baqe.deploy.plan", "lightning_baqe.deploy.compiler")  # these import all that generates code
# What a network is, not how it becomes code: an artifact holds its graph, and packs its constants anew.
NO_GENERATORS = ("errors", "files", "integer", "quantization")
_IMPORT = re.compile(r"^[ \t]*from lightning_baqe\.[\w.]+ import (?:\([^)]*\)|[^(\n]+)", re.MULTILINE)


@functools.cache
def generator_sources() -> tuple[Path, ...]:
    """The sources of all that generates code and lays out its constants, found by following imports; RuntimeError where
    a module imports what is no file of this package.
    """
    found: dict[str, Path] = {}
    waiting = list(ENTRY_POINTS)
    while waiting:
        name = waiting.pop()
        if name in found or name.split(".")[1] in NO_GENERATORS:
            continue
        found[name] = path = module_path(name)
        for module, names in imports_of(path.read_text()):
            waiting += imported_modules(module, names)
    return tuple(found[name] for name in sorted(found))


def imports_of(source: str) -> list[tuple[str, list[str]]]:
    """The modules of this package that a source imports from, with the names. Only these statements are parsed: this
    runs whenever the package is imported.
    """
    statements = "".join(f"{found.strip()}\n" for found in _IMPORT.findall(source))
    return [
        (str(node.module), [alias.name for alias in node.names])
        for node in ast.parse(statements).body
        if isinstance(node, ast.ImportFrom)
    ]


def imported_modules(module: str, names: list[str]) -> list[str]:
    """The modules that ``from module import names`` reads."""
    folder = PACKAGE.joinpath(*module.split(".")[1:])
    inside = [f"{module}.{name}" for name in names if (folder / f"{name}.py").exists()]
    return inside if len(inside) == len(names) else [module, *inside]


def module_path(name: str) -> Path:
    """The file of a module of this package; RuntimeError where there is none."""
    path = PACKAGE.joinpath(*name.split(".")[1:])
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.exists():
            return candidate
    raise RuntimeError(
        f"{name} is imported by what generates code, but {path}.py does not exist: its changes could not be noticed, "
        "and stale artifacts and records would be believed"
    )


@functools.cache
def code_digest() -> str:
    """Digest of :func:`generator_sources`.

    A whole network that was compiled or measured with other sources is neither loaded nor believed. (Kernels are told
    apart by their generated code, see :mod:`lightning_baqe.measurement.database`.)
    """
    sources = [str(path.relative_to(PACKAGE)).encode() + b"\0" + path.read_bytes() for path in generator_sources()]
    return hashlib.sha256(b"\0".join(sources)).hexdigest()[:16]


def fingerprint(info: Mapping[str, Any]) -> str:
    """Digest of a device, by what it says of itself, and of what generates its code: versions and templates."""
    return digest([device_key(info), toolchain(), code_digest()])
