"""Files that are replaced in one step, and rows that are on the disk before the next is measured."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_baqe.errors import ConfigError, DataError


def replace_file(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that a reader sees the old or the new file, never a part of one.

    Raises:
        OSError: the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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
    """``$LIGHTNING_BAQE_CACHE``, by default ``~/.cache/lightning_baqe``."""
    base = os.environ.get("LIGHTNING_BAQE_CACHE")
    if base is not None:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lightning_baqe"


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
        rows = []
        for number, line in enumerate(self.path.read_text().split("\n")[:-1], 1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise DataError(f"{self.path}, line {number} is no row ({error}): remove that line.") from error
        return rows

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row, in one write, and see it to the disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b", buffering=0) as file:
            content = self.path.read_bytes()
            if not content.endswith(b"\n"):
                file.truncate(content.rfind(b"\n") + 1)  # what was cut off; an empty file stays empty
            file.write((json.dumps(row) + "\n").encode())
            os.fsync(file.fileno())
