"""What a Lightning user waits for a callback: its import beside that of torch and Lightning alone, in turns.

    python -m lightning_baqe.benchmarks.imports

Each import has a process of its own; the first round, which reads the files from disk, does not count.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from lightning_baqe.benchmarks.setups import parser_of

BASE = "import torch, pytorch_lightning"
IMPORTS = {
    "torch and Lightning": BASE,
    **{
        name: f"from lightning_baqe.callbacks import {name}"
        for name in ("Distillation", "FreezeBatchNorm", "ParetoCheckpoint", "BayesianSearch")
    },
}


def seconds(code: str) -> float:
    """Of a fresh process that runs some code."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, stdin=subprocess.DEVNULL)
    return time.perf_counter() - start


def main(arguments: list[str] | None = None) -> int:
    """Print the medians, their ratios to the first and the spread; returns the exit status."""
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args(arguments).rounds
    rows = [{name: seconds(code) for name, code in IMPORTS.items()} for _ in range(rounds + 1)][1:]
    base = statistics.median(row["torch and Lightning"] for row in rows)
    for name in IMPORTS:
        taken = [row[name] for row in rows]
        middle = statistics.median(taken)
        print(f"{name:20} {middle:6.2f} s, {middle / base:.2f}x ({min(taken):.2f} to {max(taken):.2f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
