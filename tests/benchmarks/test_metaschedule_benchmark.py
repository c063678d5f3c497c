"""MetaSchedule beside our tuner: its workload is our kernel's, its intrinsics are exact, its failures are told."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from rich.console import Console
from small_graphs import Maker
from tvm.s_tir import meta_schedule as ms
from tvm.target import Target

from lightning_baqe.benchmarks import metaschedule, tuning
from lightning_baqe.benchmarks.metaschedule import TENSORIZED, compare, metaschedule_table, space
from lightning_baqe.benchmarks.metaschedule_workload import workload, workload_arguments, workload_result
from lightning_baqe.errors import BuildError, ConfigError
from lightning_baqe.hardware.target import CpuTarget, can_run, get_target
from lightning_baqe.kernels.sample import sample_kernel
from lightning_baqe.kernels.x86.conv_spec import ConvSpec
from lightning_baqe.kernels.x86.layout import Layout
from lightning_baqe.measurement.local import Local
from lightning_baqe.tuning.bench import KernelBench

DOTS = {"vnni512": "vnni", "avxvnni": "vnni", "avx2": "madd16", "portable": "portable"}


def spec_of(target: CpuTarget, channels: int = 32, out: int = 32, size: int = 6, kernel: int = 3, stride: int = 1,
            **others: Any) -> ConvSpec:  # fmt: skip
    padding = kernel // 2
    stored = channels if channels < 16 else -(-channels // 16) * 16
    source = Layout(channels, size, size, stored, (padding, padding), "uint8")
    end = -(-size // stride)
    result = Layout(out, end, end, -(-out // 16) * 16, (1, 1), "uint8")
    return ConvSpec(
        DOTS[target.path], target.lanes, target.registers, source, result, (kernel, kernel), (stride, stride),
        (1, 1), padding, padding, **{"chain": 1, "epilogue": "requant", **others},
    )  # fmt: skip


NATIVE = get_target()
RESIDUAL = Layout(32, 6, 6, 32, (2, 2), "uint8")
SPECS = {
    "padded": spec_of(NATIVE),
    "shift of 32 or more": spec_of(NATIVE, high=True),
    "wide requantization": spec_of(NATIVE, narrow=False),
    "stem": spec_of(NATIVE, channels=3, size=12, kernel=7, stride=2),
    "downsample": spec_of(NATIVE, channels=80, kernel=1, stride=2),
    "spare output channels": spec_of(NATIVE, out=10, kernel=1),
    "residual sum": spec_of(NATIVE, epilogue="requant_add", residual=RESIDUAL),
    "wide residual sum": spec_of(NATIVE, epilogue="requant_add", residual=RESIDUAL, narrow_add=False),
    "sums": dataclasses.replace(spec_of(NATIVE, epilogue="acc"), result=Layout(32, 6, 6, 32, (0, 0), "int32")),
}


def run(spec: ConvSpec, module: Any, target: CpuTarget) -> np.ndarray:
    sample = sample_kernel(spec)
    want = workload_result(sample)
    result = tvm.runtime.empty(want.shape, str(want.dtype))
    arguments = [tvm.runtime.tensor(array) for array in workload_arguments(sample)]
    tvm.compile(module, target=Target(target.tvm))["main"](*arguments, result)
    assert want.std() > 0
    np.testing.assert_array_equal(result.numpy(), want)
    return want


@pytest.mark.parametrize("name", SPECS)
def test_workload_is_our_kernel(name: str) -> None:
    spec = SPECS[name]
    result = run(spec, tvm.IRModule({"main": workload(spec, sample_kernel(spec).params)}), NATIVE)
    assert result.shape == (spec.blocks, spec.result.height, spec.result.width, spec.lanes)


@pytest.mark.slow  # a context of MetaSchedule imports all tensor intrinsics of TVM, which takes half a minute
@pytest.mark.parametrize(
    ("path", "dot"), [("vnni512", "vnni"), ("avxvnni", "vnni"), ("avx2", "madd16"), ("avx2", "maddubs")]
)
def test_tensorized_schedules_are_exact(path: str, dot: str) -> None:
    if not can_run(path):
        pytest.skip(f"this CPU does not run {path}")
    target = get_target(path)
    spec = dataclasses.replace(spec_of(target), dot=dot)
    module = tvm.IRModule({"main": workload(spec, sample_kernel(spec).params)})
    context = ms.TuneContext(
        mod=module, target=Target({**target.tvm, "num-cores": 1}), space_generator=space(dot, target.lanes),
        search_strategy="replay-trace", task_name="main", rand_state=1, num_threads=1,
    )  # fmt: skip
    schedules = context.generate_design_space()
    assert schedules
    finished = [s for s in schedules if all(step.apply(s) for step in context.space_generator.postprocs)]
    assert finished
    text = str(finished[-1].mod)
    assert "call_llvm_pure_intrin" in text  # tensorized, or the baseline is crippled
    run(spec, finished[-1].mod, target)


def test_what_has_no_workload() -> None:
    for wrong in ({"groups": 2}, {"threads": 2}, {"dot": "fma"}):
        spec = dataclasses.replace(spec_of(NATIVE), **wrong)
        with pytest.raises(ConfigError, match="dense integer convolutions on one thread"):
            workload(spec, np.zeros(12, np.int64))


def test_plain_space_without_an_intrinsic() -> None:
    assert "portable" not in TENSORIZED
    assert len(space("portable", 4).postprocs) == 3


def test_a_failure_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def fail(*_: Any) -> Any:
        asked.append(1)
        raise BuildError("MetaSchedule failed: no schedule")

    monkeypatch.setattr(metaschedule, "tune_kernel", fail)
    bench = KernelBench(SPECS["padded"], NATIVE, Local(tmp_path / "records.db"), tmp_path / "kernels")
    kernels = {SPECS["padded"]: (("a", "b"), bench, bench.default)}
    rows = compare(kernels, 4, 0, tmp_path, Console())
    assert compare(kernels, 4, 0, tmp_path, Console()) == rows
    assert len(asked) == 1
    Console(width=150).print(metaschedule_table(rows, 12.0))
    shown = capsys.readouterr().out
    assert "a +1" in shown
    assert "failed" in shown
    assert "a: MetaSchedule failed: no schedule" in shown


def test_wrong_options(capsys: pytest.CaptureFixture[str]) -> None:
    for options, reason in (
        (["--metaschedule", "-1"], "--metaschedule is at least 0"),
        (["--metaschedule", "4", "--threads", "2"], "on one thread, got --threads 2"),
    ):
        with pytest.raises(SystemExit):
            tuning.main(options)
        assert reason in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(1800)  # its processes import all tensor intrinsics of TVM, each for minutes on a slow machine
def test_a_small_kernel_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    maker = Maker(16, 8)
    maker.conv(maker.conv(out=32, padding=1, name="a"), out=16, kernel=1, limits=None, name="b")
    maker.requantize("b", (-128, 127))
    graph = maker.graph()
    monkeypatch.setattr(tuning.Setup, "graph", lambda self, model=None: graph)
    command = ["--candidates", "1", "--random", "1", "--rounds", "1", "--rebuild", "", "--folder", str(tmp_path)]
    command += ["--metaschedule", "4", "--metaschedule-kernels", "1"]
    tuning.main(command)
    assert "TVM's MetaSchedule" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "tuning.json").read_text())["metaschedule"]
    assert (row["layers"], row["trials"], row["error"], row["exact"]) == (["a"], 4, None, True)
    assert min(row["default_us"], row["tuned_us"], row["metaschedule_us"], row["seconds"]) > 0
    tuning.main(command)  # seconds would differ if it tuned again
    assert json.loads((tmp_path / "tuning.json").read_text())["metaschedule"] == [row]
