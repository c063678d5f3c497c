"""The benchmark of training steps in its smallest form."""

from __future__ import annotations

import pytest
import torch

from lightning_baqe.benchmarks.quantizers import __main__ as quantizers
from lightning_baqe.benchmarks.quantizers.candidates import CANDIDATES, Trainee, available

SMALL = ["--batch", "2", "--side", "32", "--rounds", "3", "--threads", "1"]


def test_a_comparison(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    generous = tuple((name, reference, 1000.0) for name, reference, _ in quantizers.LIMITS)
    monkeypatch.setattr(quantizers, "LIMITS", generous)  # a busy machine is no error here
    monkeypatch.setattr(quantizers, "MEMORY_LIMIT", 1000.0)
    threads = torch.get_num_threads()
    assert quantizers.main([*SMALL, "--candidates", "float", "ours"]) == 0
    shown = capsys.readouterr().out
    assert "1 threads: step of 2 images of 32x32" in shown
    assert "all limits are kept" in shown
    monkeypatch.setattr(quantizers, "MEMORY_LIMIT", 1e-6)
    assert quantizers.main([*SMALL, "--candidates", "float", "ours"]) == 1
    assert "of float's memory, 1e-06 allowed" in capsys.readouterr().out
    torch.set_num_threads(threads)


def test_ratios_are_those_of_the_same_round() -> None:
    times = {"a": [2.0, 40.0, 6.0], "b": [1.0, 10.0, 2.0]}
    assert quantizers.ratio_of(times, "a", "b")[1] == 3.0
    assert quantizers.ratio_of({"a": [3.0], "b": [2.0]}, "a", "b") == (1.5, 1.5, 1.5)


@pytest.mark.filterwarnings("ignore")  # other projects' own
@pytest.mark.parametrize("name", [name for name in available() if not CANDIDATES[name][1]])
def test_candidates_train(name: str) -> None:
    trainee = Trainee(name, 4, 32, torch.device("cpu"), channels_last=False)
    losses = [trainee.step() for _ in range(8)]
    assert losses[-1] < losses[0]
