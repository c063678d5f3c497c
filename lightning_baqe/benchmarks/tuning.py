"""What tuning brings, and what it costs: ``python -m lightning_baqe.benchmarks.tuning --model resnet18``.

1. Each strategy tunes every kernel of the network from nothing, in a records database of its own, with the same number
   of candidates. A second run with the first strategy's records says how much it measures (nothing).
2. Every kernel with its default knobs, with each strategy's winner and with random knobs, measured in turns: figures
   that were chosen for being low are not compared, fresh ones are.
3. BAQE's Table X: latency of the whole network with default and with tuned knobs, in turns. The defaults are those that
   ship, chosen by the templates' cost estimates.
4. Seconds of a full build of another network from records, in a fresh process.
5. With ``--metaschedule TRIALS``: the kernels with most work once more by TVM's own tuner, MetaSchedule, measured in
   turns with ours (:mod:`lightning_baqe.benchmarks.metaschedule`). It takes minutes a kernel.

Everything measured is kept in a folder; the same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from lightning_baqe.benchmarks.metaschedule import compare, metaschedule_table
from lightning_baqe.benchmarks.setups import begin, check_positive, table_of
from lightning_baqe.deploy.digest import fingerprint
from lightning_baqe.engines.zoo import calibrated, settled_network
from lightning_baqe.errors import MeasurementError
from lightning_baqe.files import Rows, replace_file
from lightning_baqe.hardware.identity import versions
from lightning_baqe.hardware.options import BuildOptions
from lightning_baqe.hardware.target import get_target
from lightning_baqe.integer.graph import IntegerGraph
from lightning_baqe.integer.lowering import lower
from lightning_baqe.kernels.specs import kernel_key
from lightning_baqe.kernels.x86.conv_spec import ConvSpec
from lightning_baqe.measurement.build import build
from lightning_baqe.measurement.database import KernelRecord, Records
from lightning_baqe.measurement.device import Device
from lightning_baqe.measurement.local import Local
from lightning_baqe.measurement.measure import measure
from lightning_baqe.quantization.config import BitConfig
from lightning_baqe.tuning.bench import KernelBench, interleaved, kernel_space
from lightning_baqe.tuning.strategies import DeepKernel, Random, Ranked, SimulatedAnnealing, Strategy
from lightning_baqe.tuning.tune_report import kernel_entry, knobs_text, tune_progress
from lightning_baqe.tuning.tuner import TuneResult, tunable_layers, tune

STRATEGIES: dict[str, type[Strategy]] = {
    "ranked": Ranked,
    "random": Random,
    "sa_xgb": SimulatedAnnealing,
    "dkl_gp": DeepKernel,
}
MODEL_REPEATS, MODEL_WARMUP, MODEL_TIMEOUT_S = 10, 3, 120.0


@dataclass(frozen=True)
class Setup:
    """What may not change while a folder is filled.

    Args:
        model, size: torchvision's name, and the side of the image in pixels.
        bits: of weights and activations of all layers but the first and the last, which have 8.
        target, threads: compiled for.
        random: how many random knobs each kernel is measured with.
        seed: of weights, strategies and random knobs.
    """

    model: str
    size: int
    bits: int
    target: str
    threads: int
    random: int
    seed: int

    def graph(self, model: str | None = None) -> IntegerGraph:
        """The lowered network, random weights."""
        network, images = settled_network(model or self.model, size=self.size, seed=self.seed, num_classes=1000)
        return lower(calibrated(network, BitConfig.uniform(network, self.bits, self.bits), images), images[:1])


def open_folder(folder: Path, setup: Setup, device: Device) -> None:
    """Make the folder, or go on in one that was begun with the same setup on the same device and templates.

    Raises:
        ConfigError: it was begun with another.
    """
    begin(folder, {**asdict(setup), "fingerprint": fingerprint(device.info(setup.threads))})


def keeping(device: Device, folder: Path, strategy: str) -> Device:
    """The device with the database of one strategy."""
    return device.keeping(folder / f"records_{strategy}.db")


def run_strategy(
    name: str, graph: IntegerGraph, setup: Setup, candidates: int, device: Device, folder: Path, console: Console
) -> TuneResult:
    """Tune all kernels with one strategy; its seconds are kept, those of an interrupted run as well."""
    rows, started = Rows(folder / "runs.jsonl"), time.monotonic()
    result: TuneResult | None = None
    try:
        with tune_progress(console) as show:
            strategy, known = STRATEGIES[name](setup.seed), keeping(device, folder, name)
            options = BuildOptions(get_target(setup.target), setup.threads)
            result = tune(graph, options, candidates, None, known, strategy, show)
    finally:
        measured = None if result is None else result.measured
        row = {"strategy": name, "candidates": candidates, "seconds": time.monotonic() - started, "measured": measured}
        rows.append(row)
    return result


def compare_kernels(
    graph: IntegerGraph, setup: Setup, strategies: list[str], device: Device, folder: Path, console: Console
) -> list[dict[str, Any]]:
    """Each kernel's default, winners and random knobs, measured in turns.

    Returns:
        for each kernel ``{"kernel", "layers", "macs", "default", "winners", "random"}``: figures are ``{"knobs",
        "latency_us", "samples_us", "error"}``, winners by strategy.
    """
    target = get_target(setup.target)
    rows = Rows(folder / "compare.jsonl")
    layers = tunable_layers(graph, BuildOptions(target, setup.threads))
    wanted = {
        kernel_key(spec, {}): {n: keeping(device, folder, n).records.best_knobs(spec, target) for n in strategies}
        for spec in layers
    }
    done = {row["kernel"]: row for row in rows.read()}  # the last row of a kernel is the newest
    with tempfile.TemporaryDirectory(prefix="lightning_baqe-") as place:
        for spec, names in track(layers.items(), "compare kernels", console=console, total=len(layers)):
            key = kernel_key(spec, {})
            if key in done and {n: w["knobs"] for n, w in done[key]["winners"].items()} == wanted[key]:
                continue
            bench = KernelBench(spec, target, device.keeping(folder / "compare.db"), Path(place) / key)
            row = {"kernel": key, "layers": list(names), "macs": spec.macs}
            rows.append(row | _compared(bench, wanted[key], setup))
    newest = {row["kernel"]: row for row in rows.read()}
    return [newest[key] for key in wanted]


def _compared(bench: KernelBench, winners: dict[str, dict[str, Any] | None], setup: Setup) -> dict[str, Any]:
    default, *others = Random(setup.seed + 1).propose(kernel_space(bench.spec), [], 1 + setup.random)
    chosen = {name: knobs or default for name, knobs in winners.items()}
    distinct = {kernel_key(bench.spec, knobs): knobs for knobs in (default, *chosen.values(), *others)}
    figures = dict(
        zip(distinct, map(_figure, interleaved([(bench, knobs) for knobs in distinct.values()])), strict=True)
    )
    return {
        "default": figures[kernel_key(bench.spec, default)],
        "winners": {name: figures[kernel_key(bench.spec, knobs)] for name, knobs in chosen.items()},
        "random": [figures[kernel_key(bench.spec, knobs)] for knobs in others],
    }


def _figure(record: KernelRecord) -> dict[str, Any]:
    return {name: getattr(record, name) for name in ("knobs", "latency_us", "samples_us", "error")}


def table_x(
    graph: IntegerGraph, setup: Setup, strategy: str, rounds: int, device: Device, folder: Path
) -> dict[str, Any]:
    """Whole-network latency with default and with tuned knobs, in turns; each pair of figures is kept.

    Returns:
        ``{"default_us", "tuned_us", "ratio", "ratio_range", "fastest_us", "exact", "rounds"}``: medians over the
        rounds of each one's fastest inference, and of their ratios; the fastest inference of all rounds.
    """
    rows = Rows(folder / f"table_x_{strategy}.jsonl")
    options = BuildOptions(get_target(setup.target), setup.threads)
    artifacts = {
        "default": device.build(graph, options, "default"),
        "tuned": keeping(device, folder, strategy).build(graph, options),
    }
    digest = artifacts["tuned"].plan.digest
    image = torch.randn(1, *graph.input_shape, generator=torch.Generator().manual_seed(setup.seed))
    reference = graph.run(image)
    exact = {name: bool(torch.equal(device.run(artifact, image), reference)) for name, artifact in artifacts.items()}
    with tempfile.TemporaryDirectory(prefix="lightning_baqe-") as place:
        saved = {name: str(artifact.save(Path(place) / name)) for name, artifact in artifacts.items()}
        while sum(row["tuned"] == digest for row in rows.read()) < rounds:
            samples = {name: _burst(path, device) for name, path in saved.items()}
            rows.append({"tuned": digest, "samples_us": samples})
    pairs = [
        tuple(min(row["samples_us"][name]) for name in ("default", "tuned"))
        for row in rows.read()
        if row["tuned"] == digest
    ]
    ratios = [default / tuned for default, tuned in pairs]
    return {
        "default_us": statistics.median(default for default, _ in pairs),
        "tuned_us": statistics.median(tuned for _, tuned in pairs),
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "fastest_us": [min(default for default, _ in pairs), min(tuned for _, tuned in pairs)],
        "exact": exact,
        "rounds": len(pairs),
    }


def _burst(path: str, device: Device) -> list[float]:
    return list(measure(path, device, MODEL_REPEATS, MODEL_WARMUP, MODEL_TIMEOUT_S).samples_us)


def rebuild_seconds(setup: Setup, model: str, records: Path) -> dict[str, float]:
    """Seconds to lower and to build a network from records, in a fresh process that has compiled nothing yet."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_rebuild, setup, model, records).result()


def _rebuild(setup: Setup, model: str, records: Path) -> dict[str, float]:
    graph = setup.graph(model)
    known = Records(records)
    started = time.perf_counter()
    artifact = build(graph, setup.target, None, setup.threads, known)
    return {"build_s": time.perf_counter() - started, "kernels": float(len({c.key for c in artifact.plan.calls}))}


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the table: microseconds with default, tuned and random knobs, and ratios to the default.

    The first strategy's winner is the tuned one. Random knobs that failed are counted, not averaged.

    Raises:
        MeasurementError: a kernel's default or winner failed.
    """
    found = []
    for row in rows:
        tuned = {name: winner["latency_us"] for name, winner in row["winners"].items()}
        default = row["default"]["latency_us"]
        if default is None or None in tuned.values():
            raise MeasurementError(f"the kernel of {row['layers'][0]} failed in the comparison: {row}")
        at_random = sorted(r["latency_us"] for r in row["random"] if r["error"] is None)
        found.append(
            {
                "layers": row["layers"],
                "macs": row["macs"],
                "default_us": default,
                "tuned_us": tuned,
                "random_us": at_random,
                "random_median_us": statistics.median(at_random) if at_random else None,
                "random_failed": sum(r["error"] is not None for r in row["random"]),
                "knobs": next(iter(row["winners"].values()))["knobs"],
            }
        )
    return found


def total(rows: list[dict[str, Any]], of: str, strategy: str | None = None) -> float:
    """Sum over all layers of one of the figures of :func:`summarize`."""
    return sum(len(row["layers"]) * (row[of][strategy] if strategy else row[of] or 0.0) for row in rows)


def print_kernels(console: Console, title: str, rows: list[dict[str, Any]], shares: dict[str, float | None]) -> None:
    """Print the table of default, tuned and random knobs."""
    headings = ("layers", "MMAC", "default us", "tuned us", "speedup", "GMAC/s", "of peak", "random us: best",
                "median", "worst", "median / default", "tuned knobs")  # fmt: skip
    table = table_of(title, headings, ("layers", "tuned knobs"))
    for row in rows:
        tuned, at_random = next(iter(row["tuned_us"].values())), row["random_us"]
        gmacs = row["macs"] / tuned / 1e3
        peak = shares.get(row["layers"][0])
        more = f" +{len(row['layers']) - 1}" if len(row["layers"]) > 1 else ""
        spread = [f"{at_random[0]:.1f}", f"{row['random_median_us']:.1f}", f"{at_random[-1]:.1f}"] if at_random else []
        ratio = [f"{row['random_median_us'] / row['default_us']:.2f}"] if at_random else []
        table.add_row(
            row["layers"][0] + more, f"{row['macs'] / 1e6:.1f}", f"{row['default_us']:.1f}", f"{tuned:.1f}",
            f"{row['default_us'] / tuned:.2f}", f"{gmacs:.0f}", f"{gmacs / peak:.0%}" if peak else "",
            *(spread + ratio or [""] * 4), knobs_text(row["knobs"]),
        )  # fmt: skip
    first = next(iter(rows[0]["tuned_us"]))
    default, tuned = total(rows, "default_us"), total(rows, "tuned_us", first)
    at_random = total(rows, "random_median_us")
    table.add_section()
    table.add_row("all layers", "", f"{default:.0f}", f"{tuned:.0f}", f"{default / tuned:.2f}", "", "", "",
                  f"{at_random:.0f}", "", f"{at_random / default:.2f}", "")  # fmt: skip
    console.print(table)


def print_strategies(console: Console, rows: list[dict[str, Any]], runs: list[dict[str, Any]]) -> None:
    """Print what each strategy's winners take, measured in turns, and what it took to find them."""
    headings = ("strategy", "winners us", "default / winners", "best on kernels", "tuning s")
    table = table_of("strategies at equal numbers of candidates; all layers", headings, ("strategy",))
    for entry in strategies_of(rows, runs):
        table.add_row(
            entry["strategy"], f"{entry['winners_us']:.0f}", f"{entry['ratio']:.3f}", str(entry["best_on"]),
            f"{entry['seconds']:.0f}",
        )  # fmt: skip
    console.print(table)


def strategies_of(rows: list[dict[str, Any]], runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each strategy: sum of its winners, ratio to the default, kernels on which none is faster, seconds."""
    default = total(rows, "default_us")
    return [
        {
            "strategy": name,
            "winners_us": total(rows, "tuned_us", name),
            "ratio": default / total(rows, "tuned_us", name),
            "best_on": sum(row["tuned_us"][name] == min(row["tuned_us"].values()) for row in rows),
            "seconds": sum(run["seconds"] for run in runs if run["strategy"] == name),
        }
        for name in rows[0]["tuned_us"]
    ]


def beside_metaschedule(
    graph: IntegerGraph,
    setup: Setup,
    strategy: str,
    trials: int,
    count: int,
    device: Device,
    folder: Path,
    console: Console,
) -> list[dict[str, Any]]:
    """Rows of :func:`~lightning_baqe.benchmarks.metaschedule.compare` for the dense kernels with most work.

    Args:
        strategy: whose winners are our tuned kernels.
        trials: of MetaSchedule for each kernel.
        count: of kernels.
    """
    target, records = get_target(setup.target), keeping(device, folder, strategy).records
    with tempfile.TemporaryDirectory(prefix="lightning_baqe-") as place:
        kernels: dict[ConvSpec, tuple[tuple[str, ...], KernelBench, dict[str, Any]]] = {}
        for spec, layers in tunable_layers(graph, BuildOptions(target, setup.threads)).items():
            if isinstance(spec, ConvSpec) and spec.groups == 1 and spec.weight_bits < 32 and len(kernels) < count:
                compared = device.keeping(folder / "compare.db")
                bench = KernelBench(spec, target, compared, Path(place) / str(len(kernels)))
                kernels[spec] = (layers, bench, records.best_knobs(spec, target) or bench.default)
        return compare(kernels, trials, setup.seed, folder, console)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="torchvision's name")
    parser.add_argument("--size", type=int, default=224, help="of the image")
    parser.add_argument("--bits", type=int, default=8, help="of weights and activations")
    parser.add_argument("--target", default="native")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--strategies", nargs="+", default=["ranked"], choices=list(STRATEGIES), metavar="STRATEGY",
                        help=f"out of {', '.join(STRATEGIES)}; the first is the tuned one of all tables")  # fmt: skip
    parser.add_argument("--candidates", type=int, default=16, help="of each kernel, on average")
    parser.add_argument("--random", type=int, default=8, help="random knobs that each kernel is compared with")
    parser.add_argument("--rounds", type=int, default=10, help="of the whole network")
    parser.add_argument("--rebuild", default="resnet50", help="the network that is built from records; empty: none")
    parser.add_argument("--metaschedule", type=int, default=0, metavar="TRIALS",
                        help="of TVM's own tuner for each kernel, which takes minutes; 0: leave it out")  # fmt: skip
    parser.add_argument("--metaschedule-kernels", type=int, default=4, metavar="KERNELS",
                        help="dense kernels that it tunes, those with most work")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("outputs/benchmarks/tuning"), help="for all that is kept")
    return parser


def main(arguments: list[str] | None = None, device: Device | None = None) -> None:
    """The command line, for a device instead of this machine if one is given."""
    parser = _parser()
    options = parser.parse_args(arguments)
    check_positive(parser, options, "candidates", "random", "rounds")
    if options.metaschedule < 0 or options.metaschedule_kernels < 1:
        parser.error("--metaschedule is at least 0, and --metaschedule-kernels at least 1")
    if options.metaschedule and options.threads != 1:
        parser.error(f"--metaschedule compares kernels on one thread, got --threads {options.threads}: leave out one")
    setup = Setup(options.model, options.size, options.bits, options.target, options.threads, options.random,
                  options.seed)  # fmt: skip
    console, folder = Console(width=170 if not Console().is_terminal else None, highlight=False), options.folder
    device = device or Local()
    open_folder(folder, setup, device)
    info = device.info(setup.threads)
    console.print(f"{info['cpu']}; {' '.join(info['flags'])}; batch 1, {setup.threads} thread(s)")
    graph = setup.graph()
    results = {
        name: run_strategy(name, graph, setup, options.candidates, device, folder, console)
        for name in options.strategies
    }
    first = options.strategies[0]
    again = run_strategy(first, graph, setup, options.candidates, device, folder, console)
    rows = summarize(compare_kernels(graph, setup, options.strategies, device, folder, console))
    runs = Rows(folder / "runs.jsonl").read()
    title = f"{setup.model}, {setup.bits} bit, {setup.size} px: kernels in turns, tuned by {first}"
    print_kernels(console, title, rows, {kernel.layers[0]: kernel.peak_gmacs for kernel in results[first].kernels})
    print_strategies(console, rows, runs)
    inexact = {name: sum(kernel.inexact for kernel in result.kernels) for name, result in results.items()}
    tried = {name: sum(kernel.known for kernel in result.kernels) for name, result in results.items()}
    console.print(f"candidates tried: {tried}; of them with a wrong result: {inexact}")
    console.print(f"second run of {first}: {again.measured} measurements, {again.seconds:.1f} s")
    whole = table_x(graph, setup, first, options.rounds, device, folder)
    low, high = whole["ratio_range"]
    console.print(
        f"Table X: {setup.model} {whole['default_us'] / 1e3:.3f} ms with default knobs, {whole['tuned_us'] / 1e3:.3f} "
        f"ms with tuned ones: x{whole['ratio']:.3f} ({low:.3f} to {high:.3f} in {whole['rounds']} rounds); fastest "
        f"{whole['fastest_us'][0] / 1e3:.3f} and {whole['fastest_us'][1] / 1e3:.3f} ms; exact: {whole['exact']}",
        soft_wrap=True,
    )
    beside: list[dict[str, Any]] = []
    if options.metaschedule:
        beside = beside_metaschedule(
            graph, setup, first, options.metaschedule, options.metaschedule_kernels, device, folder, console
        )
        console.print(metaschedule_table(beside, sum(run["seconds"] for run in runs if run["strategy"] == first)))
    rebuilt = None
    if options.rebuild:
        other = setup.graph(options.rebuild)
        build_options = BuildOptions(get_target(setup.target), setup.threads)
        tune(other, build_options, 1, None, keeping(device, folder, first), STRATEGIES[first](setup.seed))
        rebuilt = rebuild_seconds(setup, options.rebuild, keeping(device, folder, first).records.path)
        console.print(
            f"build of {options.rebuild} from records: {rebuilt['build_s']:.1f} s, "
            f"{rebuilt['kernels']:.0f} distinct kernels"
        )
    content = {
        "setup": asdict(setup),
        "device": info,
        "versions": versions(),
        "candidates": options.candidates,
        "kernels": rows,
        "tuned": {name: [kernel_entry(kernel) for kernel in result.kernels] for name, result in results.items()},
        "strategies": strategies_of(rows, runs),
        "runs": runs,
        "second_run": {"measured": again.measured, "seconds": again.seconds},
        "table_x": whole,
        "rebuild": rebuilt,
        "metaschedule": beside,
    }
    replace_file(folder / "tuning.json", json.dumps(content, indent=1).encode())
    console.print(f"All figures: {folder}", markup=False)


if __name__ == "__main__":
    main()
