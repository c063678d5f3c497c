"""What a machine can run out of, told from what is wrong with a program."""

from __future__ import annotations

import errno
import re
import shutil
import sqlite3
from collections.abc import Iterator

from lightning_baqe.errors import BaqeError

ROOM_BYTES = 16 << 20  # of scratch space for whatever is compiled at once

_BY_NUMBER = {
    **dict.fromkeys(
        (errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "the disk, or your share of it, is full: free some space"
    ),
    errno.EROFS: "the folder is read-only: give another run_dir, or LIGHTNING_BAQE_CACHE for caches",
    errno.EIO: "the disk does not answer: look at the system's log",
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "no more files can be opened: raise the limit (ulimit -n 4096)"),
    **dict.fromkeys(
        (errno.ENOMEM, errno.EAGAIN), "memory or processes ran out: end others, or train on smaller batches"
    ),
}
_BY_TEXT = {
    r"No space left on device|database or disk is full": _BY_NUMBER[errno.ENOSPC],
    r"readonly database|Read-only file system": _BY_NUMBER[errno.EROFS],
    r"Too many open files": _BY_NUMBER[errno.EMFILE],
    r"can.t allocate memory|Cannot allocate memory|unable to mmap|out of memory": _BY_NUMBER[errno.ENOMEM],
    r"/dev/shm|shared memory": "there is too little shared memory: give data.num_workers=0, or a larger /dev/shm",
}


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def shortage(error: BaseException) -> str | None:
    """What was missing and what to do, if that is what an error, or one that it came from, is about; None otherwise."""
    for one in _chain(error):
        if isinstance(one, MemoryError):
            return _BY_NUMBER[errno.ENOMEM]
        if isinstance(one, OSError) and one.errno in _BY_NUMBER:
            return _BY_NUMBER[one.errno]
        # PyTorch, SQLite, linkers and the measuring process tell in words only.
        if isinstance(one, RuntimeError | OSError | sqlite3.Error | BaqeError):
            for pattern, advice in _BY_TEXT.items():
                if re.search(pattern, str(one)):
                    return advice
    return None


def want_room(folder: str, room_bytes: int = ROOM_BYTES) -> None:
    """See that there is room on a disk before something is compiled: LLVM ends the process where there is none.

    Raises:
        OSError: ENOSPC, there is less.
    """
    free = shutil.disk_usage(folder).free
    if free < room_bytes:
        why = f"No space left on device: {free} bytes are free, {room_bytes} wanted to compile"
        raise OSError(errno.ENOSPC, why, folder)
