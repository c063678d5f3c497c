"""The bar, the table and the file of a tuning run."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from small_graphs import Maker

from lightning_baqe.hardware.options import BuildOptions
from lightning_baqe.hardware.target import get_target
from lightning_baqe.measurement.database import KernelRecord
from lightning_baqe.tuning.tune_report import step_text, tune_progress, tuning_line, tuning_table, write_tuning
from lightning_baqe.tuning.tuner import Step, TunedKernel, TuneResult, tunable_layers

KNOBS = {"tile": "1x1x2", "order": "pixels", "unroll": 2, "weights": "bytes"}
GOOD = Step(1, 20, "conv", KernelRecord(KNOBS, 12.5, [12.5], True), 250.0, 0.5)
FAILED = Step(2, 20, "conv", KernelRecord(KNOBS, None, [], None, "crashed"), None, None)


@pytest.fixture
def result() -> TuneResult:
    maker = Maker(16, 8)
    maker.conv(maker.conv(out=16, kernel=1, name="a"), out=16, kernel=1, name="b")
    maker.conv("b", out=32, kernel=3, limits=None, name="c")
    kernels = []
    for spec, layers in tunable_layers(maker.graph(), BuildOptions(get_target("vnni512"))).items():
        figures = (spec.macs / 1e5, spec.macs / 2e5) if "c" in layers else (None, None)
        known = (7, 1, 3, 2) if "c" in layers else (1, 0, 1, 1)
        kernels.append(TunedKernel(spec, layers, *figures, KNOBS if figures[0] else None, 400.0, *known))
    return TuneResult(tuple(kernels), 12.0, False)


def test_steps_as_text() -> None:
    assert step_text(GOOD) == "conv pixels 1x1x2 2 bytes: 12.5 us, 250 GMAC/s, 50% of peak"
    assert step_text(FAILED) == "conv pixels 1x1x2 2 bytes: crashed"


@pytest.mark.parametrize("terminal", [False, True])
def test_progress(terminal: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200)
    with tune_progress(console) as show:
        for done in range(1, 21):
            show(Step(done, 20, "conv[1]", GOOD.record, 250.0, 0.5))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "conv[1] pixels 1x1x2 2 bytes: 12.5 us, 250 GMAC/s, 50% of peak" in text
    assert "20/20" in text
    if not terminal:
        assert len(text.splitlines()) == 10


def test_table(result: TuneResult) -> None:
    console = Console(file=io.StringIO(), width=160)
    console.print(tuning_table(result))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "200" in text  # macs / (macs / 2e5 us) = 2e5 / us
    assert "50%" in text
    assert "2.00" in text
    line = tuning_line(result, 30.0)
    assert "3 of them failed" in line
    assert "1 of them gave wrong results" in line
    assert "30 s ended it" in line


def test_file(result: TuneResult, tmp_path: Path) -> None:
    path = write_tuning(tmp_path, result, {"recipe": "tune", "device": {"threads": 1}})
    content = json.loads(path.read_text())
    assert content["recipe"] == "tune"
    assert content["device"]["threads"] == 1
    (tuned,) = [kernel for kernel in content["kernels"] if kernel["layers"] == ["c"]]
    assert (tuned["speedup"], tuned["gmacs"], tuned["share"], tuned["knobs"]) == (2.0, 200.0, 0.5, KNOBS)
    others = [kernel for kernel in content["kernels"] if kernel["layers"] != ["c"]]
    assert all(kernel["best_us"] is None and kernel["speedup"] == 1.0 for kernel in others)
    assert content["best_us"] == tuned["best_us"]
