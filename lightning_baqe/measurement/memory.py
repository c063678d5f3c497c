"""What a process keeps between networks, and how it lets go of it."""

from __future__ import annotations

import ctypes
import gc
import sys


def give_back_memory() -> None:
    """Free what only reference cycles hold, and return freed memory to the system.

    Traced networks are such cycles, and too few objects each for Python to collect them by itself; glibc keeps the
    pieces that compilations leave, tens of megabytes each.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)
