"""Latency of deployed networks against the other engines: ``python -m lightning_baqe.benchmarks.deploy``.

Batch 1, random weights (latency does not depend on them), one process for each engine, pinned to as many cores as it
has threads. The engines take turns in short bursts, round after round, so that a machine that changes its clock changes
it for all; the physical floor (multiply-accumulates over what the arithmetic reaches in registers) is measured in the
same rounds. Every engine's logits are compared with those of the float network; :mod:`.engines` lists the engines.

``--layers`` puts our kernels beside what OpenVINO and ONNX Runtime say of theirs, timed in the same rounds.
``--exact`` counts how many results of the engines' integer arithmetic are wrong (:mod:`.saturation`).

With ``--json FILE`` every network's figures are written as soon as they are there; the same command goes on with the
networks that are missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
from dataclasses import asdict
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from lightning_baqe.benchmarks.setups import table_of
from lightning_baqe.deploy.digest import code_digest
from lightning_baqe.engines.engine_process import ENGINES, engine_name, missing_packages
from lightning_baqe.engines.engine_runs import EngineResult, ModelRun, RunOptions, run_model
from lightning_baqe.engines.layer_tables import kind_rows, layer_rows, print_layers
from lightning_baqe.errors import BaqeError, ConfigError
from lightning_baqe.files import replace_file
from lightning_baqe.hardware.identity import device_info, versions

INSTALL = "uv sync --group bench"
MODELS = ("resnet18", "resnet50", "mobilenetv2_100", "inception_v3")
_PEER_PACKAGES = ("openvino", "nncf", "onnxruntime", "onnx", "torchao")


def summarize(results: list[EngineResult]) -> list[dict[str, Any]]:
    """Rows of the table: latency, ratios to the fastest peer of the same kind of arithmetic, share of the floor.

    Peers are taken as their users get them: ONNX Runtime's exact mode has a row, but is no best peer.
    """
    rows = []
    for result in results:
        alike = [r for r in results if r.threads == result.threads]
        peers = [r for r in alike if r.is_default and r.is_float == result.is_float]
        best = min(peers, key=lambda r: r.latency_us, default=None)
        fewest = min(r.threads for r in results if r.engine == result.engine)
        base = next(r for r in results if r.engine == result.engine and r.threads == fewest)
        row: dict[str, Any] = {
            "engine": result.engine,
            "threads": result.threads,
            "latency_us": result.latency_us,
            "fastest_us": result.fastest_us,
            "spread": result.spread,
            "rounds_us": result.rounds_us,
            "best_peer": best.engine if best else None,
            "ratio_to_best_peer": result.latency_us / best.latency_us if best else None,
            "ratio_of_fastest": result.fastest_us / min(r.fastest_us for r in peers) if peers else None,
            "speedup": base.latency_us / result.latency_us,
            "agreement": result.agreement,
            "floor_us": None,
            "floor_share": None,
            **result.info,
        }
        if best and best is not result:
            ratios = [ours / theirs for ours, theirs in zip(result.rounds_us, best.rounds_us, strict=True)]
            row["ratio_range"] = [min(ratios), max(ratios)]
        if result.floor_us:
            row["floor_us"] = statistics.median(result.floor_us)
            row["floor_share"] = row["floor_us"] / result.latency_us
        rows.append(row)
    return rows


def print_rows(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    """Print the rows of one network, a table for each number of threads."""
    counts = sorted({row["threads"] for row in rows})
    for threads in counts:
        table = Table(title=f"{title}, {threads} thread(s)")
        headings = ["engine", "median us", "spread", "fastest", "x best peer", "rounds' range", "fastest x"]
        headings += ["floor us", "of floor", "agrees", "MB"]
        if threads > counts[0]:
            headings.append(f"speed-up on {counts[0]}")
        for heading in headings:
            table.add_column(heading, justify="left" if heading == "engine" else "right", no_wrap=heading == "engine")
        for row in (row for row in rows if row["threads"] == threads):
            low_high = row.get("ratio_range")
            cells = [
                row["engine"],
                f"{row['latency_us']:.0f}",
                f"{row['spread']:.1%}",
                f"{row['fastest_us']:.0f}",
                f"{row['ratio_to_best_peer']:.2f}" if row["ratio_to_best_peer"] else "",
                f"{low_high[0]:.2f}-{low_high[1]:.2f}" if low_high else "",
                f"{row['ratio_of_fastest']:.2f}" if row["ratio_of_fastest"] else "",
                f"{row['floor_us']:.0f}" if row["floor_us"] else "",
                f"{row['floor_share']:.0%}" if row["floor_share"] else "",
                f"{row['agreement']:.4f}" if row["agreement"] is not None else "",
                f"{row['size_bytes'] / 1e6:.2f}" if "size_bytes" in row else "",
            ]
            table.add_row(*cells, *([f"{row['speedup']:.2f}"] if threads > counts[0] else []))
        console.print(table)


class Store:
    """The figures of a run in a JSON file, network by network.

    Args:
        path: of the file; None keeps the figures in memory alone.
        header: what was measured where, with what and how.

    Raises:
        ConfigError: the file holds figures of something else.
    """

    def __init__(self, path: Path | None, header: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {**json.loads(json.dumps(header)), "models": {}}
        if path is not None and path.exists():
            before = json.loads(path.read_text())
            changed = [name for name in header if before.get(name) != self.content[name]]
            if changed:
                what = "; ".join(f"{name}: {before.get(name)}, now {self.content[name]}" for name in changed)
                raise ConfigError(f"{path} holds another run's figures ({what}): give another file, or remove it")
            self.content = before

    @property
    def models(self) -> dict[str, Any]:
        models: dict[str, Any] = self.content["models"]
        return models

    def add(self, model: str, figures: dict[str, Any]) -> None:
        """Keep a network's figures, and write them at once."""
        self.models[model] = figures
        if self.path is not None:
            replace_file(self.path, json.dumps(self.content, indent=1).encode())


def show(console: Console, model: str, figures: dict[str, Any]) -> None:
    """Print all tables of one network."""
    for engine, reason in figures["left_out"].items():
        console.print(f"{engine} is left out: {reason}", markup=False)
    print_rows(console, f"{model}, {figures['size']}x{figures['size']}", figures["rows"])
    for table in figures["layers"]:
        title = f"{model}, {table['threads']} thread(s), each kernel in its place in the network"
        print_layers(console, title, table["layers"])
        print_layers(console, f"{title}, by kind", table["kinds"])
    if any(figures["exactness"].values()):
        print_exactness(console, model, figures["exactness"])


def print_exactness(console: Console, model: str, checks: dict[str, list[dict[str, Any]]]) -> None:
    """Print how many elements of each engine's results are wrong."""
    headings = ("engine", "check", "elements", "wrong", "share", "largest")
    table = table_of(f"{model}: how exact the integer arithmetic is", headings, ("engine", "check"))
    for engine, rows in checks.items():
        for row in rows:
            share = row["differing"] / row["elements"]
            counts = (str(row["elements"]), str(row["differing"]), f"{share:.3%}", f"{row['largest']:.2%}")
            table.add_row(engine, row["check"], *counts)
    console.print(table)


def layer_figures(run: ModelRun) -> list[dict[str, Any]]:
    """The layers' tables, for each number of threads and kind of arithmetic; ours first."""
    tables = []
    for threads, profiles in run.profiles.items():
        for is_float in (False, True):
            alike = {engine: rows for engine, rows in profiles.items() if engine.endswith("fp32") == is_float}
            if alike:
                ours_first = dict(sorted(alike.items(), key=lambda item: not item[0].startswith("ours")))
                rows, kinds = layer_rows(ours_first, run.layers), kind_rows(ours_first, run.layers)
                tables.append({"threads": threads, "layers": rows, "kinds": kinds, "profiles": ours_first})
    return tables


def figures_of(run: ModelRun) -> dict[str, Any]:
    """What is kept of one network."""
    return {
        "size": run.size,
        "rows": summarize(run.results),
        "left_out": run.left_out,
        "layers": layer_figures(run),
        "exactness": run.exactness,
        "raw": [asdict(result) for result in run.results],
    }


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="names of torchvision or timm")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), help=f"{', '.join(ENGINES)}, ours-wXaY")
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--burst-s", type=float, default=0.5, help="seconds of one engine's turn")
    parser.add_argument("--size", type=int, help="of the image; each network's own if left out")
    parser.add_argument("--bits", type=Path, help="bit-config of ours-mixed, for networks with these layers")
    parser.add_argument("--layers", action="store_true", help="also every layer beside the peers' own profiles")
    parser.add_argument("--exact", action="store_true", help="also count how often 8-bit sums saturate")
    parser.add_argument("--json", type=Path, help="keep all figures here, and go on with what is there")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or min(options.threads) < 1:
        parser.error("--rounds and --threads are at least 1")
    console = Console(width=150 if not Console().is_terminal else None)
    try:
        engines = [engine_name(engine) for engine in dict.fromkeys(options.engines)]
        _run(console, options, _installed(console, engines))
    except BaqeError as error:
        parser.exit(1, f"{error}\n")


def _installed(console: Console, engines: list[str]) -> tuple[str, ...]:
    found = []
    for engine in engines:
        missing = missing_packages(engine)
        if missing:
            console.print(f"{engine} is left out: {', '.join(missing)} not installed; run `{INSTALL}`")
        else:
            found.append(engine)
    return tuple(found)


def _run(console: Console, options: argparse.Namespace, engines: tuple[str, ...]) -> None:
    if options.layers and importlib.util.find_spec("onnx") is None:
        raise ConfigError(f"--layers finds the peers' names of a layer by the onnx package: run `{INSTALL}`")
    threads = tuple(sorted(set(options.threads)))
    bits = None if options.bits is None else str(options.bits)
    how = RunOptions(
        engines, threads, options.rounds, options.burst_s, options.size, bits, options.layers, options.exact
    )
    info = device_info(max(threads))
    console.print(f"{info['cpu']}; {' '.join(info['flags'])}; batch 1, {options.rounds} rounds")
    packages = versions() | {name: _version(name) for name in _PEER_PACKAGES}
    store = Store(options.json, {"device": info, "versions": packages, "code": code_digest(), "options": asdict(how)})
    for model in options.models:
        if model not in store.models:
            columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            with Progress(*columns, console=console, transient=True) as progress:
                run = run_model(model, how, partial(_describe, progress, progress.add_task(model)))
            store.add(model, figures_of(run))
        show(console, model, store.models[model])


def _describe(progress: Progress, task: TaskID, text: str) -> None:
    progress.update(task, description=text)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()
