"""Bits by layer, and how they came about, as in Figures 3 and 5 of Schaefer et al."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from lightning_baqe.files import replace_file
from lightning_baqe.quantization.config import BitConfig


def draw_bits(bits: BitConfig, curve: Sequence[Sequence[float]], path: Path) -> None:
    """Bars of the bits of weights (the mean of their channels) and of inputs by layer; below, mean bits and beta, each
    update.

    Args:
        bits: of all layers.
        curve: mean bits of weights and of activations, and both betas, at each update.
        path: of the PNG.
    """
    layers = list(bits)
    figure = Figure(figsize=(max(6.0, 0.35 * len(layers)), 7.0), layout="constrained")
    weights, inputs, learning = figure.subplots(3, 1)
    for axis, name, colour, values in (
        (weights, "weights", "#2166ac", [float(np.mean(bits[layer].weight)) for layer in layers]),
        (inputs, "inputs", "#5aae61", [bits[layer].activation for layer in layers]),
    ):
        axis.bar(range(len(layers)), values, color=colour, width=0.8)
        axis.set_ylim(0, 9)
        axis.set_yticks([2, 4, 6, 8])
        axis.set_ylabel(f"bits of {name}")
    weights.set_xticks([])
    inputs.set_xticks(range(len(layers)), layers, rotation=90, fontsize=7)
    columns = list(zip(*curve, strict=True)) or [(), (), (), ()]
    betas = learning.twinx()
    for axis, places, style, kind in ((learning, (0, 1), "-", "bits"), (betas, (2, 3), ":", "beta")):
        for place, name, colour in zip(places, ("weights", "inputs"), ("#2166ac", "#5aae61"), strict=True):
            axis.plot(columns[place], style, color=colour, label=f"{kind}, {name}")
    betas.set_yscale("log")
    betas.set_ylabel("beta (dotted)")
    learning.set_xlabel("update of the quantizers")
    learning.set_ylabel("mean bits")
    learning.legend(loc="upper right", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    replace_file(path, buffer.getvalue())
