"""How bits are brought down to a size: our controller, a schedule that black-box search found, ADMM.

    python -m lightning_baqe.benchmarks.quantizers.schedules

Schaefer et al. compare their schedule with one from 766 evaluations of a black-box optimiser (Figure 6) and with ADMM
(section 4.4.3). Here it is ResNet-8 on Fashion-MNIST at means of 3 and 2.5 bits, first and last layer too. The search
(Optuna's TPE, two objectives: validation accuracy, and how far the size is from its target) is over the paper's space:
steps from one update to the next, beta, bits of the pretraining, length and kind of the ramp. It sees shorter trainings
at a mean of 3 bits; of the trials within 2 % of the size the most accurate one is taken, and if there is none, the one
that is nearest. All three are then trained for the same steps, from three seeds; what the search took stands beside.

"learned" is the size at the end of learning over its target, before whole bits that keep it are chosen. Finished rows
and trials are kept in the folder, and a restart goes on behind them.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import optuna
import torch

from lightning_baqe.benchmarks.accuracy_rows import Request, Sizes, float_network
from lightning_baqe.benchmarks.quantizers.gradients import SETTINGS
from lightning_baqe.benchmarks.quantizers.learning import Length, Schedule, learn
from lightning_baqe.benchmarks.setups import check_positive, console_of, parser_of, table_of
from lightning_baqe.data.base import ImageDataModule
from lightning_baqe.files import Rows
from lightning_baqe.hardware.identity import device_info, versions
from lightning_baqe.learned_bits.pressure import RAMPS
from lightning_baqe.runs.evaluation import module_accuracy

MEANS, SEARCHED_MEAN, NEAR = (3.0, 2.5), 3.0, 0.02
GIVEN = {"controller": Schedule(), "ADMM": Schedule("admm")}
SEARCHED = "black box"
SEARCH_LENGTH, LENGTH = Length(20, 1, 3, 2, 4e-3), Length(60, 1, 5, 4, 4e-3)


def suggested(trial: optuna.trial.BaseTrial, steps: int) -> Schedule:
    """A point of the paper's space, for so many steps of learning."""
    options = {
        "final": trial.suggest_float("beta", 1.0, 1e4, log=True),
        "kind": trial.suggest_categorical("kind", list(RAMPS)),
        "share": trial.suggest_float("share", 0.1, 1.0),
    }
    every, start = trial.suggest_int("every", 1, min(20, steps), log=True), trial.suggest_int("start", 4, 8)
    return Schedule("ramp", options, every, start)


class Bench:
    """The float network of each seed, and rows of what came of it.

    Args:
        folder: of rows and checkpoints.
        root: of the images.
        network, float_epochs: of the float network.
        lengths: of a search's trainings, and of the final ones.
        say: told of every step.
    """

    def __init__(
        self, folder: Path, root: Path | None, network: str, float_epochs: int, lengths: tuple[Length, Length],
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.folder, self.root, self.network, self.say = folder, root, network, say
        self.settings, self.lengths = SETTINGS.with_epochs(float_epochs, None), lengths
        self.rows = Rows(folder / "schedules.jsonl")
        self._nets: dict[int, tuple[ImageDataModule, torch.nn.Module]] = {}

    def row(self, schedule: Schedule, mean: float, seed: int, length: Length, split: str) -> dict[str, Any]:
        """Of one training, made now or before."""
        request = Request("fashion_mnist", self.network, "", seed, Sizes(), self.settings, self.root)
        key = {"float": request.float_key, "schedule": asdict(schedule), "mean": mean, "length": asdict(length),
               "split": split}  # fmt: skip
        known = next(iter(self.rows.of(key)), None)
        if known is not None:
            return known
        if seed not in self._nets:
            data, trained = float_network(request, self.folder, self.say)
            self._nets[seed] = (data, trained.net.eval())
        data, net = self._nets[seed]
        found = learn(net, data, mean, schedule, length, seed)
        loader = data.val_dataloader() if split == "val" else data.test_dataloader()
        accuracy = module_accuracy(found.model, loader, torch.device("cpu"))
        row = {
            "key": key, "accuracy": accuracy, "learned": [bits / mean for bits in found.learned],
            "sizes": list(found.sizes), "seconds": found.seconds, "device": device_info(1), "versions": versions(),
        }  # fmt: skip
        self.rows.append(row)
        self.say(f"  seed {seed}, mean {mean:g}, {schedule.pressure}: {accuracy:.2%}, {row['learned']}")
        return row

    def search(self, trials: int) -> tuple[Schedule, float]:
        """What a black box finds, and the seconds of its trainings."""
        study = optuna.create_study(
            directions=["maximize", "minimize"], sampler=optuna.samplers.TPESampler(seed=0, multivariate=False)
        )
        found, seconds = [], 0.0
        for _ in range(trials):  # the same trials after a restart: their rows are known
            trial = study.ask()
            schedule = suggested(trial, self.lengths[0].steps * self.lengths[0].learn)
            row = self.row(schedule, SEARCHED_MEAN, 0, self.lengths[0], "val")
            away = statistics.fmean(abs(over - 1) for over in row["learned"])
            study.tell(trial, [row["accuracy"], away])
            found.append((away, row["accuracy"], schedule))
            seconds += row["seconds"]
        near = [entry for entry in found if entry[0] <= NEAR]
        best = max(near, key=lambda entry: entry[1]) if near else min(found, key=lambda entry: entry[0])
        return best[2], seconds


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0."""
    parser = parser_of(__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--means", nargs="+", type=float, default=list(MEANS), metavar="BITS")
    parser.add_argument("--trials", type=int, default=20, help="of the search")
    parser.add_argument("--network", default="resnet8")
    parser.add_argument("--float-epochs", type=int, default=SETTINGS.float_training.epochs)
    parser.add_argument("--steps", type=int, default=LENGTH.steps, help="of an epoch of the final trainings")
    parser.add_argument("--root", type=Path, help="of the images, if they are not where Debian puts them")
    parser.add_argument("--folder", type=Path, default=Path("outputs/gradients"), help="of rows and checkpoints")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    check_positive(parser, options, "trials", "float-epochs", "steps", "threads")
    torch.set_num_threads(options.threads)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    console = console_of(150)
    lengths = (
        replace(SEARCH_LENGTH, steps=min(SEARCH_LENGTH.steps, options.steps)),
        replace(LENGTH, steps=options.steps),
    )
    bench = Bench(options.folder, options.root, options.network, options.float_epochs, lengths, console.print)
    searched, cost = bench.search(options.trials)
    console.print(f"{SEARCHED}: {asdict(searched)}")
    cells = []
    for mean in options.means:
        for name, schedule in (*GIVEN.items(), (SEARCHED, searched)):
            rows = [bench.row(schedule, mean, seed, lengths[1], "test") for seed in options.seeds]
            values = [100 * row["accuracy"] for row in rows]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            learned = [statistics.fmean(row["learned"][part] for row in rows) for part in (0, 1)]
            cells.append([
                name, f"{mean:g}", f"{statistics.fmean(values):.2f} ± {spread:.2f}",
                *(f"{over:.3f}" for over in learned), max(max(row["sizes"]) for row in rows) <= 1,
                f"{statistics.fmean(row['seconds'] for row in rows):.0f}", f"{cost:.0f}" if name == SEARCHED else "0",
            ])  # fmt: skip
    headings = ("schedule", "mean bits", "test accuracy, %", "learned weights", "activations", "whole bits keep it",
                "seconds", "of the search")  # fmt: skip
    title = f"{lengths[1].epochs * lengths[1].steps} steps each, {len(options.seeds)} seeds; {options.trials} trials"
    console.print(table_of(title, headings, headings[:1], cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
