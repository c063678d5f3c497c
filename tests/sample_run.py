"""A made-up run for tests: plausible figures, none of them measured."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

LAYERS = [
    "conv1",
    *(f"layer{stage}.{block}.conv{conv}" for stage in (1, 2, 3) for block in (0, 1, 2) for conv in (1, 2)),
    "fc",
]
FLOAT = {"accuracy": 0.9226, "test_accuracy": 0.9204, "latency_us": 3120.0, "size_bytes": 1_081_000}
REFERENCE = (1.0, 1.5, 1.1)


def objectives(entry: dict[str, Any]) -> tuple[float, float, float]:
    """(error, latency over float's, size over float's) of a complete entry."""
    latency, size = entry["latency_us"] / FLOAT["latency_us"], entry["size_bytes"] / FLOAT["size_bytes"]
    return 1 - entry["accuracy"], latency, size


def exact_hypervolume(points: list[tuple[float, ...]], reference: tuple[float, ...] = REFERENCE) -> float:
    """Dominated volume by slicing along the last objective, down to one; for few points only."""
    points = [point for point in points if all(p < r for p, r in zip(point, reference, strict=True))]
    if not points:
        return 0.0
    if len(reference) == 1:
        return reference[0] - min(point[0] for point in points)
    levels = [*sorted({point[-1] for point in points}), reference[-1]]
    return sum(
        (upper - lower) * exact_hypervolume([p[:-1] for p in points if p[-1] <= lower], reference[:-1])
        for lower, upper in itertools.pairwise(levels)
    )


def _entry(rng: random.Random, bits: dict[str, list[int]]) -> dict[str, Any]:
    weight = sum(pair[0] for pair in bits.values()) / len(bits)
    activation = sum(pair[1] for pair in bits.values()) / len(bits)
    drop = 0.25 * 2.0 ** (1.2 - weight) + 0.2 * 2.0 ** (1.2 - activation)
    accuracy = round(max(0.1, FLOAT["accuracy"] - drop + rng.gauss(0, 0.004)), 4)
    latency_us = round(FLOAT["latency_us"] * (0.08 + 0.012 * weight + 0.012 * activation) * rng.uniform(0.9, 1.25), 1)
    return {
        "state": "complete",
        "bits": bits,
        "schedules": {layer: {"tile": rng.choice([4, 8, 16]), "unroll": rng.choice([1, 2, 4])} for layer in bits},
        "accuracy": accuracy,
        "fake_quant_accuracy": round(accuracy + rng.gauss(0, 0.001), 4),
        "test_accuracy": None,
        "latency_us": latency_us,
        "size_bytes": int(FLOAT["size_bytes"] * weight / 32 * 1.02),
        "pareto": False,
        "seconds": {
            "train": rng.uniform(35, 50),
            "build": rng.uniform(6, 14),
            "measure": rng.uniform(3, 6),
            "propose": rng.uniform(0.3, 4),
        },
        "error": None,
    }


def make_summary(
    trials: int = 40, baselines: bool = True, failed: tuple[int, ...] = (7, 23), seed: int = 0
) -> dict[str, Any]:
    """A summary of `trials` trials, of which `failed` went wrong and the last one, if over 3, still runs."""
    rng = random.Random(seed)
    summary: dict[str, Any] = {
        "recipe": "qat_search",
        "model": "resnet20",
        "dataset": "cifar10",
        "device": {
            "cpu": "Sample CPU @ 2.10GHz",
            "flags": ["sse4_2", "fma", "avx2", "avx512f", "avx512_vnni"],
            "cores": 2,
            "threads": 1,
        },
        "versions": {"lightning_baqe": "0.1.0", "torch": "2.11.0", "apache-tvm": "0.27.0"},
        "float": dict(FLOAT),
        "baselines": [],
        "objectives": ["error", "latency", "size"],
        "reference_point": list(REFERENCE),
        "trials": [],
    }
    if baselines:
        for name, weight, activation in (("w8a8", 8, 8), ("w4a8", 4, 8), ("w4a4", 4, 4)):
            bits = {layer: [weight, activation] for layer in LAYERS}
            summary["baselines"].append({"name": name, "number": None, "phase": "baseline", **_entry(rng, bits)})
    for number in range(trials):
        phase = "ted" if number < 10 else "bo"
        low, high = (2, 8) if phase == "ted" else rng.choice([(2, 5), (3, 6), (4, 8), (5, 8)])
        bits = {layer: [rng.randint(low, high), rng.randint(max(low, 3), high)] for layer in LAYERS}
        entry = {"number": number, "phase": phase, **_entry(rng, bits)}
        if number in failed:
            nothing = dict.fromkeys(("accuracy", "fake_quant_accuracy", "test_accuracy", "latency_us", "size_bytes"))
            reason = "BuildError: layer2.0.conv1: tile 16 needs 21 KiB of scratch memory, the target has 16 KiB"
            entry |= {"state": "failed", "error": reason, **nothing}
            entry["seconds"] |= {"measure": 0.0}
        elif number == trials - 1 and trials > 3:
            nothing = dict.fromkeys(("accuracy", "fake_quant_accuracy", "test_accuracy", "latency_us", "size_bytes"))
            entry |= {"state": "running", "seconds": {"train": 12.0}, **nothing}
        summary["trials"].append(entry)
    complete = [entry for entry in summary["baselines"] + summary["trials"] if entry["state"] == "complete"]
    for entry in complete:
        mine = objectives(entry)
        rivals = [objectives(rival) for rival in complete if rival is not entry]
        entry["pareto"] = not any(
            all(r <= m for r, m in zip(rival, mine, strict=True)) and rival != mine for rival in rivals
        )
        if entry["pareto"]:
            entry["test_accuracy"] = round(entry["accuracy"] - 0.002, 4)
    summary["hypervolume"] = exact_hypervolume([objectives(entry) for entry in complete])
    summary["baselines_hypervolume"] = exact_hypervolume([objectives(entry) for entry in summary["baselines"]])
    return summary


def write_run(folder: Path, summary: dict[str, Any]) -> Path:
    """Lay `summary` down as a run folder, with an empty artifact folder for each Pareto point."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(summary))
    for entry in summary["baselines"] + summary["trials"]:
        if entry["pareto"]:
            name = f"baseline_{entry['name']}" if "name" in entry else f"trial_{entry['number']}"
            (folder / "artifacts" / name).mkdir(parents=True)
    return folder
