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
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from lightning_baqe.benchmarks.setups import INSTALL, console_of, parser_of, table_of, text_of
from lightning_baqe.deploy.digest import code_digest
from lightning_baqe.engines.engine_process import ENGINES, engine_name, missing_packages
from lightning_baqe.engines.engine_runs import EngineResult, ModelRun, RunOptions, run_model
from lightning_baqe.engines.layer_tables import kind_rows, layer_rows
from lightning_baqe.errors import BaqeError, ConfigError
from lightning_baqe.files import replace_file
from lightning_baqe.hardware.identity import device_info, versions

MODELS = ("resnet18", "resnet50", "mobilenetv2_100", "inception_v3")
COLUMNS = {  # of the table: figure and format
    "median us": ("latency_us", ".0f"),
    "spread": ("spread", ".1%"),
    "fastest": ("fastest_us", ".0f"),
    "x best peer": ("ratio_to_best_peer", ".2f"),
    "rounds' range": ("range", ""),
    "fastest x": ("ratio_of_fastest", ".2f"),
    "floor us": ("floor_us", ".0f"),
    "of floor": ("floor_share", ".0%"),
    "agrees": ("agreement", ".4f"),
    "MB": ("megabytes", ".2f"),
}
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
        floor_us = statistics.median(result.floor_us) if result.floor_us else None
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
            "floor_us": floor_us,
            "floor_share": floor_us / result.latency_us if floor_us else None,
            **result.info,
        }
        if best and best is not result:
            ratios = [ours / theirs for ours, theirs in zip(result.rounds_us, best.rounds_us, strict=True)]
            row["ratio_range"] = [min(ratios), max(ratios)]
        rows.append(row)
    return rows


def print_rows(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    """Print the rows of one network, a table for each number of threads."""
    counts = sorted({row["threads"] for row in rows})
    for threads in counts:
        columns = COLUMNS | ({f"speed-up on {counts[0]}": ("speedup", ".2f")} if threads > counts[0] else {})
        cells = []
        for row in (row for row in rows if row["threads"] == threads):
            shown = dict(row)
            if "ratio_range" in row:
                shown["range"] = "{:.2f}-{:.2f}".format(*row["ratio_range"])
            if "size_bytes" in row:
                shown["megabytes"] = row["size_bytes"] / 1e6
            cells.append([row["engine"], *(text_of(shown.get(name), form) for name, form in columns.values())])
        table = table_of(f"{title}, {threads} thread(s)", ["engine", *columns], ("engine",), cells)
        table.columns[0].no_wrap = True
        console.print(table)


def kept_figures(path: Path | None, header: dict[str, Any]) -> dict[str, Any]:
    """The content of the figures' file: ``header`` (what was measured where and how), and what it has of ``"models"``.

    Raises:
        ConfigError: the file holds figures of something else.
    """
    content: dict[str, Any] = json.loads(json.dumps(header))
    if path is None or not path.exists():
        return {**content, "models": {}}
    before: dict[str, Any] = json.loads(path.read_text())
    changed = [f"{name}: {before.get(name)}, now {now}" for name, now in content.items() if before.get(name) != now]
    if changed:
        what = "; ".join(changed)
        raise ConfigError(f"{path} holds another run's figures ({what}): give another file, or remove it")
    return before


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
    cells = []
    for engine, rows in checks.items():
        for row in rows:
            share = row["differing"] / row["elements"]
            counts = (row["elements"], row["differing"], f"{share:.3%}", f"{row['largest']:.2%}")
            cells.append((engine, row["check"], *counts))
    console.print(table_of(f"{model}: how exact the integer arithmetic is", headings, ("engine", "check"), cells))


def print_layers(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows of :func:`layer_rows` or :func:`kind_rows`: the first engine's speed, its ratio to each other one."""
    first, *others = engines = list(rows[0]["us"])
    taken, ratios = (f"{engine} us" for engine in engines), (f"x {engine}" for engine in others)
    headings = ("layer", "kind", "MMAC", *taken, "GMAC/s", *ratios)
    cells = []
    for row in rows:
        us, own, macs = row["us"], row["us"][first], row["macs"]
        speed = f"{macs / own / 1e3:.0f}" if own and macs else ""
        ratios = (f"{own / us[engine]:.2f}" if own and us[engine] else "" for engine in others)
        own_cells = (row["layer"], row["kind"], f"{macs / 1e6:.1f}" if macs else "")
        cells.append([*own_cells, *(text_of(us[engine], ".1f") for engine in engines), speed, *ratios])
    table = table_of(title, headings, ("layer", "kind"), cells)
    table.columns[0].no_wrap = True
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
    parser = parser_of(__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="names of torchvision or timm")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), help=f"{', '.join(ENGINES)}, ours-wXaY")
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--burst-s", type=float, default=0.5, help="seconds of one engine's turn")
    parser.add_argument("--size", type=int, help="of the image; each network's own if left out")
    parser.add_argument("--bits", help="file with the bit-config of ours-mixed, for networks with these layers")
    parser.add_argument("--layers", action="store_true", help="also every layer beside the peers' own profiles")
    parser.add_argument("--exact", action="store_true", help="also count how often 8-bit sums saturate")
    parser.add_argument("--json", type=Path, help="keep all figures here, and go on with what is there")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or min(options.threads) < 1:
        parser.error("--rounds and --threads are at least 1")
    console = console_of(150)
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
    how = RunOptions(
        engines, threads, options.rounds, options.burst_s, options.size, options.bits, options.layers, options.exact
    )
    info = device_info(max(threads))
    console.print(f"{info['cpu']}; {' '.join(info['flags'])}; batch 1, {options.rounds} rounds")
    packages = versions() | {name: _version(name) for name in _PEER_PACKAGES}
    header = {"device": info, "versions": packages, "code": code_digest(), "options": asdict(how)}
    content = kept_figures(options.json, header)
    for model in options.models:
        if model not in content["models"]:
            content["models"][model] = figures_of(_measured(console, model, how))
            if options.json is not None:
                replace_file(options.json, json.dumps(content, indent=1).encode())
        show(console, model, content["models"][model])


def _measured(console: Console, model: str, how: RunOptions) -> ModelRun:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(model)
        return run_model(model, how, lambda text: progress.update(task, description=text))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()
