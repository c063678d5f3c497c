"""Our expected hypervolume improvement against BoTorch's own loop: ``python -m lightning_baqe.benchmarks.problems``.

Multi-objective test functions of BoTorch with their published reference points and maximal hypervolumes. Both methods
get the same 2 (d + 1) Sobol points and the same number of evaluations after them. The figure is the ratio of the
hypervolumes at the end, ours over BoTorch's, of each seed, with a bootstrap interval of its mean.

Every run is kept in a folder; the same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from lightning_baqe.benchmarks.loops import FUNCTIONS, METHODS, function_of, run
from lightning_baqe.benchmarks.replays import fill
from lightning_baqe.benchmarks.rows import Rows, begin


def one_run(method: str, name: str, seed: int, evaluations: int) -> dict[str, Any]:
    """A row of the file, without its key."""
    return asdict(run(method, name, 2 * (function_of(name).dim + 1), evaluations, seed))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", default=list(FUNCTIONS), choices=list(FUNCTIONS), metavar="NAME")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--evaluations", type=int, default=30, help="after the initial points")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--folder", type=Path, default=Path("outputs/benchmarks/problems"), help="for all that is kept")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    options = _parser().parse_args(arguments)
    console = Console(width=150 if not Console().is_terminal else None, highlight=False)
    begin(options.folder, {"version": 1})
    rows = Rows(options.folder / "runs.jsonl")
    names = ("method", "problem", "seed", "evaluations")
    wanted = [
        (method, problem, seed, options.evaluations)
        for seed in range(options.seeds)
        for problem in options.problems
        for method in options.methods
    ]
    fill(rows, names, wanted, one_run, options.jobs, console, "runs")


if __name__ == "__main__":
    main()
