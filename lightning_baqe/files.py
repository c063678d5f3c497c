"""Files: read within bounds, replaced in one step; rows that are on the disk before the next is measured.

What is read may be damaged, or made to do harm. So no more memory is taken than the reader allows, whatever a file says
of itself, nothing is unpickled, and whatever is wrong is one DataError that names the file and the place in it.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import re
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from lightning_baqe.errors import ConfigError, DataError
from lightning_baqe.scratch import scratch_path

if TYPE_CHECKING:
    from pydantic import TypeAdapter

_MOST_KEPT = 256 << 20  # bytes of a file of `kept`
MIB = 1 << 20
_Schema = TypeVar("_Schema")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_SHOWN = 80  # characters of a value in a message
_ZIP_ERRORS = (
    *(OSError, EOFError, ValueError, KeyError, OverflowError, RuntimeError, struct.error),
    *(zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, SyntaxError),
)


def read_file(path: Path, most_bytes: int) -> bytes:
    """All of a file.

    Raises:
        DataError: it is missing, unreadable, larger than ``most_bytes``, or a pipe or device, which may have no end.
    """
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            raise DataError(f"{path} is no file but a folder, pipe or device: give a file.")
        size = about.st_size
        if size <= most_bytes:
            with path.open("rb") as file:
                content = file.read(size + 1)  # no more: a reader reserves all that it asks for
            size = len(content)
    except (OSError, ValueError) as error:  # ValueError: a NUL in its name
        raise DataError(f"{path} cannot be read ({error}): give a file that can.") from error
    if size > most_bytes:
        raise DataError(f"{path} has {size} bytes, files of its kind have at most {most_bytes}: give another.")
    return content


def unpack_gzip(content: bytes, most_bytes: int, name: str) -> bytes:
    """What gzip packed; DataError, which calls it ``name``, where it is none or more than ``most_bytes``."""
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
            unpacked = file.read(most_bytes + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{name} is no gzip file, or a damaged one ({error}): take an undamaged copy.") from error
    if len(unpacked) > most_bytes:
        raise DataError(f"{name} unpacks to more than {most_bytes} bytes, the most for its kind: give another.")
    return unpacked


def parse_json(content: bytes | str, name: str, constants: bool = False) -> Any:
    """JSON in UTF-8 and nothing beyond it: no key twice, no NaN, no numbers that a float cannot hold.

    Args:
        content: may begin with a byte order mark, as Windows writes one.
        name: what messages call it: a file, with the line if there are several.
        constants: take NaN and the infinities, as Python writes them.

    Raises:
        DataError: it is something else; says where.
    """

    def constant(text: str) -> float:
        if not constants:
            raise ValueError(f"{text} is no number of JSON")
        return float(text)

    try:
        text = content if isinstance(content, str) else content.decode("utf-8-sig")
        found = json.loads(text, object_pairs_hook=_once, parse_constant=constant, parse_float=_number)
        if not text.isascii() or _SURROGATE.search(text):
            json.dumps(found, ensure_ascii=False).encode()  # halves of a character alone are no UTF-8
        return found
    except (ValueError, RecursionError) as error:
        place = f"{error}" if not isinstance(error, RecursionError) else "it is nested too deeply"
        raise DataError(f"{name} is not whole JSON in UTF-8 ({place}): take an undamaged copy.") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands there twice")
    return found


def _number(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text} is larger than any float")
    return value


def check_schema(schema: TypeAdapter[_Schema], content: Any, name: str, advice: str) -> _Schema:
    """Content as its schema has it; DataError, which names the place, what stands there, and gives the advice."""
    from pydantic import ValidationError  # slow to import; most users of this module read no schema

    try:
        return schema.validate_python(content)
    except ValidationError as error:
        first, more = error.errors()[0], error.error_count() - 1
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise DataError(
            f"{name}: {place}: {first['msg']}, it holds {str(first['input'])[:_SHOWN]}"
            f"{f' (and {more} more)' if more else ''}; {advice}"
        ) from error


def read_arrays(content: bytes, name: str) -> dict[str, np.ndarray]:
    """Arrays that ``numpy.savez`` wrote, unpacked; numbers alone, each as large as it is in the file.

    Raises:
        DataError: it is no such archive, is damaged, or holds something else; says which array.
    """
    arrays: dict[str, np.ndarray] = {}
    what = "it"
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for member in archive.infolist():
                what = repr(member.filename)
                if member.filename in arrays or member.compress_type != zipfile.ZIP_STORED:
                    raise ValueError("compressed, or there twice")
                arrays[member.filename] = _array(archive.read(member))
    except _ZIP_ERRORS as error:
        raise DataError(f"{name}: {what} is no whole array ({error}): take an undamaged copy.") from error
    return {key.removesuffix(".npy"): array for key, array in arrays.items()}


def _array(content: bytes) -> np.ndarray:
    """One ``.npy`` file; ValueError where its header says something else than is there."""
    file = io.BytesIO(content)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("not version 1.0 of the format")
    shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.kind not in "biuf":
        raise ValueError(f"no numbers but {dtype}")
    if math.prod(shape) * dtype.itemsize != len(content) - file.tell():
        raise ValueError(f"{len(content) - file.tell()} bytes for {shape} of {dtype}")
    array = np.frombuffer(content, dtype, offset=file.tell())
    return array.reshape(shape, order="F" if by_columns else "C")


def replace_file(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that a reader sees the old or the new file, never a part of one.

    Raises:
        OSError: the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = scratch_path(path)
    try:
        scratch.write_bytes(content)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def make_folder(path: Path, argument: str) -> Path:
    """Make a folder, or find one, and see that files can be made in it.

    Args:
        path: of the folder.
        argument: what the user calls it, for the message.

    Raises:
        ConfigError: it cannot be made or written, or is a file.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise ConfigError(f"{argument}={path} cannot be made or written ({error}): give another {argument}.") from error


def cache_folder() -> Path:
    """``$LIGHTNING_BAQE_CACHE``, else ``$XDG_CACHE_HOME/lightning_baqe``, else ``~/.cache/lightning_baqe``."""
    base = os.environ.get("LIGHTNING_BAQE_CACHE")
    if base is not None:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_baqe"


class Rows:
    """A file with one JSON object a line; a row is in it as soon as it is finished, so that the same work can go on.

    Args:
        path: of the file; made with its first row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """All finished rows, oldest first; one that a killed process cut off is none.

        Raises:
            DataError: a line that is no row.
        """
        if not self.path.exists():
            return []
        lines = read_file(self.path, 4096 * MIB).split(b"\n")[:-1]
        rows = []
        for number, line in enumerate(lines, 1):
            row = parse_json(line, f"{self.path}, line {number},", constants=True)
            if not isinstance(row, dict):
                raise DataError(f"{self.path}, line {number} is no row but {str(row)[:_SHOWN]}: remove that line.")
            rows.append(row)
        return rows

    def of(self, key: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The finished rows whose ``"key"`` is this one as JSON holds it, oldest first.

        Raises:
            DataError: a line that is no row.
        """
        wanted = json.loads(json.dumps(key))  # a tuple is a list there
        return [row for row in self.read() if row.get("key") == wanted]

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row, in one write, and see it to the disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b", buffering=0) as file:
            content = self.path.read_bytes()
            if not content.endswith(b"\n"):
                file.truncate(content.rfind(b"\n") + 1)  # what was cut off; an empty file stays empty
            file.write((json.dumps(row) + "\n").encode())
            os.fsync(file.fileno())


def kept(path: Path, signature: Mapping[str, Any], make: Callable[[], Any]) -> Any:
    """What a file holds, made where there is none.

    Args:
        path: of the file, JSON.
        signature: what the content depends on, as JSON holds it.
        make: the content, as JSON holds it.

    Raises:
        ConfigError: the file was made for something else; names what differs.
        DataError: it cannot be read, or numbers that were made are not finite.
    """
    wanted = json.loads(json.dumps(signature))
    if not path.exists():
        content = make()
        try:
            text = json.dumps({"signature": wanted, "content": content}, indent=1, allow_nan=False)
        except ValueError as error:
            raise DataError(
                f"{path.name} would hold numbers that are not finite: see to the data, and to the network"
            ) from error
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, text.encode())
        return content
    found = parse_json(read_file(path, _MOST_KEPT), str(path))
    if not isinstance(found, dict) or not isinstance(found.get("signature"), dict) or "content" not in found:
        raise DataError(f"{path} is none of this package's files: remove it, and it is made anew")
    theirs = found["signature"]
    differing = [name for name in {**wanted, **theirs} if wanted.get(name) != theirs.get(name)]
    if differing:
        raise ConfigError(
            f"{path} was made for other {', '.join(differing)} than this run has: remove it, and it is made anew, or "
            "give another run_dir"
        )
    return found["content"]
