"""Samplers side by side on replayed searches: ``python -m lightning_baqe.benchmarks.search --problem additive21x1``.

Each sampler runs on the problem from many seeds, 10 initial trials and 30 more, as BAQE's tables III to VI do. All
samplers of a seed are given the same pool of 500 candidates; Optuna's begin with random points of it. The table has
ADRS, normalised time, optimal points, and hypervolumes with their significance over the seeds; figures have bands over
the seeds. Seconds of proposing are those of the processor, in one thread, so that other work on the machine does not
count.

``--proposing`` measures what a proposal of each sampler costs in ResNet-50's space instead.

Every run is kept in a folder; the same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from lightning_baqe.benchmarks.replays import fill
from lightning_baqe.benchmarks.search_runs import KEY, SAMPLERS, proposing_seconds, replay
from lightning_baqe.benchmarks.search_tables import (
    Runs,
    curves_of,
    draw_curves,
    draw_points,
    front_of,
    print_summary,
    runs_of,
    summarise,
)
from lightning_baqe.benchmarks.setups import begin, check_positive, console_of, parser_of
from lightning_baqe.benchmarks.synthetic import problem_named
from lightning_baqe.files import Rows, replace_file
from lightning_baqe.search.evolution import evolve

_HARDEST = (54, 4)  # ResNet-50: layers, and knobs of each


def judged_front(options: argparse.Namespace, runs: Runs, rows: Rows) -> Tensor:
    """The best known front: non-dominated points of all runs and of a long NSGA-II, whose part is kept in `rows`."""
    name = {"problem": options.problem, "population": options.population, "generations": options.generations}
    evolved = next((row["front"] for row in rows.read() if name.items() <= row.items()), None)
    if evolved is None:
        of = problem_named(options.problem)
        evolved = evolve(of.distributions, of.evaluate, options.population, options.generations).tolist()
        rows.append({**name, "front": evolved})
    values = [point for of in runs.values() for row in of.values() for point in row["values"]]
    return front_of(torch.unique(torch.tensor(evolved + values, dtype=torch.float64), dim=0))


def measure_proposing(console: Console, samplers: Sequence[str], observed: int, proposals: int) -> dict[str, Any]:
    """Print and return the seconds of a proposal in ResNet-50's space."""
    layers, knobs = _HARDEST
    console.print(f"{layers} layers x (bits + {knobs} knobs) = {layers * (1 + knobs)} parameters, {observed} trials")
    found = {}
    for name in track(samplers, "proposing", console=console):
        found[name] = figures = proposing_seconds(layers, knobs, observed, name, proposals)
        cpu, wall = (statistics.median(f[key] for f in figures) for key in ("cpu_s", "wall_s"))
        worst = max(f["cpu_s"] for f in figures)
        console.print(f"{name}: median {cpu:.2f} s of the processor (most {worst:.2f}), {wall:.2f} s of the clock")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__)
    parser.add_argument("--problem", default="additive21x1",
                        help="additive<layers>x<knobs>, or the name of a measured landscape")  # fmt: skip
    parser.add_argument("--samplers", nargs="+", default=list(SAMPLERS), choices=list(SAMPLERS), metavar="SAMPLER",
                        help=f"out of: {'; '.join(SAMPLERS)}")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--trials", type=int, default=40, help="of each run")
    parser.add_argument("--initial", type=int, default=10, help="trials of them before the first model")
    parser.add_argument("--population", type=int, default=300, help="of the long NSGA-II that judges")
    parser.add_argument("--generations", type=int, default=200, help="of the long NSGA-II that judges")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--noisy", action="store_true",
                        help="tell samplers what a measurement would, judge by what is behind it")  # fmt: skip
    parser.add_argument("--proposing", action="store_true", help="measure the cost of proposals only")
    parser.add_argument("--proposals", type=int, default=3, help="how many --proposing measures of each sampler")
    parser.add_argument("--folder", type=Path, default=Path("outputs/benchmarks/search"), help="for all that is kept")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = _parser()
    options = parser.parse_args(arguments)
    check_positive(parser, options, "seeds", "jobs", "proposals")
    if not 2 <= options.initial < options.trials:
        parser.error("--initial is at least 2 and below --trials")
    console = console_of(200)
    if options.proposing:
        torch.set_num_threads(1)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        found = measure_proposing(console, options.samplers, options.trials, options.proposals)
        options.folder.mkdir(parents=True, exist_ok=True)
        replace_file(options.folder / "proposing.json", json.dumps(found, indent=1).encode())
        return
    begin(options.folder, {"version": 2})
    rows = Rows(options.folder / "runs.jsonl")
    # Seed after seed, so that an interrupted benchmark has whole pairs.
    wanted = [
        (options.problem, sampler, seed, options.trials, options.initial, options.noisy)
        for seed in range(options.seeds)
        for sampler in options.samplers
    ]
    fill(rows, KEY, wanted, replay, options.jobs, console, options.problem)
    report(options, rows, console)


def report(options: argparse.Namespace, rows: Rows, console: Console) -> list[dict[str, Any]]:
    """Print the table, write `search_<problem>.json` and the figures."""
    of_initial: list[Mapping[str, Any]] = [
        row for row in rows.read() if (row["initial"], row["noisy"]) == (options.initial, options.noisy)
    ]
    runs = runs_of(of_initial, options.problem, options.trials, options.samplers)
    problem = problem_named(options.problem)
    front = judged_front(options, runs, Rows(options.folder / "fronts.jsonl"))
    curves = curves_of(runs, front, problem.reference_point, options.seeds)
    at = sorted({n for n in (options.initial, 2 * options.initial, options.trials) if n <= options.trials})
    entries = summarise(runs, curves, front, at)
    more = options.trials - options.initial
    noise = ", noisy" if options.noisy else ""
    title = f"{options.problem}{noise}: {options.initial} + {more} trials, {len(curves.seeds)} seeds"
    print_summary(console, title, entries, curves)
    content = {"problem": options.problem, "seeds": curves.seeds, "front": front.tolist(), "samplers": entries}
    name = options.problem.replace("/", "_") + ("_noisy" if options.noisy else "")
    replace_file(options.folder / f"search_{name}.json", json.dumps(content, indent=1).encode())
    draw_curves(curves, options.problem, options.folder / f"search_{name}.png")
    if len(problem.objectives) > 1:
        draw_points(runs, curves, front, problem.objectives, (1, 0), options.folder / f"points_{name}.png")
    console.print(f"All figures: {options.folder}", markup=False)
    return entries


if __name__ == "__main__":
    main()
