"""One file read under watch: what came of it, and that nothing of it ran, was started, or was written elsewhere."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lightning_baqe.errors import BaqeError

OUTCOMES = ("refused", "read", "traceback", "signal", "hang", "executed", "differs")
RIGHT = ("refused", "read")
LIMIT_S, LIMIT_BYTES = 30, 4 << 30


class Differs(Exception):
    """Interpreted and compiled results are not the same."""


class Executed(BaseException):
    """The file made something run; no `except` of the reader's may hide it."""


class Hang(BaseException):
    """Time is up; likewise."""


_watched: list[Path] = []  # the folder that may be written, while a file is read
_STARTS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pickle.find_class")


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watched:
        return
    if event in _STARTS:
        _watched.clear()
        raise Executed(f"{event} {arguments[:2]}")
    if event == "open" and isinstance(arguments[0], str) and isinstance(arguments[2], int):
        writes = arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        inside = Path(arguments[0]).absolute().is_relative_to(_watched[0]) or arguments[0].startswith(
            ("/dev/", "/proc/")
        )
        if writes and not inside:
            _watched.clear()
            raise Executed(f"wrote {arguments[0]}")


def start_watch() -> None:
    """Watch every file that :func:`outcome_of` reads from now on, to the end of this process."""
    sys.addaudithook(_audit)


@contextlib.contextmanager
def may_compile() -> Iterator[None]:
    """Compilers are started and write where they like."""
    folders = list(_watched)
    _watched.clear()
    try:
        yield
    finally:
        _watched.extend(folders)


def _alarm(number: int, frame: object) -> None:
    raise Hang


def outcome_of(read: Callable[[Path], object], folder: Path) -> tuple[str, str]:
    """One of :data:`OUTCOMES`, and what was said."""
    signal.signal(signal.SIGALRM, _alarm)
    signal.alarm(LIMIT_S)
    _watched[:] = [folder]
    try:
        read(folder)
    except BaqeError as error:
        return "refused", str(error)
    except Differs as error:
        return "differs", str(error)
    except Executed as error:
        return "executed", str(error)
    except (Hang, MemoryError) as error:
        return "hang", type(error).__name__
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {error}"
    else:
        return "read", ""
    finally:
        signal.alarm(0)
        _watched.clear()


def limit_memory() -> None:
    """From now on this process may take :data:`LIMIT_BYTES` more than it has."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (int(line.split()[1]) * 1024 + LIMIT_BYTES,) * 2)
