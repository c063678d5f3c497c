"""How a run is ended from outside: Ctrl-C and SIGTERM alike end it in order, once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}  # 128 and the signal, as shells have it
_MOST = 3  # signals after which nothing is waited for


class Terminated(KeyboardInterrupt):
    """SIGTERM: whatever ends in order on Ctrl-C does so here."""


@contextmanager
def ending_in_order() -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into KeyboardInterrupt or :class:`Terminated`; later ones do not disturb what it
    began, but the third ends the process at once.

    Signals stay disarmed after an interruption, so that none disturbs the interpreter's end either. In a thread that
    is not the main one nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:
            raise (Terminated if number == signal.SIGTERM else KeyboardInterrupt)
        if len(received) >= _MOST:
            os._exit(STATUS[signal.Signals(number)])
        print("Ending in order; once more ends at once.", file=sys.stderr)

    before = {number: signal.signal(number, handle) for number in STATUS}
    try:
        yield
    finally:
        if not received:
            for number, handler in before.items():
                signal.signal(number, handler)


def interruption(error: BaseException | None) -> KeyboardInterrupt | None:
    """The interruption that an error is or came from: Lightning makes an exit with status 1 of one."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error


def status_of(error: KeyboardInterrupt) -> int:
    """The exit status of an interrupted run."""
    return STATUS[signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT]
