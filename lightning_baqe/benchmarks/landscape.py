"""Measure a landscape: ``python -m lightning_baqe.benchmarks.landscape --network mobilenet_v2``.

A landscape answers any point of a search over bits and schedules at once, so that samplers are compared over many seeds
without training (:mod:`lightning_baqe.landscapes.measured`). Here it is made from measurements, in three stages:

- ``accuracy``: bit-configs are tuned and deployed, each as a trial of ``recipe=qat_search data=glyphs`` is. Processes
  may share a folder: ``--share 0/2`` and ``--share 1/2``.
- ``latency``: every kernel with all knobs of the grid at every bit-width, all conversions, and whole networks, half
  with random and half with good knobs. On a quiet core: ``taskset -c 3 python -m ...``.
- ``table``: the models are fitted, checked against what they were not fitted to, and written.

All stages go on where they were interrupted: finished rows stay in the folder.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lightning_baqe.benchmarks.accuracy import SETTINGS
from lightning_baqe.benchmarks.landscape_accuracy import Trial, float_network, measure_rows, row_key
from lightning_baqe.benchmarks.setups import check_positive, console_of, parser_of, table_of
from lightning_baqe.costs.accuracy_models import choose, spread_of_repeats
from lightning_baqe.costs.structure import Structure
from lightning_baqe.errors import BaqeError, ConfigError
from lightning_baqe.files import Rows
from lightning_baqe.hardware.identity import toolchain, versions
from lightning_baqe.hardware.target import get_target
from lightning_baqe.landscapes import latency_tables as latency
from lightning_baqe.landscapes.measured import SUFFIX, Landscape
from lightning_baqe.landscapes.record import FORMAT, write
from lightning_baqe.measurement.device import Device
from lightning_baqe.measurement.local import Local

STAGES = ("accuracy", "latency", "table")
PROGRAM = "python -m lightning_baqe.benchmarks.landscape"


@dataclass(frozen=True)
class Request:
    """What is made.

    Args:
        configs: different bit-configs to train, repeats apart.
        tiles: of each kernel's grid.
        points: whole networks that the latency is checked on.
        device: measures, and keeps its records in the folder of everything measured.
    """

    network: str
    configs: int
    tiles: int
    points: int
    folder: Path
    trial: Trial
    device: Device

    @property
    def name(self) -> str:
        """Of the landscape."""
        return f"{self.network}_glyphs"

    def subject(self) -> latency.Subject:
        """The network, trained, with a batch to calibrate on."""
        net = float_network(self.network, self.trial, self.folder / "float.ckpt", print)
        data = self.trial.data()
        data.prepare_data()
        data.setup("fit")
        images, _ = next(iter(data.val_dataloader()))
        return latency.Subject(net, images, get_target("native"), self.tiles)


def accuracy_stage(request: Request, share: tuple[int, int], console: Console) -> None:
    """Train and deploy what is missing."""
    rows = measure_rows(request.network, request.configs, request.folder, request.trial, share, console.print)
    _follow(console, "bit-configs", _counted(rows))


def latency_stage(request: Request, console: Console) -> None:
    """Measure kernels, conversions, the float network and whole networks."""
    subject = request.subject()
    grid = latency.make_grid(subject)
    table = latency.KernelTable(subject.target, request.folder, request.device)
    # First, since tuning measures some of the grid's kernels again.
    latency.measure_float(subject, request.device, request.folder)
    _follow(console, "kernels", table.measure(grid.kernels()))
    structure = Structure(subject.net, tuple(subject.images.shape[1:]))
    latency.measure_conversions(subject, structure, grid.space, request.device, request.folder)
    space = latency.tuned_defaults(grid, table)
    points = latency.whole_points(space, request.points)
    whole = latency.measure_whole(subject, space, points, request.device, request.folder)
    _follow(console, "whole networks", _counted(whole))


def _counted(left: Iterator[int]) -> Iterator[tuple[int, int]]:
    """``(done, total)`` of steps that say how many are left, the first time before any is done."""
    total = next(left)
    yield 0, total
    yield from ((total - now, total) for now in left)


def _follow(console: Console, what: str, steps: Iterator[tuple[int, int]]) -> None:
    done, total = next(steps)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=total, completed=done)
        said = time.monotonic()
        for now, _ in steps:
            bar.update(task, completed=now)
            if not console.is_terminal and time.monotonic() - said > 60:
                said = time.monotonic()
                console.print(f"{what}: {now} of {total}")


def make_record(request: Request) -> dict[str, Any]:
    """The landscape of what was measured so far.

    Raises:
        ConfigError: too little was.
        MeasurementError: a kernel was not measured.
    """
    subject = request.subject()
    grid = latency.make_grid(subject)
    table = latency.KernelTable(subject.target, request.folder, request.device)
    next(table.measure(grid.kernels()))
    structure = Structure(subject.net, tuple(subject.images.shape[1:]))
    space = latency.tuned_defaults(grid, table)
    points = {latency.point_key(point): point for point in latency.whole_points(space, request.points)}
    found = Rows(latency.rows_folder(request.folder, request.device) / "whole.jsonl").read()
    whole = [row for row in found if row["point"] in points]
    key = row_key(request.network, request.trial)
    rows = Rows(request.folder / "rows.jsonl").of(key)
    if len(whole) < 5:
        raise ConfigError(f"{len(whole)} whole networks are measured, 5 or more are wanted: run the latency stage")
    reference = latency.measure_float(subject, request.device, request.folder)
    accuracy = _accuracy(rows, tuple(space.bit_choices))
    counts = f"--configs {request.configs} --tiles {request.tiles} --points {request.points}"
    record: dict[str, Any] = {
        "format": FORMAT,
        "name": request.name,
        "network": request.network,
        "num_classes": request.trial.data().num_classes,
        "input_shape": list(subject.images.shape[1:]),
        "space": space.record(),
        "reference": reference,
        "size": grid.sizes.record(),
        "latency": {
            **latency.latency_tables(grid, table),
            "pixels": latency.measure_conversions(subject, structure, grid.space, request.device, request.folder),
            "correction": latency.PLAIN.record(),
            "spread": spread_of_repeats([row["point"] for row in whole], np.log([row["latency_us"] for row in whole])),
        },
        "accuracy": accuracy,
        "scores": latency.sensitivities(subject),
        "seconds": _seconds(rows, whole),
        "about": {
            "command": f"{PROGRAM} --network {request.network} {counts}",
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "device": request.device.info(),
            "versions": {**versions(), **toolchain()},
            "tiles": request.tiles,
            "trial": json.loads(json.dumps(key)),
        },
    }
    plain = Landscape(record, net=subject.net)
    first = [row for row in whole if row["time"] == 0]
    parts = np.array([plain.parts(points[row["point"]]) for row in first])
    measured = np.array([row["latency_us"] for row in first])
    record["latency"]["correction"] = latency.fit_correction(parts, measured).record()
    record["about"]["latency_check"] = {
        "networks": len(first),
        "spread": record["latency"]["spread"],
        **latency.check_latency(parts, measured),
    }
    record["about"]["accuracy_check"] = accuracy["check"]
    return record


def _accuracy(rows: list[dict[str, Any]], layers: tuple[str, ...]) -> dict[str, Any]:
    widths = np.array([[row["bits"][layer] for layer in layers] for row in rows], dtype=np.float64)
    errors = np.array([1.0 - row["accuracy"] for row in rows])
    if len(rows) < 4:
        raise ConfigError(f"{len(rows)} bit-configs are trained, 4 or more are wanted: run the accuracy stage")
    model, table, best = choose(widths, errors)
    check = {
        "rows": len(rows),
        "bit_configs": len(np.unique(widths, axis=0)),
        "errors": {"mean": float(errors.mean()), "std": float(errors.std()), "min": float(errors.min()),
                   "max": float(errors.max())},
        "chosen": best,
        "held_out": table,
    }  # fmt: skip
    spread = spread_of_repeats([*map(tuple, widths.tolist())], errors)
    return {"model": model.record(), "layers": list(layers), "spread": spread, "check": check}


def _seconds(rows: list[dict[str, Any]], whole: list[dict[str, Any]]) -> dict[str, float]:
    """Of one trial, by part: the lower quartile, since a busy machine only ever adds."""
    parts = {
        "train": [row["seconds"]["train"] for row in rows],
        "build": [row["seconds"]["build"] for row in whole],
        "measure": [row["seconds"]["measure"] for row in whole],
    }
    found = {name: float(np.quantile(values, 0.25)) for name, values in parts.items()}
    found["measure"] += float(np.quantile([row["seconds"]["evaluate"] for row in rows], 0.25))
    return {name: round(value, 3) for name, value in found.items()}


def print_record(record: dict[str, Any], console: Console) -> None:
    """Print what the landscape is made of, and how far off it is."""
    about, accuracy, check = record["about"], record["about"]["accuracy_check"], record["about"]["latency_check"]
    kernels = record["latency"]["kernels"]
    console.print(
        f"{record['name']} on {about['device']['cpu']}: {len(record['space']['bit_choices'])} layers, "
        f"{len(kernels)} kernels with {sum(len(k['latency_us']) for k in kernels)} knobs, "
        f"{len(record['latency']['pixels'])} conversions; float {record['reference']['latency_us']:.0f} us",
        soft_wrap=True,
    )
    title = f"accuracy: held-out predictions of {accuracy['bit_configs']} bit-configs, 10 folds"
    cells: list[list[str]] = []
    for name, scores in accuracy["held_out"].items():
        shown = f"{name} *" if name == accuracy["chosen"] else name
        cells.append([shown, f"{scores['r2']:.3f}", f"{100 * scores['mae']:.2f} points", f"{scores['spearman']:.3f}"])
    console.print(table_of(title, ("model", "R2", "mean absolute error", "rank correlation"), ("model",), cells))
    errors = accuracy["errors"]
    console.print(
        f"errors {100 * errors['min']:.2f} to {100 * errors['max']:.2f} %, standard deviation "
        f"{100 * errors['std']:.2f} points; of equal bits {100 * record['accuracy']['spread']:.2f} points",
        soft_wrap=True,
    )
    title = f"latency: {check['networks']} whole networks, corrections fitted to others (5 folds)"
    headings = ("model", "rank correlation", "median error", "mean error", "largest error")
    cells = []
    for name in ("sum", "corrected"):
        relative = [f"{check[name][f'{kind}_relative_error']:.1%}" for kind in ("median", "mean", "largest")]
        cells.append([name, f"{check[name]['spearman']:.3f}", *relative])
    console.print(table_of(title, headings, ("model",), cells))
    factors = record["latency"]["correction"]
    console.print(
        f"latency = {factors['constant']:.1f} us + {factors['kernels']:.2f} kernels + {factors['conversions']:.2f} "
        f"conversions + {factors['calls']:.2f} us a conversion + {factors['megabytes']:.2f} us a MB + "
        f"{factors['beyond']:.2f} us a MB above {factors['cached_mb']:.0f}; repeated measurements spread by "
        f"{check['spread']:.1%}; a trial takes {sum(record['seconds'].values()):.0f} s",
        soft_wrap=True,
    )


def _share(text: str) -> tuple[int, int]:
    k, _, m = text.partition("/")
    if not (k.isdigit() and m.isdigit() and int(k) < int(m)):
        raise argparse.ArgumentTypeError(f"{text!r}; a share is k/m with k below m, such as 0/2")
    return int(k), int(m)


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__)
    parser.add_argument("--network", default="resnet18", choices=list(SETTINGS["glyphs"]))
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES, metavar="STAGE",
                        help=f"out of {', '.join(STAGES)}")  # fmt: skip
    parser.add_argument("--configs", type=int, default=110, help="bit-configs to train")
    parser.add_argument("--share", type=_share, default=(0, 1), metavar="K/M", help="of the bit-configs")
    parser.add_argument("--tiles", type=int, default=latency.TILES, help="of each kernel, the best by estimated cost")
    parser.add_argument("--points", type=int, default=44, help="whole networks that the latency is checked on")
    parser.add_argument("--folder", type=Path, help="of everything measured; default outputs/landscape/<network>")
    parser.add_argument("--out", type=Path, help=f"the landscape's file, *{SUFFIX}; default in the folder")
    return parser


def main(arguments: list[str] | None = None, device: Device | None = None, trial: Trial | None = None) -> int:
    """The command line, for a device instead of this machine, and other trials than the recipe's, if they are given.

    Returns:
        the exit status: 0, or 1 after an error that says what to do.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    check_positive(parser, options, "configs", "tiles", "points")
    torch.set_num_threads(1)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)  # hardware and tips, anew for each Trainer
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message="The number of training batches .* is smaller than the logging interval")
    folder = options.folder or Path("outputs/landscape") / options.network
    request = Request(
        options.network, options.configs, options.tiles, options.points, folder, trial or Trial(),
        (device or Local()).keeping(folder / "records.db"),
    )  # fmt: skip
    console = console_of(140)
    try:
        if "accuracy" in options.stages:
            accuracy_stage(request, options.share, console)
        if "latency" in options.stages:
            latency_stage(request, console)
        if "table" in options.stages:
            record = make_record(request)
            path = options.out or folder / f"{request.name}{SUFFIX}"
            write(record, path)
            print_record(record, console)
            console.print(f"Landscape: {path}", markup=False, soft_wrap=True)
    except BaqeError as error:
        console.print(f"{type(error).__name__}: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
