"""What ran out is told from other faults, wherever in a chain of errors it stands."""

from __future__ import annotations

import errno
import sqlite3

import pytest

from lightning_baqe.resources import shortage


def chained(first: BaseException, second: BaseException) -> BaseException:
    second.__cause__ = first
    return second


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x"), "free some space"),
        (chained(OSError(errno.EMFILE, "Too many open files"), ValueError("no")), "ulimit"),
        (chained(sqlite3.OperationalError("database or disk is full"), RuntimeError("storage")), "free some space"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), "memory"),
        (RuntimeError("unable to write to file </torch_1>: No space left on device (28)"), "free some space"),
        (MemoryError(), "memory"),
        (OSError(errno.EROFS, "Read-only file system"), "read-only"),
    ],
)
def test_what_is_missing(error: BaseException, said: str) -> None:
    found = shortage(error)
    assert found is not None
    assert said in found


@pytest.mark.parametrize("error", [ValueError("full"), FileNotFoundError(errno.ENOENT, "none"), RuntimeError("shape")])
def test_other_faults(error: BaseException) -> None:
    assert shortage(error) is None
