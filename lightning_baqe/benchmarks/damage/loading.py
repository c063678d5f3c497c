"""What checks cost where ResNet-18's artifact is loaded: the proof of its graph, the digests of its files.

    python -m lightning_baqe.benchmarks.damage.loading

Processor time of one thread; medians and ranges.
"""

from __future__ import annotations

import hashlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from torchvision.models import resnet18

import lightning_baqe as baqe
from lightning_baqe.benchmarks.setups import console_of, parser_of, table_of
from lightning_baqe.deploy.artifact import Artifact
from lightning_baqe.hardware.identity import device_info


def write_artifact(folder: Path) -> None:
    """ResNet-18 at 8 bit for images of 64 x 64, random weights."""
    torch.manual_seed(0)
    images, net = torch.randn(4, 3, 64, 64), resnet18(num_classes=10).eval()
    quantized = baqe.quantize(net, baqe.BitConfig.uniform(net, 8, 8), images)
    baqe.build(baqe.lower(baqe.calibrate(quantized, [images])), schedules="default").save(folder)


def samples_ms(folder: Path, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of processor time of a load, of one without the proof, and of the digests alone, in turns; the first
    round does not count.
    """

    def load_unproven() -> None:
        with patch("lightning_baqe.integer.graph.prove", lambda node, kinds: None):
            Artifact.load(folder)

    def take_digests() -> None:
        for path in folder.iterdir():
            hashlib.sha256(path.read_bytes())

    steps: dict[str, Callable[[], object]] = {
        "load": lambda: Artifact.load(folder),
        "load without the proof": load_unproven,
        "digests of all files": take_digests,
    }
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            start = time.process_time()
            step()
            if turn:
                found[name].append(1e3 * (time.process_time() - start))
    return found


def main(arguments: list[str] | None = None) -> int:
    """Print the table; returns the exit status."""
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(arguments)
    console = console_of(100)
    with tempfile.TemporaryDirectory() as folder:
        write_artifact(Path(folder, "artifact"))
        found = samples_ms(Path(folder, "artifact"), options.rounds)
    rows = [
        (name, f"{statistics.median(taken):.0f}", f"{min(taken):.0f} to {max(taken):.0f}")
        for name, taken in found.items()
    ]
    console.print(table_of(f"ResNet-18, ms ({device_info()['cpu']})", ("what", "median", "range"), ("what",), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
