"""Latency of deployed networks against OpenVINO and ONNX Runtime: ``python -m lightning_baqe.benchmarks.deploy``.

Batch 1, random weights (latency does not depend on them), one process for each engine, all pinned to the same cores.
The engines take turns in short bursts, round after round, so that a machine that changes its clock changes it for all;
the physical floor (multiply-accumulates over what the arithmetic reaches in registers) is measured in the same rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_baqe.benchmarks.engines import ENGINES, EngineRequest, command, missing_packages, random_network
from lightning_baqe.benchmarks.peak import peak_gmacs
from lightning_baqe.deploy.device import device_info, versions
from lightning_baqe.deploy.target import get_target
from lightning_baqe.errors import ConfigError, MeasurementError

INSTALL = "uv sync --group bench"


@dataclass
class EngineResult:
    """One row of the table.

    Args:
        engine: a key of :data:`ENGINES`.
        rounds_us: median latency of each round's burst.
        info: what the engine told of itself.
        floor_us: the physical floor of its arithmetic, by round; ours only.
    """

    engine: str
    rounds_us: list[float] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    floor_us: list[float] = field(default_factory=list)

    @property
    def latency_us(self) -> float:
        return statistics.median(self.rounds_us)

    @property
    def fastest_us(self) -> float:
        """The fastest round: what a machine that others use, too, still shows."""
        return min(self.rounds_us)

    @property
    def spread(self) -> float:
        """(Slowest - fastest round) / median."""
        return (max(self.rounds_us) - min(self.rounds_us)) / self.latency_us

    @property
    def is_peer(self) -> bool:
        return not self.engine.startswith("ours")

    @property
    def is_float(self) -> bool:
        return self.engine.endswith("fp32")


class _Engine:
    """An engine's process."""

    def __init__(self, request: EngineRequest, cores: list[int]) -> None:
        self.name = request.engine
        self._errors = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115  closed in __exit__
        self._process = subprocess.Popen(
            command(request, cores), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )

    def __enter__(self) -> _Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._errors.close()

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise MeasurementError(f"the process of {self.name} died: {self._errors.read()[-3000:]}")
        content: dict[str, Any] = json.loads(line)
        return content

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self.answer()


def run_model(
    model: str, engines: list[str], threads: int, rounds: int, burst_s: float, size: int, layers: bool
) -> tuple[list[EngineResult], list[dict[str, Any]]]:
    """Measure one network in all engines.

    Args:
        model: torchvision's name.
        engines: keys of :data:`ENGINES`.
        threads: of each engine.
        rounds: turns of all engines.
        burst_s: seconds of one turn of one engine.
        size: of the square image.
        layers: also every kernel of our INT8 network.

    Returns:
        results in the order of ``engines``, and the kernels' rows.

    Raises:
        ConfigError: more threads than cores.
        MeasurementError: an engine's process died.
    """
    import torch

    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    if threads > len(usable):
        raise ConfigError(f"{threads} threads are asked for, but this process may use {len(usable)} cores")
    cores = usable[-threads:]
    kernels: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="lightning_baqe-") as folder, ExitStack() as stack:
        weights, onnx = Path(folder) / "weights.pt", Path(folder) / "network.onnx"
        network = random_network(model, size)
        torch.save(network.state_dict(), weights)
        if any(not engine.startswith("ours") for engine in engines):
            _export_onnx(network, onnx, size)
        results, processes = [], []
        for engine in engines:
            request = EngineRequest(engine, model, str(weights), str(onnx), threads, size)
            process = stack.enter_context(_Engine(request, cores))
            results.append(EngineResult(engine, info=process.answer()))
            processes.append(process)
        for turn in range(rounds):
            peaks: dict[tuple[str, int], float] = {}
            for index in range(len(engines)):
                at = (index + turn) % len(engines)  # nobody always runs after the same neighbour
                result, process = results[at], processes[at]
                result.rounds_us.append(statistics.median(process.ask({"burst_s": burst_s})["samples_us"]))
                if not result.is_peer:
                    dot = (result.info["dot"], result.info["chain"])
                    if dot not in peaks:
                        peaks[dot] = peak_on(cores, dot)
                    result.floor_us.append(result.info["macs"] / (peaks[dot] * threads) / 1e3)
        if layers:
            first = next(p for p in processes if p.name.startswith("ours"))
            kernels = first.ask({"layers": True})["layers"]
    return results, kernels


def peak_on(cores: list[int], dot: tuple[str, int]) -> float:
    """:func:`peak_gmacs` of this CPU, measured on one of the cores."""
    if not hasattr(os, "sched_setaffinity"):
        return peak_gmacs(get_target(), *dot)
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores[-1:])
    try:
        return peak_gmacs(get_target(), *dot)
    finally:
        os.sched_setaffinity(0, before)


def _export_onnx(network: Any, path: Path, size: int) -> None:
    import warnings

    import torch

    with warnings.catch_warnings():  # the exporter that needs no further package is deprecated
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            network, (torch.zeros(1, 3, size, size),), str(path), dynamo=False,
            input_names=["x"], output_names=["y"], opset_version=17,
        )  # fmt: skip


def summarize(results: list[EngineResult]) -> list[dict[str, Any]]:
    """Rows of the table: latency, ratios to the fastest peer of the same kind of arithmetic, share of the floor."""
    rows = []
    for result in results:
        peers = [r for r in results if r.is_peer and r.is_float == result.is_float]
        best = min(peers, key=lambda r: r.latency_us, default=None)
        row: dict[str, Any] = {
            "engine": result.engine,
            "latency_us": result.latency_us,
            "fastest_us": result.fastest_us,
            "spread": result.spread,
            "rounds_us": result.rounds_us,
            "best_peer": best.engine if best else None,
            "ratio_to_best_peer": result.latency_us / best.latency_us if best else None,
            "ratio_of_fastest": result.fastest_us / min(r.fastest_us for r in peers) if peers else None,
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


def print_table(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    """Print the rows of one network."""
    table = Table(title=title)
    for heading in (
        "engine",
        "median us",
        "spread",
        "fastest",
        "x best peer",
        "rounds' range",
        "fastest x",
        "floor us",
        "of floor",
        "size MB",
    ):
        table.add_column(heading, justify="left" if heading == "engine" else "right")
    for row in rows:
        low_high = row.get("ratio_range")
        table.add_row(
            row["engine"],
            f"{row['latency_us']:.0f}",
            f"{row['spread']:.1%}",
            f"{row['fastest_us']:.0f}",
            f"{row['ratio_to_best_peer']:.2f}" if row["ratio_to_best_peer"] else "",
            f"{low_high[0]:.2f}-{low_high[1]:.2f}" if low_high else "",
            f"{row['ratio_of_fastest']:.2f}" if row["ratio_of_fastest"] else "",
            f"{row['floor_us']:.0f}" if row["floor_us"] else "",
            f"{row['floor_share']:.0%}" if row["floor_share"] else "",
            f"{row['size_bytes'] / 1e6:.2f}" if "size_bytes" in row else "",
        )
    console.print(table)


def print_layers(console: Console, title: str, kernels: list[dict[str, Any]]) -> None:
    """Print the kernels of one network."""
    table = Table(title=title)
    for heading in ("computes", "us", "GMAC/s", "knobs"):
        table.add_column(heading, justify="right" if heading in ("us", "GMAC/s") else "left")
    for row in kernels:
        speed = f"{row['macs'] / row['latency_us'] / 1e3:.0f}" if row["macs"] else ""
        knobs = " ".join(str(row["knobs"][name]) for name in sorted(row["knobs"]))
        table.add_row(" + ".join(row["nodes"]), f"{row['latency_us']:.1f}", speed, knobs)
    table.add_row("sum", f"{sum(row['latency_us'] for row in kernels):.1f}", "", "")
    console.print(table)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18"], help="torchvision names")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES), metavar="ENGINE")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--burst-s", type=float, default=0.5, help="seconds of one engine's turn")
    parser.add_argument("--size", type=int, default=224, help="of the image")
    parser.add_argument("--layers", action="store_true", help="also every kernel of our first network")
    parser.add_argument("--json", type=Path, help="write all figures here")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds is at least 1")
    console = Console(width=130 if not Console().is_terminal else None)
    engines = []
    for engine in options.engines:
        missing = missing_packages(engine)
        if missing:
            console.print(f"{engine} is left out: {', '.join(missing)} not installed; run `{INSTALL}`")
        else:
            engines.append(engine)
    info = device_info(options.threads)
    console.print(
        f"{info['cpu']}; {' '.join(info['flags'])}; batch 1, {options.threads} thread(s), {options.rounds} rounds"
    )
    written: dict[str, Any] = {"device": info, "versions": versions() | _peer_versions(), "options": vars(options) | {}}
    written["options"]["json"] = str(options.json)
    written["models"] = {}
    for model in options.models:
        results, kernels = run_model(
            model, engines, options.threads, options.rounds, options.burst_s, options.size, options.layers
        )
        rows = summarize(results)
        print_table(console, f"{model}, {options.size}x{options.size}", rows)
        if kernels:
            print_layers(console, f"kernels of {model}, each alone", kernels)
        written["models"][model] = {"rows": rows, "kernels": kernels, "raw": [asdict(result) for result in results]}
        if options.json is not None:
            options.json.write_text(json.dumps(written, indent=1))


def _peer_versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("openvino", "nncf", "onnxruntime", "onnx"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


if __name__ == "__main__":
    main()
