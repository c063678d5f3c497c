"""Bits, sensitivities and speed-ups by layer, as in Figure 5 of HAWQ-V3."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from lightning_baqe.costs.layer_costs import LATENCY, LayerCosts
from lightning_baqe.files import replace_file
from lightning_baqe.quantization.config import FLOAT_BITS
from lightning_baqe.runs.budgets import Row

_COLOURS = {
    2: "#762a83",
    3: "#5aae61",
    4: "#74c7d4",
    5: "#8c96c6",
    6: "#fdae61",
    7: "#8da0cb",
    8: "#2166ac",
    32: "#b2182b",
}


def draw_layers(
    rows: Sequence[Row], sensitivity: Mapping[str, Mapping[int, float]], costs: LayerCosts, path: Path
) -> None:
    """A row of bars for each budget: bits of each layer; over them, between the narrowest and the widest integer width,
    each layer's share of all time that is won (black) and of all sensitivity (orange).

    Args:
        rows: of the budgets, at least one.
        sensitivity: by layer and bits.
        costs: with latencies.
        path: of the PNG.
    """
    layers = [layer for layer, of in sensitivity.items() if len([b for b in of if b != FLOAT_BITS]) > 1]
    integer = {layer: [b for b in sensitivity[layer] if b != FLOAT_BITS] for layer in layers}
    gained = [_change(costs.tables[LATENCY][layer], integer[layer]) for layer in layers]
    felt = [-_change(sensitivity[layer], integer[layer]) for layer in layers]
    figure = Figure(figsize=(max(6.0, 0.35 * len(layers)), 1.6 * len(rows) + 1.4), layout="constrained")
    axes = figure.subplots(len(rows), 1, sharex=True, squeeze=False)[:, 0]
    places = range(len(layers))
    for axis, row in zip(axes, rows, strict=True):
        bits = [row.allocation[layer] for layer in layers]
        axis.bar(places, [min(b, 10) for b in bits], color=[_COLOURS[b] for b in bits], width=0.8)
        axis.set_ylim(0, 11)
        axis.set_yticks([4, 8])
        axis.set_ylabel(row.budget.name, rotation=0, ha="right", va="center")
        shares = axis.twinx()
        shares.plot(places, _shares(gained), color="black", marker="o", markersize=3, linewidth=1, label="time won")
        shares.plot(places, _shares(felt), color="#e08214", marker="s", markersize=3, linewidth=1, label="sensitivity")
        shares.set_ylabel("%")
    axes[0].set_title("bits by layer; what fewer would win and hurt", fontsize=10)
    figure.axes[len(rows)].legend(loc="upper right", fontsize=8)
    axes[-1].set_xticks(list(places), layers, rotation=90, fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    replace_file(path, buffer.getvalue())


def _change(of: Mapping[int, float], widths: Sequence[int]) -> float:
    """From the widest to the narrowest, positive where the narrowest has less."""
    return of[max(widths)] - of[min(widths)]


def _shares(values: Sequence[float]) -> list[float]:
    total = sum(abs(value) for value in values) or 1.0
    return [100 * value / total for value in values]
