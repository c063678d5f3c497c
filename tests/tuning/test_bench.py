"""Questions asked in turns."""

from __future__ import annotations

import pytest

from lightning_baqe.errors import BuildError
from lightning_baqe.measurement.device import REPEATS, KernelTurn
from lightning_baqe.tuning.bench import in_turns


def test_one_that_fails_is_not_asked_again_and_the_others_are() -> None:
    asked: list[str] = []

    def works() -> KernelTurn:
        asked.append("works")
        return KernelTurn((2.0,) * REPEATS, exact=True)

    def fails() -> KernelTurn:
        asked.append("fails")
        raise BuildError("LLVM refuses it")

    def lies() -> KernelTurn:
        asked.append("lies")
        return KernelTurn((), exact=False)

    good, refused, wrong = in_turns([works, fails, lies], rounds=3)
    assert asked == ["works", "fails", "lies", "works", "works"]
    assert (good.latency_us, len(good.samples_us), good.exact, good.error) == (2.0, 3 * REPEATS, True, None)
    assert (refused.latency_us, refused.exact, refused.error) == (None, None, "LLVM refuses it")
    assert (wrong.latency_us, wrong.exact, wrong.error) == (None, False, "its result differs from the reference")


def test_a_full_disk_is_no_word_on_a_kernel() -> None:
    def starves() -> KernelTurn:
        raise BuildError("ld: final link failed: No space left on device")

    with pytest.raises(BuildError, match="final link"):
        in_turns([starves], rounds=1)
