"""TVM's own tuner, MetaSchedule, on the kernels that ours tunes: the outside baseline of the benchmark ``tuning``.

It gets the same convolution (:mod:`lightning_baqe.benchmarks.metaschedule_workload`), one thread on the measuring core,
and what its documentation recommends for x86:

- space: ``PostOrderApply`` with the rules of TVM's design space for x86 tensorization (inlining, multi-level tiling
  ``SSRSRS`` with a tensor intrinsic, innermost factors up to 64, the epilogue fused at the first or second level or
  not, vectors up to 64, 0, 16, 64 or 512 unrolled steps, random compute locations) and its postprocessors; no parallel
  loops, since there is one thread;
- intrinsic: the stock one does not compile on LLVM 22, so it gets one of ours, made of the instructions that our
  template uses: ``vpdpbusd`` with VNNI; with AVX2 alone ``vpmaddubsw`` where the weights at hand allow it, else two
  ``vpmaddwd``. Chains of ``vpmaddubsw`` are the template's own. Where there is none of these the plain space;
- search: evolutionary, population 512, with its XGBoost cost model and mutators, each trial the mean of 100 ms (all its
  defaults); 64 trials an iteration, or a quarter of all where those are fewer than 256, so that the cost model learns.

Its log's best figures were chosen for being low, and on a busy machine also by chance. So its :data:`FINALISTS` best
schedules are measured freshly, in turns with our default and our tuned kernel, and its figure is the best of them. All
results are compared with the reference.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import tvm
from rich.console import Console
from rich.table import Table
from tvm.s_tir import TensorIntrin
from tvm.s_tir import meta_schedule as ms
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.target import Target
from tvm.tirx.script.builder import ir as B

from lightning_baqe.benchmarks.metaschedule_workload import (
    QUAD,
    check_workload,
    workload,
    workload_arguments,
    workload_result,
)
from lightning_baqe.benchmarks.setups import layers_text, table_of, text_of
from lightning_baqe.errors import BuildError
from lightning_baqe.files import Rows
from lightning_baqe.hardware.target import CpuTarget
from lightning_baqe.kernels.sample import sample_kernel
from lightning_baqe.kernels.specs import kernel_key
from lightning_baqe.kernels.x86.arithmetic import ARITHMETICS
from lightning_baqe.kernels.x86.conv_spec import ConvSpec
from lightning_baqe.measurement.device import Kernel
from lightning_baqe.tuning.bench import CONFIRM_ROUNDS, KernelBench, in_turns, save_arguments

FINALISTS = 4
FAILED_US = 1e12  # what failed has seconds of 1e10 in its log
TENSORIZED = ("vnni", "maddubs", "madd16")
TRIALS_PER_ITERATION = 64
BUILD_TIMEOUT_S = 300.0  # not its 30 s: a busy machine would kill what takes half a second on an idle one


def intrinsic(dot: str, lanes: int) -> str:
    """Register ``int32[lanes] += uint8[4] . int8[lanes, 4]`` in the instructions of a dot of :data:`TENSORIZED`.

    Returns:
        the tensor intrinsic's name.
    """
    name = f"lightning_baqe_{dot}_{lanes}x{QUAD}"
    if TensorIntrin.get(name, allow_missing=True) is None:
        description = _function("description", lanes, functools.partial(_loops, lanes))
        implementation = _function("implementation", lanes, functools.partial(_instructions, dot, lanes))
        TensorIntrin.register(name, description, implementation)
    return name


def _function(name: str, lanes: int, write_body: Callable[[Any, Any, Any], None]) -> Any:
    """A function of inputs ``(4)``, weights ``(lanes, 4)`` and sums ``(lanes)``."""
    with IRBuilder() as builder, B.prim_func(s_tir=True):
        B.func_name(name)
        inputs = B.arg("A", B.buffer((QUAD,), "uint8", offset_factor=1))
        weights = B.arg("W", B.buffer((lanes, QUAD), "int8", offset_factor=1))
        sums = B.arg("C", B.buffer((lanes,), "int32", offset_factor=1))
        with B.sblock("root"):
            B.reads(sums[0:lanes], inputs[0:QUAD], weights[0:lanes, 0:QUAD])
            B.writes(sums[0:lanes])
            write_body(inputs, weights, sums)
    return builder.get()


def _loops(lanes: int, inputs: Any, weights: Any, sums: Any) -> None:
    with B.grid(lanes, QUAD) as (lane, inner), B.sblock("update"):
        i, j = B.axis.remap("SR", [lane, inner])
        B.buffer_store(sums, sums[i] + inputs[j].astype("int32") * weights[i, j].astype("int32"), [i])


def _instructions(dot: str, lanes: int, inputs: Any, weights: Any, sums: Any) -> None:
    word = T.reinterpret(inputs.vload([0], f"uint8x{QUAD}"), dtype="int32")
    vectors = [weights.vload([0, 0], f"int8x{lanes * QUAD}")]
    if dot == "madd16":  # even bytes and odd ones, widened
        pairs, eight = T.reinterpret(vectors[0], dtype=f"int16x{2 * lanes}"), T.broadcast(T.int16(8), 2 * lanes)
        vectors = [T.shift_right(T.shift_left(pairs, eight), eight), T.shift_right(pairs, eight)]
    total = ARITHMETICS[dot].step(sums.vload([0], f"int32x{lanes}"), [word], vectors, lanes)
    B.buffer_store(sums, total, [T.ramp(0, 1, lanes)])


def space(dot: str, lanes: int) -> Any:
    """MetaSchedule's design space for kernels in these instructions."""
    tiling = {
        "structure": "SSRSRS",
        "max_innermost_factor": 64,
        "reuse_write": ms.schedule_rule.ReuseType(req="may", levels=[1, 2], scope="global"),
    }
    tensorized = dot in TENSORIZED
    if tensorized:
        tile = ms.schedule_rule.MultiLevelTilingWithIntrin(intrinsic(dot, lanes), **tiling)
    else:
        tile = ms.schedule_rule.MultiLevelTiling(**tiling)
    inline = ms.schedule_rule.AutoInline(
        into_producer=False, into_consumer=True, inline_const_tensor=True, disallow_if_then_else=True,
        require_injective=True, require_ordered=True,
    )  # fmt: skip
    unroll = ms.schedule_rule.ParallelizeVectorizeUnroll(
        max_jobs_per_core=-1, max_vectorize_extent=64, unroll_max_steps=[0, 16, 64, 512], unroll_explicit=True
    )
    rules = [ms.schedule_rule.InlineConstantScalars(), inline, tile, unroll, ms.schedule_rule.RandomComputeLocation()]
    post = [
        ms.postproc.DisallowDynamicLoop(),
        ms.postproc.RewriteParallelVectorizeUnroll(),
        ms.postproc.RewriteReductionBlock(),
        *([ms.postproc.RewriteTensorize(vectorize_init_loop=True)] if tensorized else []),
    ]
    return ms.space_generator.PostOrderApply(sch_rules=rules, postprocs=post, mutator_probs="llvm")


def tune_kernel(spec: ConvSpec, target: CpuTarget, trials: int, seed: int, folder: Path) -> dict[str, Any]:
    """Let MetaSchedule tune one kernel from nothing, in a process of its own, pinned to the measuring core.

    Args:
        trials: schedules that it measures.
        seed: of its search.
        folder: for its database, its logs, what it prints (``printed.txt``) and the compiled kernels; emptied first.

    Returns:
        ``{"libraries": names of its best schedules' files, best in its log first, "log_us": their figures there,
        "ran": trials that ran, "seconds": wall clock}``.

    Raises:
        ConfigError: the kernel has no workload.
        BuildError: its process failed, or none of its schedules ran.
    """
    check_workload(spec)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_tune, spec, target, trials, seed, folder).result()
        except BrokenProcessPool as error:
            raise BuildError(f"MetaSchedule's process died, see {folder / 'printed.txt'}: {error}") from error


def _tune(spec: ConvSpec, target: CpuTarget, trials: int, seed: int, folder: Path) -> dict[str, Any]:
    with (folder / "printed.txt").open("w") as printed:
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # the core that kernels are measured on
    os.environ["TVM_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"
    try:
        return _searched(spec, target, trials, seed, folder)
    except (RuntimeError, ValueError) as error:  # TVM's own errors do not travel between processes
        raise BuildError(f"MetaSchedule failed, see {folder / 'printed.txt'}: {error}") from None


def _searched(spec: ConvSpec, target: CpuTarget, trials: int, seed: int, folder: Path) -> dict[str, Any]:
    started = time.monotonic()
    module = tvm.IRModule({"main": workload(spec, sample_kernel(spec).params)})
    chosen = Target({**target.tvm, "num-cores": 1})
    database = ms.tune_tir(
        module, chosen, str(folder), trials, num_trials_per_iter=max(1, min(trials // 4, TRIALS_PER_ITERATION)),
        builder=ms.builder.LocalBuilder(max_workers=1, timeout_sec=BUILD_TIMEOUT_S), space=space(spec.dot, spec.lanes),
        num_tuning_cores=1, seed=seed,
    )  # fmt: skip
    ran = {
        record: 1e6 * statistics.mean(map(float, record.run_secs)) if record.run_secs else FAILED_US
        for record in database.get_all_tuning_records()
    }
    best = sorted((record for record in ran if ran[record] < FAILED_US), key=lambda record: ran[record])[:FINALISTS]
    if not best:
        raise BuildError(f"none of MetaSchedule's {trials} schedules ran, see {folder / 'printed.txt'}")
    libraries = [f"best_{index}.so" for index in range(len(best))]
    for name, record in zip(libraries, best, strict=True):
        schedule = tvm.s_tir.Schedule(record.workload.mod)
        record.trace.apply_to_schedule(schedule, remove_postproc=False)
        tvm.compile(schedule.mod, target=chosen).export_library(str(folder / name))
    log_us, seconds = [ran[record] for record in best], time.monotonic() - started
    return {"libraries": libraries, "log_us": log_us, "ran": len(ran), "seconds": seconds}


def compare_kernel(
    bench: KernelBench, tuned_knobs: Mapping[str, Any], libraries: Sequence[Path], folder: Path
) -> dict[str, Any]:
    """Our default, our tuned kernel and MetaSchedule's best ones, measured in turns.

    Args:
        bench: of our kernel; its records get the fresh figures.
        libraries: MetaSchedule's best schedules.
        folder: for their arguments.

    Returns:
        ``{"default_us", "tuned_us", "metaschedule_us", "exact", "error"}``: the fastest sample of each, None where it
        failed; whether all of MetaSchedule's results were right; why there is no figure.
    """
    assert isinstance(bench.spec, ConvSpec)
    sample = sample_kernel(bench.spec)
    arguments = folder / "arguments.npz"
    save_arguments(arguments, workload_arguments(sample), workload_result(sample))
    ours = [bench.default] if dict(tuned_knobs) == bench.default else [bench.default, dict(tuned_knobs)]
    files = [functools.partial(lambda path: (path, arguments), path) for path in libraries]
    questions = [functools.partial(bench.ask, knobs) for knobs in ours]
    questions += [functools.partial(bench.device.measure_kernel, Kernel(pair)) for pair in files]
    turns = in_turns(questions, CONFIRM_ROUNDS)
    theirs = turns[len(ours) :]
    right = [one.latency_us for one in theirs if one.error is None and one.latency_us is not None]
    for knobs, one in zip(ours, turns, strict=False):
        bench.keep(knobs, one)
    default, tuned = (one.latency_us if one.error is None else None for one in (turns[0], turns[len(ours) - 1]))
    return {
        "default_us": default,
        "tuned_us": tuned,
        "metaschedule_us": min(right, default=None),
        "exact": all(one.exact for one in theirs),
        "error": None if right else theirs[0].error,
    }


def compare(
    kernels: Mapping[ConvSpec, tuple[tuple[str, ...], KernelBench, dict[str, Any]]],
    trials: int,
    seed: int,
    folder: Path,
    console: Console,
) -> list[dict[str, Any]]:
    """Tune kernels with MetaSchedule and compare; what the folder holds of it is not done again, failures neither.

    Args:
        kernels: ``{kernel: (layers that call it, bench, our tuned knobs)}``.
        trials, seed: of MetaSchedule.

    Returns:
        for each kernel ``{"kernel", "layers", "macs", "trials", "seconds", "log_us", "tuned_knobs"}`` and the figures
        of :func:`compare_kernel`; those are missing, but for the error, where MetaSchedule failed.
    """
    tuned, compared = Rows(folder / "metaschedule_tuned.jsonl"), Rows(folder / "metaschedule.jsonl")
    found = []
    for spec, (layers, bench, knobs) in kernels.items():
        key: dict[str, Any] = {"kernel": kernel_key(spec, {}), "trials": trials}
        place = folder / "metaschedule" / f"{key['kernel']}_{trials}"
        row = _newest(tuned, key)
        if row is None:
            console.print(f"MetaSchedule tunes {layers[0]}, {trials} trials", markup=False)
            started = time.monotonic()
            try:
                result = tune_kernel(spec, bench.target, trials, seed, place) | {"error": None}
            except BuildError as error:
                seconds = time.monotonic() - started
                result = {"libraries": [], "log_us": [], "ran": 0, "seconds": seconds, "error": str(error)}
            row = key | result
            tuned.append(row)
        entry = {"layers": list(layers), "macs": spec.macs, "tuned_knobs": dict(knobs)}
        entry |= {name: row[name] for name in ("kernel", "trials", "seconds", "log_us")}
        known = _newest(compared, key | {"tuned_knobs": dict(knobs)})
        if known is None:
            known = entry | {"error": row["error"]}
            if row["error"] is None:
                known |= compare_kernel(bench, knobs, [place / name for name in row["libraries"]], place)
            compared.append(known)
        found.append(known)
    return found


def _newest(rows: Rows, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    matching = (row for row in reversed(rows.read()) if all(row[name] == value for name, value in wanted.items()))
    return next(matching, None)


def metaschedule_table(rows: list[dict[str, Any]], ours_seconds: float | None = None) -> Table:
    """Rows of :func:`compare`: ours with default and tuned knobs, MetaSchedule's, and its time over ours (tuned).

    The title has ``ours_seconds``, which our tuner took for all kernels of the network.
    """
    took = "" if ours_seconds is None else f"; our tuner took {ours_seconds:.0f} s for all kernels"
    headings = ("layers", "MMAC", "ours default us", "ours tuned us", "MetaSchedule us", "ratio", "exact", "trials",
                "tuning s")  # fmt: skip
    cells = []
    for row in rows:
        theirs, tuned = row.get("metaschedule_us"), row.get("tuned_us")
        figures = [text_of(row.get(name), ".1f", "failed") for name in ("default_us", "tuned_us", "metaschedule_us")]
        ratio = f"{theirs / tuned:.2f}" if theirs and tuned else ""
        exact = "" if row["error"] else row["exact"]
        start = (layers_text(row["layers"]), f"{row['macs'] / 1e6:.1f}")
        cells.append([*start, *figures, ratio, exact, row["trials"], f"{row['seconds']:.0f}"])
    table = table_of(f"TVM's MetaSchedule, measured in turns with ours{took}", headings, ("layers",), cells)
    failed = [f"{row['layers'][0]}: {row['error']}" for row in rows if row["error"]]
    table.caption = "\n".join(failed) or None
    return table
