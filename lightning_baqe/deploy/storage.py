"""The folder of an artifact: what is in it, and that it is what was written.

| file | holds |
| --- | --- |
| ``manifest.json`` | :class:`Manifest`: what was compiled, for what and by what, and digests of the files below |
| ``module.so`` | the compiled module, native code |
| ``graph.json``, ``tensors.npz`` | the integer graph, see :mod:`lightning_baqe.integer.serialize` |
| ``bits.json`` | the bits of every layer, for people |
| ``signature`` | if it was signed: HMAC-SHA256 of the manifest, and so of all files, in hexadecimal digits |

Digests find damage, not malice: who changes a file can change its digest. A signature finds both, for those who have
the key.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, StringConstraints, TypeAdapter

from lightning_baqe.errors import BuildError, DataError
from lightning_baqe.files import MIB, check_schema, parse_json, read_arrays, read_file
from lightning_baqe.hardware.target import NEEDED_FLAGS, CpuTarget
from lightning_baqe.integer.graph import IntegerGraph
from lightning_baqe.integer.serialize import graph_from_parts, graph_to_parts

FORMAT = 2
MANIFEST, MODULE, GRAPH, TENSORS, BITS = "manifest.json", "module.so", "graph.json", "tensors.npz", "bits.json"
SIGNATURE = "signature"
_MOST_BYTES = {MANIFEST: 64 * MIB, MODULE: 2048 * MIB, GRAPH: 256 * MIB, TENSORS: 4096 * MIB, BITS: 64 * MIB}
_KEY_BYTES = (16, 4096)
_ADVICE = "take an undamaged copy, or build it again"

_Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_Positive = Annotated[int, Field(ge=1, lt=2**63)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def _known_path(path: str) -> str:
    if path not in NEEDED_FLAGS:
        raise ValueError(f"one of {', '.join(NEEDED_FLAGS)} is wanted")
    return path


class _Target(_Part):
    """As :class:`~lightning_baqe.hardware.target.CpuTarget`."""

    name: str
    path: Annotated[str, AfterValidator(_known_path)]
    mcpu: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+$")]
    lanes: Literal[4, 8, 16]
    registers: Literal[16, 32]
    vbmi: bool


class Manifest(_Part):
    """What stands in ``manifest.json``.

    Attributes:
        plan: digest of the generated code; what does not generate the same cannot run the module.
        schedules: ``{layer: {knob: value}}``.
        device, versions: where and by what it was compiled, for people.
        files: SHA-256 of every other file but the signature.
        digest: SHA-256 of all of the above.
    """

    format: Literal[2]
    target: _Target
    threads: Annotated[int, Field(ge=1, le=1024)]
    schedules: dict[str, dict[str, bool | int | float | str | None]]
    fuse_residual: bool
    plan: str
    device: dict[str, JsonValue]
    versions: dict[str, str]
    size_bytes: _Positive
    files: dict[str, _Digest]
    digest: _Digest

    @property
    def cpu_target(self) -> CpuTarget:
        """What it was compiled for."""
        return CpuTarget(**dict(self.target))


_SCHEMA = TypeAdapter(Manifest)


def write_parts(folder: Path, graph: IntegerGraph, about: Mapping[str, Any]) -> None:
    """Write all files beside the module, which is there already.

    Args:
        folder: of the artifact.
        about: the manifest's fields without format and digests; JSON can hold them.
    """
    description, tensors = graph_to_parts(graph)
    (folder / GRAPH).write_text(json.dumps(description))
    np.savez(folder / TENSORS, **tensors)  # type: ignore[arg-type]
    (folder / BITS).write_text(json.dumps({layer: list(pair) for layer, pair in graph.bits.items()}, indent=1))
    files = {name: _file_digest(folder / name) for name in (MODULE, GRAPH, TENSORS, BITS)}
    content = sealed({"format": FORMAT, **about, "files": files})
    (folder / MANIFEST).write_text(json.dumps(content, indent=1))


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest's content with the digest of all else in it."""
    rest = {name: value for name, value in content.items() if name != "digest"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return {**rest, "digest": hashlib.sha256(text.encode()).hexdigest()}


def read_manifest(folder: Path, key: Path | str | bytes | None = None) -> Manifest:
    """The manifest, proven to be the one that was written, and that all files are those that it names.

    Raises:
        BuildError: a file is missing, damaged or another; with a key, the signature is missing or not made with it.
    """
    missing = [name for name in (MANIFEST, MODULE, GRAPH, TENSORS) if not (folder / name).is_file()]
    if missing:
        raise BuildError(
            f"{folder} is no artifact: it lacks {', '.join(missing)}; give a folder that Artifact.save wrote"
        )
    try:
        content = _read(folder, MANIFEST)
        if key is not None:
            _check_signature(folder, content, key)
        found = parse_json(content, str(folder / MANIFEST))
        version = found.get("format") if isinstance(found, dict) else None
        if version != FORMAT:
            raise BuildError(
                f"{folder} has format {version!r}, this version reads {FORMAT}; build its graph again: "
                f"baqe.build(baqe.Artifact.load_graph({str(folder)!r}))"
            )
        manifest = check_schema(_SCHEMA, found, str(folder / MANIFEST), _ADVICE)
    except DataError as error:
        raise BuildError(str(error)) from error
    if sealed(found)["digest"] != manifest.digest:
        raise BuildError(f"{folder / MANIFEST} was changed after it was written: {_ADVICE}")
    if set(manifest.files) != {MODULE, GRAPH, TENSORS, BITS}:
        raise BuildError(f"{folder / MANIFEST} names the files {sorted(manifest.files)}: {_ADVICE}")
    return manifest


def check_file(folder: Path, name: str, manifest: Manifest) -> None:
    """Raise BuildError where a file is not what the manifest says."""
    if _file_digest(folder / name) != manifest.files[name]:
        raise BuildError(f"{folder / name} is not the file that was written with {MANIFEST}: {_ADVICE}")


def read_graph(folder: Path, manifest: Manifest | None = None) -> IntegerGraph:
    """The integer graph, proven; with a manifest also that its files are those that were written.

    Raises:
        BuildError: a file is missing, damaged or another, or the graph is not what it says.
    """
    try:
        contents = {name: _read(folder, name) for name in (GRAPH, TENSORS)}
        for name, content in contents.items():
            if manifest is not None and hashlib.sha256(content).hexdigest() != manifest.files[name]:
                raise BuildError(f"{folder / name} is not the file that was written with {MANIFEST}: {_ADVICE}")
        # Operators of islands may have infinite arguments: masks are.
        description = parse_json(contents[GRAPH], str(folder / GRAPH), constants=True)
        arrays = read_arrays(contents[TENSORS], str(folder / TENSORS))
        return graph_from_parts(description, arrays, str(folder / GRAPH))
    except DataError as error:
        raise BuildError(f"the graph in {folder} cannot be read: {error}") from error


def write_signature(folder: Path, key: Path | str | bytes) -> None:
    """Sign the manifest of a folder, which is checked before; raises as :func:`read_manifest`."""
    manifest = read_manifest(folder)
    for name in manifest.files:
        check_file(folder, name, manifest)
    (folder / SIGNATURE).write_text(_signature(_read(folder, MANIFEST), key))


def _check_signature(folder: Path, content: bytes, key: Path | str | bytes) -> None:
    given = folder / SIGNATURE
    if not given.is_file():
        raise BuildError(
            f"{folder} is not signed: sign it where it is trusted (artifact.sign(key)), or load without key"
        )
    text = read_file(given, 1024)
    if not hmac.compare_digest(text.strip(), _signature(content, key).encode()):
        raise BuildError(f"{given} was not made with this key for this artifact: do not run it, or give the right key")


def _signature(content: bytes, key: Path | str | bytes) -> str:
    secret = key if isinstance(key, bytes) else read_file(Path(key), _KEY_BYTES[1])
    if not _KEY_BYTES[0] <= len(secret) <= _KEY_BYTES[1]:
        raise DataError(
            f"the key has {len(secret)} bytes, {_KEY_BYTES[0]} to {_KEY_BYTES[1]} are wanted: make a file of random "
            "bytes, such as by `head -c 32 /dev/urandom > key`"
        )
    return hmac.new(secret, content, hashlib.sha256).hexdigest()


def _read(folder: Path, name: str) -> bytes:
    return read_file(folder / name, _MOST_BYTES[name])


def _file_digest(path: Path) -> str:
    try:
        if not path.is_file() or path.stat().st_size > _MOST_BYTES[path.name]:
            raise BuildError(f"{path} is no file, or larger than {_MOST_BYTES[path.name]} bytes: {_ADVICE}")
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BuildError(f"{path} cannot be read ({error}): {_ADVICE}") from error
