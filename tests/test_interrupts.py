"""Signals end a run in order, once."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time

import pytest

from lightning_baqe.interrupts import Terminated, ending_in_order, heed, interruption, postponed, status_of


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_is_an_interruption(number: signal.Signals, status: int) -> None:
    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(KeyboardInterrupt) as caught, ending_in_order():
            signal.raise_signal(number)
        assert status_of(caught.value) == status
        assert isinstance(caught.value, Terminated) == (number == signal.SIGTERM)
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def test_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with ending_in_order():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_postponed_signal_comes_after_the_block() -> None:
    done = []

    def step() -> None:
        with postponed():
            signal.raise_signal(signal.SIGINT)
            done.append("block")
        done.append("after")

    with pytest.raises(KeyboardInterrupt):
        step()
    assert done == ["block"]
    with pytest.raises(KeyboardInterrupt):  # as before
        signal.raise_signal(signal.SIGINT)


def test_where_the_block_heeds_signals_they_come_there() -> None:
    done = []

    def step() -> None:
        with postponed():
            with postponed():  # changes nothing
                signal.raise_signal(signal.SIGINT)
            done.append("before")
            heed()
            done.append("after")

    with pytest.raises(KeyboardInterrupt):
        step()
    assert done == ["before"]
    heed()  # nothing is kept back: nothing happens


def test_an_error_of_the_block_does_not_hide_the_signal() -> None:
    def step() -> None:
        with postponed():
            signal.raise_signal(signal.SIGINT)
            raise ValueError

    with pytest.raises(KeyboardInterrupt) as caught:
        step()
    assert isinstance(caught.value.__context__, ValueError)


def test_handlers_come_back_after_a_block_and_the_systems_own_stay() -> None:
    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    assert before[signal.SIGTERM] == signal.SIG_DFL
    with postponed():
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) is not before[signal.SIGINT]
    assert {one: signal.getsignal(one) for one in before} == before


@pytest.mark.parametrize(("count", "status"), [(1, 143), (2, 143), (3, 143)])
def test_signals_in_a_block_of_an_ending_process(count: int, status: int) -> None:
    code = textwrap.dedent(
        f"""
        import signal, sys
        from lightning_baqe.interrupts import ending_in_order, postponed, status_of
        try:
            with ending_in_order():
                with postponed():
                    for _ in range({count}):
                        signal.raise_signal(signal.SIGTERM)
                    print("whole", flush=True)
                print("not reached", flush=True)
        except KeyboardInterrupt as error:
            sys.exit(status_of(error))
        """
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert found.returncode == status
    assert found.stdout == ("whole\n" if count < 3 else "")
    assert "Traceback" not in found.stderr


def test_what_an_error_came_from() -> None:
    def leave() -> None:  # as Lightning does
        try:
            raise Terminated
        except Terminated:
            sys.exit(1)

    with pytest.raises(SystemExit) as caught:
        leave()
    assert isinstance(interruption(caught.value), Terminated)
    assert interruption(ValueError()) is None


@pytest.mark.parametrize(("count", "status"), [(2, 0), (3, 143)])
def test_further_signals(count: int, status: int) -> None:
    """The second does not disturb the end, the third is one."""
    code = textwrap.dedent(
        """
        import time
        from lightning_baqe.interrupts import ending_in_order
        try:
            with ending_in_order():
                try:
                    print("begun", flush=True)
                    time.sleep(60)
                finally:
                    print("ending", flush=True)
                    start = time.monotonic()
                    while time.monotonic() < start + 2:
                        time.sleep(0.01)
                    print("ended", flush=True)
        except KeyboardInterrupt:
            pass
        """
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "ending\n"
    for _ in range(count - 1):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    out, error = process.communicate(timeout=30)
    assert process.returncode == status
    assert out == ("ended\n" if status == 0 else "")
    assert "Traceback" not in error
    assert "once more ends at once" in error
