"""What a search should order bits by before its first trial: ``python -m lightning_baqe.benchmarks.bits.priors``.

The float network of a measured landscape is trained as it was for the landscape. Each prior of ``search.prior`` is
taken from it, as a search takes it, on one batch of training images. Then mode beyond is told one of them and searches
the landscape, from many seeds; "none" is told sizes and latencies alone. All of a seed get the same pool of 500
candidates. The table is that of ``benchmarks.search``, against the divergence.

Every run is kept in a folder; the same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from lightning_baqe.allocation.evidence import Evidence
from lightning_baqe.benchmarks.landscape_accuracy import Trial, float_network, row_key
from lightning_baqe.benchmarks.replays import fill
from lightning_baqe.benchmarks.search import judged_front
from lightning_baqe.benchmarks.search_runs import POOL_SIZE, follow
from lightning_baqe.benchmarks.search_tables import curves_of, draw_curves, print_summary, runs_of, summarise
from lightning_baqe.benchmarks.setups import begin, check_positive, console_of, parser_of
from lightning_baqe.benchmarks.synthetic import problem_named
from lightning_baqe.calibration.calibrate import calibrate
from lightning_baqe.costs.layer_costs import uniform_configs
from lightning_baqe.entrance.admission import admit
from lightning_baqe.entrance.quantize import quantize
from lightning_baqe.files import Rows, kept, replace_file
from lightning_baqe.landscapes.latency_tables import WIDTHS, searched_layers
from lightning_baqe.landscapes.measured import Landscape
from lightning_baqe.quantization.config import FLOAT_BITS, BitConfig
from lightning_baqe.runs.search_arguments import PRIORS
from lightning_baqe.runs.search_context import SCORED
from lightning_baqe.search import BaqeSampler
from lightning_baqe.tasks.classifier import loss_of

NONE = "none"
NETWORKS = ("resnet18", "mobilenet_v2")
KEY = ("problem", "sampler", "seed", "trials", "initial", "folder")
Sensitivity = dict[str, dict[int, float]]


def take(network: str, folder: Path, trial: Trial) -> None:
    """Train the network and take every prior that the folder has not."""
    net = float_network(network, trial, folder / f"{network}.ckpt", print)

    @cache
    def evidence() -> Evidence:
        data = trial.data()
        data.prepare_data()
        data.setup("fit")
        pl.seed_everything(0, verbose=False)
        x, y = next(iter(data.train_dataloader()))
        admitted, base = admit(net, x[:1]), BitConfig.uniform(net, 8, 8)
        uniform = uniform_configs(base, searched_layers(base), tuple(width for width in WIDTHS if width != FLOAT_BITS))
        models = {width: calibrate(quantize(admitted, bits), [x]).eval() for width, bits in uniform.items()}
        return Evidence(models, [(x[:SCORED], y[:SCORED])], loss_of)

    for name, prior in PRIORS.items():

        def measure(name: str = name, prior: Any = prior) -> dict[str, Any]:
            print(f"{network}: taking {name}")
            return {"values": prior.measure(evidence()).record()["values"]}

        signature = {**row_key(network, trial), "prior": repr(prior), "images": SCORED}
        kept(folder / f"{network}-{name}.json", signature, measure)


@cache
def _sensitivity(folder: str, network: str, prior: str) -> Sensitivity:
    found = json.loads((Path(folder) / f"{network}-{prior}.json").read_text())["content"]["values"]
    return {layer: {int(bits): value for bits, value in of.items()} for layer, of in found.items()}


def search(problem: str, prior: str, seed: int, trials: int, initial: int, folder: str) -> dict[str, Any]:
    """One search of mode beyond, told this prior; what `replay` returns."""
    of = problem_named(problem)
    assert isinstance(of, Landscape)
    sensitivity = {} if prior == NONE else _sensitivity(folder, problem.removesuffix("_glyphs"), prior)
    pool = of.candidates(POOL_SIZE, np.random.default_rng([seed, 0]))
    sampler = BaqeSampler(
        seed, "beyond", of.distributions, pool, initial, reference_point=of.reference_point,
        knowledge=of.knowledge(sensitivity),
    )  # fmt: skip
    return follow(of, sampler, trials)


def main(arguments: list[str] | None = None, trial: Trial | None = None) -> int:
    """The command line; 0."""
    parser = parser_of(__doc__)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS, metavar="NETWORK")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--trials", type=int, default=40, help="of each run")
    parser.add_argument("--initial", type=int, default=10, help="trials of them before the first model")
    parser.add_argument("--population", type=int, default=300, help="of the long NSGA-II that judges")
    parser.add_argument("--generations", type=int, default=200, help="of the long NSGA-II that judges")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--folder", type=Path, default=Path("outputs/benchmarks/priors"), help="for all that is kept")
    options = parser.parse_args(arguments)
    check_positive(parser, options, "seeds", "jobs")
    if not 2 <= options.initial < options.trials:
        parser.error("--initial is at least 2 and below --trials")
    torch.set_num_threads(1)
    console, names = console_of(200), [*PRIORS, NONE]
    begin(options.folder, {"version": 1})
    rows = Rows(options.folder / "runs.jsonl")
    for network in options.networks:
        take(network, options.folder, trial or Trial())
        problem = f"{network}_glyphs"
        counts, place = (options.trials, options.initial), str(options.folder)
        wanted = [(problem, prior, seed, *counts, place) for seed in range(options.seeds) for prior in names]
        fill(rows, KEY, wanted, search, options.jobs, console, problem)
        _report(argparse.Namespace(**vars(options), problem=problem), rows, names)
    return 0


def _report(options: argparse.Namespace, rows: Rows, names: list[str]) -> None:
    found = [row for row in rows.read() if row["initial"] == options.initial]
    runs = runs_of(found, options.problem, options.trials, names)
    front = judged_front(options, runs, Rows(options.folder / "fronts.jsonl"))
    curves = curves_of(runs, front, problem_named(options.problem).reference_point, options.seeds)
    entries = summarise(runs, curves, front, sorted({options.initial, 2 * options.initial, options.trials}))
    title = (
        f"{options.problem}: {options.initial} + {options.trials - options.initial} trials, {len(curves.seeds)} seeds"
    )
    print_summary(console_of(200), title, entries, curves)
    content = {"problem": options.problem, "seeds": curves.seeds, "priors": entries}
    replace_file(options.folder / f"priors_{options.problem}.json", json.dumps(content, indent=1).encode())
    draw_curves(curves, options.problem, options.folder / f"priors_{options.problem}.png")


if __name__ == "__main__":
    sys.exit(main())
