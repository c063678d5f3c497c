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
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from lightning_baqe.benchmarks.metaschedule import compare, metaschedule_table
from lightning_baqe.benchmarks.setups import begin, check_positive, console_of, layers_text, parser_of, table_of
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
from lightning_baqe.measurement.database import Records
from lightning_baqe.measurement.device import Device
from lightning_baqe.measurement.local import Local
from lightning_baqe.measurement.measure import measure
from lightning_baqe.quantization.config import BitConfig
from lightning_baqe.scratch import temporary_folder
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
MODEL_SAMPLING = (10, 3, 120.0)  # repeats, runs before them, seconds at most


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

    @property
    def options(self) -> BuildOptions:
        """Of every build."""
        return BuildOptions(get_target(self.target), self.threads)


@dataclass(frozen=True)
class Bench:
    """One network on one device, with the folder of all that is kept; the console is for progress bars."""

    setup: Setup
    device: Device
    graph: IntegerGraph
    folder: Path
    console: Console

    def known(self, strategy: str) -> Device:
        """The device with the database of one strategy."""
        return self.device.keeping(self.folder / f"records_{strategy}.db")

    def tune(self, name: str, candidates: int) -> TuneResult:
        """Tune all kernels with one strategy; its seconds are kept, those of an interrupted run as well."""
        started = time.monotonic()
        row: dict[str, Any] = {"strategy": name, "candidates": candidates, "seconds": 0.0, "measured": None}
        try:
            with tune_progress(self.console) as show:
                strategy = STRATEGIES[name](self.setup.seed)
                result = tune(self.graph, self.setup.options, candidates, None, self.known(name), strategy, show)
            row["measured"] = result.measured
            return result
        finally:
            row["seconds"] = time.monotonic() - started
            Rows(self.folder / "runs.jsonl").append(row)

    def compare_kernels(self, strategies: list[str]) -> list[dict[str, Any]]:
        """Each kernel's default, winners and random knobs, measured in turns.

        Returns:
            for each kernel ``{"kernel", "layers", "macs", "default", "winners", "random"}``: figures are ``{"knobs",
            "latency_us", "samples_us", "error"}``, winners by strategy.
        """
        target, rows = self.setup.options.target, Rows(self.folder / "compare.jsonl")
        compared = self.device.keeping(self.folder / "compare.db")
        layers = tunable_layers(self.graph, self.setup.options)
        done = {row["kernel"]: row for row in rows.read()}  # the last row of a kernel is the newest
        found = []
        with temporary_folder() as place:
            for spec, names in track(layers.items(), "compare kernels", console=self.console, total=len(layers)):
                key = kernel_key(spec, {})
                winners = {name: self.known(name).records.best_knobs(spec, target) for name in strategies}
                row = done.get(key)
                if row is None or {name: winner["knobs"] for name, winner in row["winners"].items()} != winners:
                    bench = KernelBench(spec, target, compared, Path(place) / key)
                    row = {"kernel": key, "layers": list(names), "macs": spec.macs} | self._compared(bench, winners)
                    rows.append(row)
                found.append(row)
        return found

    def _compared(self, bench: KernelBench, winners: dict[str, dict[str, Any] | None]) -> dict[str, Any]:
        strategy, space = Random(self.setup.seed + 1), kernel_space(bench.spec)
        default, *others = strategy.propose(space, [], 1 + self.setup.random)
        chosen = {name: knobs or default for name, knobs in winners.items()}
        distinct = {kernel_key(bench.spec, knobs): knobs for knobs in (default, *chosen.values(), *others)}
        records = dict(zip(distinct, interleaved([(bench, knobs) for knobs in distinct.values()]), strict=True))

        def figure(knobs: dict[str, Any]) -> dict[str, Any]:
            record = records[kernel_key(bench.spec, knobs)]
            return {name: getattr(record, name) for name in ("knobs", "latency_us", "samples_us", "error")}

        return {
            "default": figure(default),
            "winners": {name: figure(knobs) for name, knobs in chosen.items()},
            "random": [figure(knobs) for knobs in others],
        }

    def table_x(self, strategy: str, rounds: int) -> dict[str, Any]:
        """Whole-network latency with default and with tuned knobs, in turns; each pair of figures is kept.

        Returns:
            ``{"default_us", "tuned_us", "ratio", "ratio_range", "fastest_us", "exact", "rounds"}``: medians over the
            rounds of each one's fastest inference, and of their ratios; the fastest inference of all rounds.
        """
        rows, device = Rows(self.folder / f"table_x_{strategy}.jsonl"), self.device
        artifacts = {
            "default": device.build(self.graph, self.setup.options, "default"),
            "tuned": self.known(strategy).build(self.graph, self.setup.options),
        }
        image = torch.randn(1, *self.graph.input_shape, generator=torch.Generator().manual_seed(self.setup.seed))
        reference = self.graph.run(image)
        exact = {name: bool(torch.equal(device.run(built, image), reference)) for name, built in artifacts.items()}
        digest = artifacts["tuned"].plan.digest
        taken = [row["samples_us"] for row in rows.read() if row["tuned"] == digest]
        with temporary_folder() as place:
            saved = {name: artifact.save(Path(place) / name) for name, artifact in artifacts.items()}
            while len(taken) < rounds:
                found = {name: measure(path, device, *MODEL_SAMPLING) for name, path in saved.items()}
                taken.append({name: list(one.samples_us) for name, one in found.items()})
                rows.append({"tuned": digest, "samples_us": taken[-1]})
        default, tuned = ([min(samples[name]) for samples in taken] for name in artifacts)
        ratios = [one / other for one, other in zip(default, tuned, strict=True)]
        return {
            "default_us": statistics.median(default),
            "tuned_us": statistics.median(tuned),
            "ratio": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
            "fastest_us": [min(default), min(tuned)],
            "exact": exact,
            "rounds": len(taken),
        }

    def rebuild(self, model: str, strategy: str) -> dict[str, float]:
        """Seconds to build another network from records, in a fresh process that has compiled nothing yet."""
        known = self.known(strategy)
        tune(self.setup.graph(model), self.setup.options, 1, None, known, STRATEGIES[strategy](self.setup.seed))
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(_rebuild, self.setup, model, known.records.path).result()

    def beside_metaschedule(self, strategy: str, trials: int, count: int) -> list[dict[str, Any]]:
        """Rows of :func:`~lightning_baqe.benchmarks.metaschedule.compare` for so many dense kernels with most work.

        Our tuned kernels are the winners of ``strategy``; MetaSchedule has so many trials for each.
        """
        target, records = self.setup.options.target, self.known(strategy).records
        with temporary_folder() as place:
            kernels: dict[ConvSpec, tuple[tuple[str, ...], KernelBench, dict[str, Any]]] = {}
            for spec, layers in tunable_layers(self.graph, self.setup.options).items():
                if isinstance(spec, ConvSpec) and spec.groups == 1 and spec.weight_bits < 32 and len(kernels) < count:
                    compared = self.device.keeping(self.folder / "compare.db")
                    bench = KernelBench(spec, target, compared, Path(place) / str(len(kernels)))
                    kernels[spec] = (layers, bench, records.best_knobs(spec, target) or bench.default)
            return compare(kernels, trials, self.setup.seed, self.folder, self.console)


def _rebuild(setup: Setup, model: str, records: Path) -> dict[str, float]:
    graph, known = setup.graph(model), Records(records)
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
        peak, median = shares.get(row["layers"][0]), row["random_median_us"]
        spread = [f"{value:.1f}" for value in (at_random[0], median, at_random[-1])] if at_random else [""] * 3
        table.add_row(
            layers_text(row["layers"]), f"{row['macs'] / 1e6:.1f}", f"{row['default_us']:.1f}", f"{tuned:.1f}",
            f"{row['default_us'] / tuned:.2f}", f"{gmacs:.0f}", f"{gmacs / peak:.0%}" if peak else "", *spread,
            f"{median / row['default_us']:.2f}" if at_random else "", knobs_text(row["knobs"]),
        )  # fmt: skip
    default, tuned = total(rows, "default_us"), total(rows, "tuned_us", next(iter(rows[0]["tuned_us"])))
    at_random = total(rows, "random_median_us")
    table.add_section()
    table.add_row("all layers", "", f"{default:.0f}", f"{tuned:.0f}", f"{default / tuned:.2f}", "", "", "",
                  f"{at_random:.0f}", "", f"{at_random / default:.2f}", "")  # fmt: skip
    console.print(table)


def print_strategies(console: Console, entries: list[dict[str, Any]]) -> None:
    """Print what each strategy's winners take, measured in turns, and what it took to find them."""
    headings = ("strategy", "winners us", "default / winners", "best on kernels", "tuning s")
    cells = (
        (e["strategy"], f"{e['winners_us']:.0f}", f"{e['ratio']:.3f}", e["best_on"], f"{e['seconds']:.0f}")
        for e in entries
    )
    console.print(table_of("strategies at equal numbers of candidates; all layers", headings, ("strategy",), cells))


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


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__)
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
    setup = Setup(**{field.name: getattr(options, field.name) for field in fields(Setup)})
    console, folder, device = console_of(170), options.folder, device or Local()
    info = device.info(setup.threads)
    begin(folder, {**asdict(setup), "fingerprint": fingerprint(info)})
    console.print(f"{info['cpu']}; {' '.join(info['flags'])}; batch 1, {setup.threads} thread(s)")
    bench = Bench(setup, device, setup.graph(), folder, console)
    results = {name: bench.tune(name, options.candidates) for name in options.strategies}
    first = options.strategies[0]
    again = bench.tune(first, options.candidates)
    rows = summarize(bench.compare_kernels(options.strategies))
    runs = Rows(folder / "runs.jsonl").read()
    strategies = strategies_of(rows, runs)
    title = f"{setup.model}, {setup.bits} bit, {setup.size} px: kernels in turns, tuned by {first}"
    print_kernels(console, title, rows, {kernel.layers[0]: kernel.peak_gmacs for kernel in results[first].kernels})
    print_strategies(console, strategies)
    inexact = {name: sum(kernel.inexact for kernel in result.kernels) for name, result in results.items()}
    tried = {name: sum(kernel.known for kernel in result.kernels) for name, result in results.items()}
    console.print(f"candidates tried: {tried}; of them with a wrong result: {inexact}")
    console.print(f"second run of {first}: {again.measured} measurements, {again.seconds:.1f} s")
    whole = bench.table_x(first, options.rounds)
    low, high = whole["ratio_range"]
    console.print(
        f"Table X: {setup.model} {whole['default_us'] / 1e3:.3f} ms with default knobs, {whole['tuned_us'] / 1e3:.3f} "
        f"ms with tuned ones: x{whole['ratio']:.3f} ({low:.3f} to {high:.3f} in {whole['rounds']} rounds); fastest "
        f"{whole['fastest_us'][0] / 1e3:.3f} and {whole['fastest_us'][1] / 1e3:.3f} ms; exact: {whole['exact']}",
        soft_wrap=True,
    )
    beside: list[dict[str, Any]] = []
    if options.metaschedule:
        beside = bench.beside_metaschedule(first, options.metaschedule, options.metaschedule_kernels)
        console.print(metaschedule_table(beside, sum(run["seconds"] for run in runs if run["strategy"] == first)))
    rebuilt = None
    if options.rebuild:
        rebuilt = bench.rebuild(options.rebuild, first)
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
        "strategies": strategies,
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
