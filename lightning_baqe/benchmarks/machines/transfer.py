"""Ten measurements of a machine, and what other machines take: how well do they rank all networks?

    python -m lightning_baqe.benchmarks.machines.transfer --latencies latency.json.gz

On NAS-Bench-201: 15,625 networks of six places with one of five operators each, measured on 27 machines by HELP (Lee et
al., "HELP: Hardware-Adaptive Efficient Latency Prediction for NAS via Meta-Learning", NeurIPS 2021). As there, nine
machines are known by 900 networks, and six others by ten; HELP reaches a mean rank correlation of 0.93. The file is
packed JSON, ``{"architectures": [text, ...], "latency_ms": {machine: [ms, ...]}}``, the texts being NAS-Bench-201's.

The ten are drawn at random, several times, or chosen by :meth:`~lightning_baqe.costs.part_costs.PartCosts.most_telling`
before anything is measured. "others' mean" is what the known machines say without any measurement.
"""

from __future__ import annotations

import re
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from lightning_baqe.benchmarks.setups import check_positive, console_of, parser_of, table_of
from lightning_baqe.costs.part_costs import PartCosts
from lightning_baqe.errors import DataError
from lightning_baqe.files import MIB, parse_json, read_file, unpack_gzip

KNOWN = (
    *("1080ti_1", "1080ti_32", "1080ti_256", "silver_4114", "silver_4210r"),
    *("samsung_a50", "pixel3", "essential_ph_1", "samsung_s7"),
)
UNSEEN = ("titan_rtx_256", "gold_6226", "fpga", "pixel2", "raspi4", "eyeriss")
OPERATORS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
PLACES, WANTED = 6, 0.93


def read_latencies(path: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Parts of all networks, ``(networks, parts)``, and the machines' latencies, ``(networks,)`` each.

    Raises:
        DataError: it is no such file; says where.
    """
    found: Any = parse_json(unpack_gzip(read_file(path, 64 * MIB), 256 * MIB, str(path)), str(path))
    if not isinstance(found, dict) or not {"architectures", "latency_ms"} <= set(found):
        raise DataError(f"{path} has no 'architectures' and 'latency_ms': give HELP's latencies as JSON")
    counts = np.array([parts_of(text) for text in found["architectures"]])
    latencies = {name: np.array(values, dtype=np.float64) for name, values in found["latency_ms"].items()}
    missing = [name for name in (*KNOWN, *UNSEEN) if name not in latencies]
    if missing:
        raise DataError(f"{path} has no latencies of {missing[0]!r}")
    return counts, latencies


def parts_of(architecture: str) -> list[float]:
    """Which operator stands at which place, and 1 for what all networks have; ``"|none~0|+|none~0|none~1|+..."``."""
    operators = re.findall(r"(\w+)~\d", architecture)
    if len(operators) != PLACES or not set(operators) <= set(OPERATORS):
        raise DataError(f"{architecture!r} is no network of NAS-Bench-201")
    return [1.0, *(float(of == operator) for of in operators for operator in OPERATORS)]


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 if the mean rank correlation is below :data:`WANTED`."""
    parser = parser_of(__doc__)
    parser.add_argument("--latencies", type=Path, required=True, help="the file")
    parser.add_argument("--known", type=int, default=900, help="networks that known machines were measured on")
    parser.add_argument("--samples", type=int, default=10, help="measurements of an unseen machine")
    parser.add_argument("--draws", type=int, default=20, help="of random samples")
    options = parser.parse_args(arguments)
    check_positive(parser, options, "known", "samples", "draws")
    counts, latencies = read_latencies(options.latencies)
    subset = np.random.default_rng(0).permutation(len(counts))[: options.known]
    prior = PartCosts.of_machines(counts[subset], {name: latencies[name][subset] for name in KNOWN})
    chosen = prior.most_telling(counts, options.samples)
    draws = [np.random.default_rng(draw).permutation(len(counts))[: options.samples] for draw in range(options.draws)]
    cells, figures = [], []
    for name in UNSEEN:
        drawn = [_ranked(prior, counts, latencies[name], measured) for measured in draws]
        others = float(spearmanr(prior.predict(counts)[0], latencies[name]).statistic)
        best = _ranked(prior, counts, latencies[name], np.array(chosen))
        figures.append((statistics.fmean(drawn), min(drawn), best, others))
        cells.append([name, *(f"{figure:.3f}" for figure in figures[-1])])
    means = [statistics.fmean(of) for of in zip(*figures, strict=True)]
    cells.append(["mean", *(f"{mean:.3f}" for mean in means)])
    headings = ("machine", "drawn", "least of them", "chosen", "others' mean")
    title = f"Spearman's rank correlation over the other networks, {options.samples} measured, {options.draws} draws"
    console_of(120).print(table_of(title, headings, headings[:1], cells))
    return int(means[0] < WANTED)


def _ranked(prior: PartCosts, counts: np.ndarray, latency: np.ndarray, measured: np.ndarray) -> float:
    rest = np.setdiff1d(np.arange(len(counts)), measured)
    predicted, _ = prior.given(counts[measured], latency[measured]).predict(counts[rest])
    return float(spearmanr(predicted, latency[rest]).statistic)


if __name__ == "__main__":
    sys.exit(main())
