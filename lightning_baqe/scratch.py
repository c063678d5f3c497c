"""Files and folders that exist while something is made, and what killed processes left of them.

Their names say which process they belong to, so that the next one can tell what nobody needs any more:
``.<name>.<process table>-<process>.tmp`` beside what is made, ``lightning_baqe-<process table>-<process>-...`` in the
system's temporary folder, or in memory.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import re
import shutil
import sys
import tempfile
import time
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning_baqe.resources import ROOM_BYTES, want_room

_MARK = re.compile(r"(?:^\..+\.|^lightning_baqe-)(?P<table>[0-9a-f]{8})-(?P<pid>[0-9]+)(?:\.tmp$|-)")
_MEMORY = "/dev/shm"
_FOREIGN_S = 7 * 24 * 3600.0  # after which another machine's are taken for left


@functools.cache
def process_table() -> str:
    """Name of the process table that this process is in: equal for two that can see each other by their ids."""
    found: list[Any] = [platform.node()]
    if sys.platform == "linux":
        with open("/proc/sys/kernel/random/boot_id") as file:
            found += [file.read().strip(), os.stat("/proc/self/ns/pid").st_ino]
    return "/".join(map(str, found))


def _mark() -> str:
    return f"{hashlib.sha256(process_table().encode()).hexdigest()[:8]}-{os.getpid()}"


def scratch_path(path: Path) -> Path:
    """Where to make what will be moved to ``path``: beside it, so that the move is one step."""
    return path.with_name(f".{path.name}.{_mark()}.tmp")


def scratch_folder(owner: object) -> Path:
    """A new folder in the system's temporary one, removed with its owner or with the process.

    Raises:
        OSError: none can be made, or there is no room to compile in it.
    """
    want_room(tempfile.gettempdir())
    folder = tempfile.mkdtemp(prefix=f"lightning_baqe-{_mark()}-")
    weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """A context with a new folder in the system's temporary one.

    Raises:
        OSError: none can be made, or there is no room to compile in it.
    """
    want_room(tempfile.gettempdir())
    return tempfile.TemporaryDirectory(prefix=f"lightning_baqe-{_mark()}-", ignore_cleanup_errors=True)


def compiling_folder() -> tempfile.TemporaryDirectory[str]:
    """A context with a new folder for a compiler's files: in memory where there is some, since LLVM ends the process
    when a disk becomes full; else as :func:`temporary_folder`.

    Raises:
        OSError: none can be made, or there is no room to compile in it.
    """
    if os.access(_MEMORY, os.W_OK | os.X_OK) and shutil.disk_usage(_MEMORY).free >= ROOM_BYTES:
        prefix = f"lightning_baqe-{_mark()}-"
        return tempfile.TemporaryDirectory(prefix=prefix, dir=_MEMORY, ignore_cleanup_errors=True)
    return temporary_folder()


def remove_leftovers(folders: Iterable[Path]) -> None:
    """Remove what processes that are dead left in these folders, and in the system's temporary ones."""
    for folder in (Path(tempfile.gettempdir()), Path(_MEMORY), *folders):
        with contextlib.suppress(OSError):  # not there, or not ours
            for path in list(folder.iterdir()):
                found = _MARK.match(path.name)
                if found and _is_left(path, found["table"], int(found["pid"])):
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def remove_leftovers_of_run(run_dir: Path) -> None:
    """Remove what killed processes left of a run."""
    remove_leftovers(run_dir / name for name in ("", "checkpoints", "artifacts"))


def _is_left(path: Path, table: str, pid: int) -> bool:
    if table != _mark().partition("-")[0]:
        return time.time() - path.lstat().st_mtime > _FOREIGN_S
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
