"""Our expected hypervolume improvement against BoTorch's own loop: ``python -m lightning_baqe.benchmarks.problems``.

Multi-objective test functions of BoTorch with their published reference points and maximal hypervolumes. Both methods
get the same 2 (d + 1) Sobol points and the same number of evaluations after them. The figure is the ratio of the
hypervolumes at the end, ours over BoTorch's, of each seed, with a bootstrap interval of its mean.

Every run is kept in a folder; the same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lightning_baqe.benchmarks.loops import FUNCTIONS, METHODS, function_of, reference_of, run
from lightning_baqe.benchmarks.replays import fill
from lightning_baqe.benchmarks.search_tables import values_of
from lightning_baqe.benchmarks.setups import begin, check_positive, console_of, parser_of, table_of
from lightning_baqe.files import Rows, replace_file
from lightning_baqe.search import hypervolume
from lightning_baqe.search.metrics import bootstrap_interval, compare_paired

MARGIN = 0.02  # of BoTorch's hypervolume that we may lose


def summarise(rows: Sequence[Mapping[str, Any]], problem: str, evaluations: int, n_seeds: int) -> dict[str, Any]:
    """Hypervolumes at the end of both methods, paired by seed.

    Returns:
        `{"problem", "seeds": that both have run, "maximum": published hypervolume, "hypervolume": {method: median over
        the seeds}, "start": median after the initial points, "ratio": mean over the seeds of ours / BoTorch's,
        "interval": its 95 % bootstrap interval, "within": whether the lower end is at least 0.98, "p", "effect":
        Wilcoxon signed-rank, "propose_s": {method: median processor seconds of a proposal}}`.
    """
    function = function_of(problem)
    reference, n_initial = reference_of(function), 2 * (function.dim + 1)
    wanted = [r for r in rows if (r["problem"], r["evaluations"]) == (problem, evaluations) and r["seed"] < n_seeds]
    found = {method: {row["seed"]: row for row in wanted if row["method"] == method} for method in METHODS}
    seeds = sorted(set.intersection(*map(set, found.values())))
    entry: dict[str, Any] = {"problem": problem, "seeds": seeds, "maximum": float(function.max_hv)}
    if not seeds:
        return entry
    values = {m: [values_of(of[s]) for s in seeds] for m, of in found.items()}
    final = {method: [hypervolume(v, reference) for v in of] for method, of in values.items()}
    ratios = [ours / theirs for ours, theirs in zip(final["beyond"], final["botorch"], strict=True)]
    low, high = bootstrap_interval(ratios)
    test = compare_paired(final["beyond"], final["botorch"])
    return {
        **entry,
        "start": statistics.median(hypervolume(v[:n_initial], reference) for v in values["beyond"]),
        "hypervolume": {method: statistics.median(of) for method, of in final.items()},
        "ratio": statistics.fmean(ratios),
        "interval": [low, high],
        "within": low >= 1 - MARGIN,
        "p": test.p,
        "effect": test.effect,
        "propose_s": {m: statistics.median(p for s in seeds for p in of[s]["propose_s"]) for m, of in found.items()},
    }


def print_summary(console: Console, entries: Sequence[Mapping[str, Any]], evaluations: int) -> None:
    """Print the table of `summarise`."""
    title = f"2 (d + 1) Sobol points and {evaluations} evaluations: hypervolume, median over the seeds"
    headings = ("problem", "seeds", "maximum", "start", "BoTorch", "ours", "ours / BoTorch", "95 %",
                f"within {MARGIN:.0%}", "p", "s a proposal: BoTorch", "ours")  # fmt: skip
    cells: list[list[str]] = []
    for entry in entries:
        cells.append([entry["problem"], str(len(entry["seeds"])), f"{entry['maximum']:.5g}"])
        if entry["seeds"]:
            volume, seconds = entry["hypervolume"], entry["propose_s"]
            cells[-1] += [f"{value:.5g}" for value in (entry["start"], volume["botorch"], volume["beyond"])]
            cells[-1] += [f"{entry['ratio']:.4f}", "{:.4f} to {:.4f}".format(*entry["interval"])]
            cells[-1] += ["yes" if entry["within"] else "no", f"{entry['p']:.2g}"]
            cells[-1] += [f"{seconds['botorch']:.2f}", f"{seconds['beyond']:.2f}"]
    console.print(table_of(title, headings, ("problem",), cells))


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__)
    parser.add_argument("--problems", nargs="+", default=list(FUNCTIONS), choices=list(FUNCTIONS), metavar="NAME")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--evaluations", type=int, default=30, help="after the initial points")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--folder", type=Path, default=Path("outputs/benchmarks/problems"), help="for all that is kept")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = _parser()
    options = parser.parse_args(arguments)
    check_positive(parser, options, "evaluations", "seeds", "jobs")
    console = console_of(150)
    begin(options.folder, {"version": 1})
    rows = Rows(options.folder / "runs.jsonl")
    names = ("method", "problem", "seed", "evaluations")
    wanted = [
        (method, problem, seed, options.evaluations)
        for seed in range(options.seeds)
        for problem in options.problems
        for method in options.methods
    ]
    fill(rows, names, wanted, run, options.jobs, console, "runs")
    entries = [summarise(rows.read(), problem, options.evaluations, options.seeds) for problem in options.problems]
    print_summary(console, entries, options.evaluations)
    replace_file(options.folder / "problems.json", json.dumps(entries, indent=1).encode())
    console.print(f"All figures: {options.folder}", markup=False)


if __name__ == "__main__":
    main()
