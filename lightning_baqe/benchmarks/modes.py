"""The main job itself, mode by mode: ``python -m lightning_baqe.benchmarks.modes``.

``recipe=qat_search data=glyphs`` is run as a user runs it, with mode ``paper``, mode ``beyond`` and random search, from
several seeds: every trial is trained, lowered, compiled and measured. Runs of a seed begin with the same float network
and choose from the same bit-widths. Beside the hypervolumes stands what the landscape of the network says of the same
samplers, so that both can be compared.

Hypervolumes are those of the trials alone, without the baselines, over one float latency for all runs (the median of
theirs). Seconds are those of the whole command, and every run tunes its kernels itself, in records of its own; only the
first run of a seed trains the float network.

Every run goes on where it was interrupted. Several processes may share the work: ``--seeds 0``, ``--seeds 1``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lightning_baqe.benchmarks.landscape_accuracy import OPTIONS
from lightning_baqe.benchmarks.replays import fill
from lightning_baqe.benchmarks.search_runs import KEY, replay
from lightning_baqe.benchmarks.search_tables import front_of, runs_of, scaled_adrs, values_of
from lightning_baqe.benchmarks.setups import console_of, parser_of, table_of
from lightning_baqe.benchmarks.synthetic import problem_named
from lightning_baqe.errors import BaqeError
from lightning_baqe.files import Rows, replace_file
from lightning_baqe.runs.objectives import REFERENCE_POINT, objectives
from lightning_baqe.runs.summary import Figures, Measured, Summary, is_measured
from lightning_baqe.search import hypervolume
from lightning_baqe.search.metrics import hypervolume_curve, trials_to_reach

BITS = (4, 5, 6, 7, 8, 32)  # those of the landscapes
MODES: dict[str, tuple[str, ...]] = {
    "random": ("search.mode=paper", "+search.sampler._target_=optuna.samplers.RandomSampler"),
    "paper": ("search.mode=paper",),
    "beyond": ("search.mode=beyond",),
}
ANCHOR = "paper"
MARKS = (5, 10, 20, 40)  # trials after which the hypervolume is told
_MAIN = "import sys; from lightning_baqe.train import main; sys.exit(main())"  # as the command lightning-baqe does it


def command(mode: str, seed: int, trials: int, run_dir: Path, more: Sequence[str]) -> list[str]:
    """The command line of a run in a mode of :data:`MODES`, with further arguments."""
    options = [*MODES[mode], *(["+search.sampler.seed=" + str(seed)] if mode == "random" else [])]
    return [
        sys.executable, "-c", _MAIN, "recipe=qat_search", "data=glyphs", *OPTIONS, "search.tune_s=30", f"seed={seed}",
        f"search.trials={trials}", f"search.bit_choices={list(BITS)}".replace(" ", ""), f"run_dir={run_dir}",
        f"search.records={run_dir / 'records.db'}", *options, *more,
    ]  # fmt: skip


def run(mode: str, seed: int, trials: int, folder: Path, more: Sequence[str]) -> None:
    """Run one, or let it go on; ``seconds.json`` in its folder sums the time of all its parts.

    Raises:
        BaqeError: it failed; its output is in ``output.log``.
    """
    run_dir = folder / f"{mode}_{seed}"
    checkpoint = run_dir / "checkpoints" / "float.ckpt"
    known = sorted(path for path in folder.glob(f"*_{seed}/checkpoints/float.ckpt") if path != checkpoint)
    if not checkpoint.exists() and known:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(known[0], checkpoint)
    run_dir.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with (run_dir / "output.log").open("ab") as log:
        status = subprocess.run(command(mode, seed, trials, run_dir, more), stdout=log, stderr=log, check=False)
    record = run_dir / "seconds.json"
    before = json.loads(record.read_text()) if record.exists() else 0.0
    replace_file(record, json.dumps(before + time.monotonic() - started).encode())
    if status.returncode:
        raise BaqeError(
            f"{mode} with seed {seed} ended with status {status.returncode}; see {run_dir / 'output.log'}, and run the "
            "same command again to go on"
        )


def complete_trials(summary: Summary) -> list[Measured]:
    """The trials with figures, without the baselines."""
    return [entry for entry in summary.trials if is_measured(entry)]


def scaled_values(summary: Summary, latency_us: float) -> torch.Tensor:
    """Objectives of the complete trials, ``n x 3``, over a given float latency."""
    reference = (summary.reference or Figures()).model_copy(update={"latency_us": latency_us})
    return torch.tensor([objectives(entry, reference) for entry in complete_trials(summary)], dtype=torch.float64)


def summarise(summaries: Mapping[tuple[str, int], Summary], seconds: Mapping[tuple[str, int], float]) -> Any:
    """One entry a run.

    Args:
        summaries: by mode and seed.
        seconds: of the whole commands.

    Returns:
        ``{"mode", "seed", "trials", "hypervolume": {trials: value}, "of_joint": final over that of all runs together,
        "adrs": BAQE eq. 16 to the front of all runs together, "trials_to_paper": trials to reach paper's final
        hypervolume of the same seed, None where it is not reached, "front": non-dominated trials, "of_front": of them
        on the joint front, "best_accuracy", "fastest_us", "smallest_bytes", "trial_s": median seconds of a trial,
        "seconds", "float_us"}``.
    """
    floats = {key: (summary.reference or Figures()).triple[1] for key, summary in summaries.items()}
    latency_us = statistics.median(floats.values())
    values = {key: scaled_values(summary, latency_us) for key, summary in summaries.items()}
    joint = front_of(torch.cat([*values.values()]))
    best = hypervolume(joint, REFERENCE_POINT)
    curves = {key: hypervolume_curve(found, REFERENCE_POINT) for key, found in values.items()}
    entries = []
    for (mode, seed), found in values.items():
        curve, complete = curves[mode, seed], complete_trials(summaries[mode, seed])
        front = front_of(found)
        target = curves.get((ANCHOR, seed))
        entries.append(
            {
                "mode": mode,
                "seed": seed,
                "trials": len(found),
                "hypervolume": {n: float(curve[n - 1]) for n in MARKS if n <= len(curve)},
                "of_joint": float(curve[-1]) / best,
                "adrs": scaled_adrs(found, joint),
                "trials_to_paper": None if target is None else trials_to_reach(curve, float(target[-1])),
                "front": len(front),
                "of_front": sum(bool((row == joint).all(1).any()) for row in front),
                "best_accuracy": max(entry.accuracy for entry in complete),
                "fastest_us": min(entry.latency_us for entry in complete),
                "smallest_bytes": min(entry.size_bytes for entry in complete),
                "trial_s": statistics.median(sum(entry.seconds.values()) for entry in complete),
                "seconds": seconds[mode, seed],
                "float_us": floats[mode, seed],
            }
        )
    return entries


def predicted(landscape: str, modes: Sequence[str], trials: int, seeds: int, folder: Path, console: Console) -> Any:
    """What the landscape says, with the noise of real measurements.

    Returns:
        ``{mode: {"hypervolume": {trials: median over the seeds}, "of_joint", "adrs": medians, as those of the runs}}``.
    """
    rows = Rows(folder / "replays.jsonl")
    wanted = [(landscape, mode, seed, trials, min(10, trials - 1), True) for seed in range(seeds) for mode in modes]
    fill(rows, KEY, wanted, replay, 1, console, "replays")
    reference = problem_named(landscape).reference_point
    runs = runs_of(rows.read(), landscape, trials, modes)
    values = {mode: [values_of(row) for seed, row in of.items() if seed < seeds] for mode, of in runs.items()}
    joint = front_of(torch.cat([run for of in values.values() for run in of]))
    best = hypervolume(joint, reference)
    found = {}
    for mode, of in values.items():
        curves = [hypervolume_curve(run, reference) for run in of]
        found[mode] = {
            "hypervolume": {n: statistics.median(float(c[n - 1]) for c in curves) for n in MARKS if n <= trials},
            "of_joint": statistics.median(float(c[-1]) / best for c in curves),
            "adrs": statistics.median(scaled_adrs(run, joint) for run in of),
        }
    return found


def show(console: Console, title: str, entries: Sequence[Mapping[str, Any]], landscape: Mapping[str, Any]) -> None:
    """Print the table of both."""
    points = list(entries[0]["hypervolume"])
    names = ("mode", "seed", *(f"HV at {n}" for n in points), "of joint", "ADRS", "trials to paper's", "front",
             "on joint", "best accuracy", "fastest", "smallest", "s a trial", "minutes", "float")  # fmt: skip
    cells = []
    for entry in entries:
        reached, volumes = entry["trials_to_paper"], (f"{value:.4f}" for value in entry["hypervolume"].values())
        cells.append(
            [
                entry["mode"], entry["seed"], *volumes, f"{entry['of_joint']:.1%}", f"{entry['adrs']:.3f}",
                f"> {entry['trials']}" if reached is None else reached, entry["front"], entry["of_front"],
                f"{entry['best_accuracy']:.2%}", f"{entry['fastest_us']:.0f} us",
                f"{entry['smallest_bytes'] / 1e6:.2f} MB", f"{entry['trial_s']:.1f}", f"{entry['seconds'] / 60:.1f}",
                f"{entry['float_us']:.0f} us",
            ]
        )  # fmt: skip
    for mode, said in landscape.items():
        volumes = (f"{value:.4f}" for value in said["hypervolume"].values())
        cells.append([f"{mode}, by the landscape", "", *volumes, f"{said['of_joint']:.1%}", f"{said['adrs']:.3f}"])
    console.print(table_of(title, names, ("mode",), cells))


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES), metavar="MODE")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--landscape", default="resnet18_glyphs", help="that says what to expect")
    parser.add_argument("--replays", type=int, default=10, help="seeds of it; 0: none")
    parser.add_argument("--table", action="store_true", help="of the runs that are complete; nothing is run")
    parser.add_argument("--folder", type=Path, default=Path("outputs/benchmarks/modes"), help="for all that is kept")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further arguments of the recipe")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command line; the exit status is 1 where a run failed."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.trials < 2:
        parser.error("--trials is at least 2")
    console = console_of(200)
    options.folder.mkdir(parents=True, exist_ok=True)
    for seed, mode in () if options.table else itertools.product(options.seeds, options.modes):
        console.print(f"{mode}, seed {seed}", markup=False)
        try:
            run(mode, seed, options.trials, options.folder, options.set)
        except BaqeError as error:
            console.print(f"error: {error}", markup=False, style="red")
            return 1
    runs = {(mode, seed): options.folder / f"{mode}_{seed}" for mode in options.modes for seed in options.seeds}
    summaries = {key: Summary.load(path) for key, path in runs.items() if (path / "seconds.json").exists()}
    complete = {key: found for key, found in summaries.items() if len(complete_trials(found)) >= options.trials}
    if not complete:
        parser.error(f"no run in {options.folder} has {options.trials} complete trials: run without --table")
    seconds = {key: float(json.loads((runs[key] / "seconds.json").read_text())) for key in complete}
    entries = summarise(complete, seconds)
    said = {}
    if options.replays:
        said = predicted(options.landscape, options.modes, options.trials, options.replays, options.folder, console)
    about = next(iter(complete.values())).device
    title = f"recipe=qat_search data=glyphs, {options.trials} trials, on {about['cpu']}, {os.cpu_count()} cores"
    show(console, title, entries, said)
    content = {"device": about, "runs": entries, "landscape": said}
    replace_file(options.folder / "modes.json", json.dumps(content, indent=1).encode())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
