"""How a run is ended from outside: Ctrl-C and SIGTERM alike end it in order, once, and not in the middle of a step."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

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


class _Postponement:
    """Signals kept back from the handlers that would have got them."""

    def __init__(self) -> None:
        self.kept: list[int] = []
        self.ended = False
        self.handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}

    def begin(self) -> None:
        for number in STATUS:
            handler = signal.getsignal(number)
            if callable(handler):  # else the system's own, which raises nothing here
                self.handlers[number] = handler
                signal.signal(number, self._keep)

    def _keep(self, number: int, frame: FrameType | None) -> None:
        if self.ended:
            self.handlers[number](number, frame)
            return
        self.kept.append(number)
        if len(self.kept) >= _MOST:
            os._exit(STATUS[signal.Signals(number)])

    def deliver(self) -> None:
        while self.kept:
            number = self.kept.pop(0)
            self.handlers[number](number, None)

    def end(self) -> None:
        self.ended = True  # what comes from now on goes through
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.deliver()


_postponement: _Postponement | None = None  # the main thread's


@contextmanager
def postponed() -> Iterator[None]:
    """Keep SIGINT and SIGTERM back until the block ends, or calls :func:`heed`; the third ends the process at once.

    For what must not be left half-way: a transaction, which would keep the database locked for as long as anything
    refers to it; a compiler, which takes an exception in one of its callbacks for an error of its own. Inside another
    such block, and in a thread that is not the main one, nothing is changed.
    """
    global _postponement
    if _postponement is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    _postponement = found = _Postponement()
    try:
        found.begin()
        yield
    finally:
        _postponement = None
        found.end()


def heed() -> None:
    """Let through what :func:`postponed` keeps back: nothing is half-way here."""
    if _postponement is not None and threading.current_thread() is threading.main_thread():
        _postponement.deliver()


def interruption(error: BaseException | None) -> KeyboardInterrupt | None:
    """The interruption that an error is or came from: Lightning makes an exit with status 1 of one."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error


def status_of(error: KeyboardInterrupt) -> int:
    """The exit status of an interrupted run."""
    return STATUS[signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT]
