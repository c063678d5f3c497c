"""How long a step of quantization-aware training takes, and how much memory, against float and Brevitas.

    python -m lightning_baqe.benchmarks.quantizers --threads 2

ResNet-18, 4 bits (first and last layer 8), learned scales and offsets (LSQ+); forward, backward, SGD. All candidates
take one step each in turns, in one process; a ratio is the median over the rounds of what both took in the same round,
with its quartiles. Memory is that of a process of its own for each: the largest resident set during some steps, once
the network is made and quantized, less that before; on a GPU the largest allocation.

Brevitas is compared if it is there. It asks for an older setuptools than PyTorch does, so that no extra installs it:
``pip install --no-deps brevitas dependencies==2.0.1 unfoldNd``. torchao's training has no convolutions.

The limits, on two cores, of 32 images of 64x64: compiled at most 1.3 of compiled float and 0.5 of Brevitas; not
compiled at most 1.7 of float, with at most 1.6 of its memory.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from lightning_baqe.benchmarks.quantizers.candidates import CANDIDATES, Trainee, available
from lightning_baqe.benchmarks.setups import check_positive, console_of, parser_of, table_of
from lightning_baqe.hardware.target import cpu_name

LIMITS = (
    ("ours, compiled", "float, compiled", 1.3),
    ("ours, compiled", "Brevitas", 0.5),
    ("ours", "float", 1.7),
)
MEMORY_LIMIT = 1.6
_WARM_UP = 3


def step_times(names: list[str], options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each step by candidate, those of one round at the same place."""
    trainees = {name: _trainee(name, options) for name in names}
    for trainee in trainees.values():
        for _ in range(_WARM_UP):
            trainee.step()
    found: dict[str, list[float]] = {name: [] for name in names}
    gc.disable()
    for _ in range(options.rounds):
        for name, trainee in trainees.items():
            start = time.perf_counter()
            trainee.step()
            found[name].append(time.perf_counter() - start)
    gc.enable()
    return found


def _trainee(name: str, options: argparse.Namespace) -> Trainee:
    return Trainee(name, options.batch, options.side, torch.device(options.device), options.channels_last)


def peak_bytes(name: str, options: argparse.Namespace) -> int:
    """Of some steps of a candidate alone, in this process."""
    if options.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    before = _memory("VmRSS")
    trainee = _trainee(name, options)
    if CANDIDATES[name][1]:
        trainee.step()  # compiles
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what making the network took
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    for _ in range(_WARM_UP):
        trainee.step()
    return _memory("VmHWM") - before if options.device == "cpu" else torch.cuda.max_memory_allocated()


def _memory(field: str) -> int:
    """Of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _peak_elsewhere(name: str, options: argparse.Namespace) -> float:
    """Of a process of its own, MB."""
    command = [sys.executable, "-m", "lightning_baqe.benchmarks.quantizers", "--memory-of", name,
               "--batch", str(options.batch), "--side", str(options.side), "--device", options.device,
               "--threads", str(options.threads), *(["--channels-last"] if options.channels_last else [])]  # fmt: skip
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(shown.split()[-1]) / 1e6


def ratio_of(times: dict[str, list[float]], name: str, reference: str) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile over the rounds."""
    ratios = [a / b for a, b in zip(times[name], times[reference], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [*ratios * 3]
    return low, middle, high


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0 if all limits are kept, else 1."""
    parser = parser_of(__doc__)
    parser.add_argument("--batch", type=int, default=32, help="images")
    parser.add_argument("--side", type=int, default=64, help="pixels")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--channels-last", action="store_true", help="the memory format of all candidates")
    parser.add_argument("--candidates", nargs="+", choices=list(CANDIDATES), help="some of them")
    parser.add_argument("--memory-of", choices=list(CANDIDATES), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    check_positive(parser, options, "batch", "side", "rounds", "threads")
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print(peak_bytes(options.memory_of, options))
        return 0
    names = options.candidates or available()
    console = console_of(130)
    memory = {name: _peak_elsewhere(name, options) for name in names}
    times = step_times(names, options)
    rows = []
    for name in names:
        cells: list[object] = [name, f"{1e3 * statistics.median(times[name]):.0f}"]
        for reference in ("float", "float, compiled", "Brevitas"):
            known = reference in times
            cells.append("{1:.2f} ({0:.2f}-{2:.2f})".format(*ratio_of(times, name, reference)) if known else "")
        share = f"{memory[name] / memory['float']:.2f}" if "float" in memory else ""
        rows.append([*cells, f"{memory[name]:.0f}", share])
    where = cpu_name() if options.device == "cpu" else torch.cuda.get_device_name()
    title = f"{where}, {options.threads} threads: step of {options.batch} images of {options.side}x{options.side}"
    headings = ("", "ms", "of float (quartiles)", "of float, compiled", "of Brevitas", "MB", "of float")
    console.print(table_of(title, headings, ("",), rows))
    broken = []
    for name, reference, limit in LIMITS:
        if {name, reference} <= set(times) and (found := ratio_of(times, name, reference)[1]) > limit:
            broken.append(f"{name}: {found:.2f} of {reference}, {limit} allowed")
    if {"ours", "float"} <= set(memory) and memory["ours"] > MEMORY_LIMIT * memory["float"]:
        broken.append(f"ours: {memory['ours'] / memory['float']:.2f} of float's memory, {MEMORY_LIMIT} allowed")
    console.print("\n".join(broken) or "all limits are kept")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
