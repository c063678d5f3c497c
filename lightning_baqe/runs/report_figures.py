"""What a report draws: figures in Plotly's own terms, made from a run's summary."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lightning_baqe.runs.front import bits_summary
from lightning_baqe.runs.objectives import objectives
from lightning_baqe.runs.summary import Baseline, Entry, Measured, Summary, is_measured
from lightning_baqe.search import hypervolume

Figure = dict[str, Any]

_PHASE_COLOURS = {"ted": "#e08a1e", "bo": "#3b82c4", "random": "#8d6cc4"}
_OTHER, PARETO_COLOUR, _BASELINE, _FLOAT = "#7a9a4e", "#d6336c", "#12957f", "#8a8f98"
_BITS = (2, 3, 4, 5, 6, 7, 8, 32)
_BIT_COLOURS = ("#b2182b", "#e0653f", "#f6a565", "#f3dfa2", "#a9d8c8", "#5aa9c9", "#2b6cb0", "#8a8f98")
_SECONDS = {"train": "#3b82c4", "build": "#e08a1e", "measure": "#12957f", "propose": "#8d6cc4"}


def hypervolume_over_trials(summary: Summary) -> list[tuple[int, float]]:
    """(trial number, hypervolume of the baselines and all complete trials up to it), in the order of the numbers.

    Objectives as in the summary: error, latency and size over the float model's. Empty without a float model.
    """
    of = summary.reference
    if of is None or not (of.latency_us and of.size_bytes):
        return []
    front: list[tuple[float, ...]] = []
    volume, curve = 0.0, []
    for entry in sorted(summary.complete, key=lambda entry: -1 if entry.number is None else entry.number):
        point = objectives(entry, of)
        if not any(all(a <= b for a, b in zip(other, point, strict=True)) for other in front):
            front = [other for other in front if any(b > a for a, b in zip(other, point, strict=True))] + [point]
            volume = float(hypervolume(torch.tensor(front, dtype=torch.float64), summary.reference_point))
        if entry.number is not None:
            curve.append((entry.number, volume))
    return curve


# --- what is in the summary ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """Points that are drawn alike; `symbol` is Plotly's name of the marker, `mark` matplotlib's."""

    name: str
    entries: list[Measured]
    colour: str
    symbol: str = "circle"
    mark: str = "o"
    size: float = 8
    ring: bool = False


def point_groups(summary: Summary) -> list[_Group]:
    """All complete entries by how they are drawn, from back to front; Pareto points come once more, as rings."""
    trials = [entry for entry in summary.complete if entry.name is None]
    baselines = [entry for entry in summary.complete if entry.name is not None]
    groups = []
    for phase in dict.fromkeys(entry.phase for entry in trials):
        entries = [entry for entry in trials if entry.phase == phase]
        groups.append(_Group(f"trials: {phase}", entries, _PHASE_COLOURS.get(phase, _OTHER)))
    groups.append(_Group("baselines", baselines, _BASELINE, "square", "s", 9))
    reference = Baseline(name="float", **dict(summary.reference or {}))
    if is_measured(reference):
        groups.append(_Group("float model", [reference], _FLOAT, "star", "*", 14))
    groups.append(_Group("Pareto set", summary.pareto, PARETO_COLOUR, size=14, ring=True))
    return [group for group in groups if group.entries]


def axis_ticks(values: Sequence[float]) -> list[float]:
    """Round numbers for a logarithmic axis over `values`, few enough to be read."""
    low, high = min(values) * 0.8, max(values) * 1.25
    decades = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    fine = (1, 1.5, 2, 3, 4, 5, 7) if high / low < 12 else (1, 2, 5) if high / low < 120 else (1,)
    return [step * decade for decade in decades for step in fine if low <= step * decade <= high]


def front_steps(summary: Summary, key: str) -> list[tuple[float, float]]:
    """(cost, accuracy) of the Pareto points that no other beats in this one cost, by rising cost."""
    steps: list[tuple[float, float]] = []
    for entry in sorted(summary.pareto, key=lambda entry: (getattr(entry, key), -entry.accuracy)):
        if not steps or entry.accuracy > steps[-1][1]:
            steps.append((getattr(entry, key), entry.accuracy))
    return steps


# --- text ---------------------------------------------------------------------------------------------------------


def in_percent(value: float | None) -> str:
    """A share; a dash for none."""
    return "–" if value is None else f"{value:.2%}"


def in_kilobytes(value: float | None) -> str:
    """Bytes; a dash for none."""
    return "–" if value is None else f"{value / 1000:,.1f} kB"


def in_microseconds(value: float | None) -> str:
    """A latency; a dash for none."""
    return "–" if value is None else f"{value:,.0f} µs" if value >= 1000 else f"{value:.1f} µs"


def speedup(reference: float | None, value: float | None) -> str:
    """How many times smaller a value is than its reference; a dash where one is missing."""
    return f"{reference / value:.2f}×" if reference and value else "–"


def name_of(entry: Entry) -> str:
    """What tables and charts call an entry, as HTML."""
    return f"#{entry.number}" if entry.name is None else html.escape(entry.name)


def _hover(entry: Measured) -> str:
    bits = html.escape(bits_summary(entry.bits))
    return (
        f"<b>{name_of(entry)}</b>  {bits}<br>accuracy {in_percent(entry.accuracy)}"
        f"<br>latency {in_microseconds(entry.latency_us)}<br>size {in_kilobytes(entry.size_bytes)}"
    )


# --- charts: plain Plotly figures ---------------------------------------------------------------------------------


def _axis(title: str, **more: Any) -> dict[str, Any]:
    return {"title": {"text": title, "standoff": 10}, "zeroline": False, "automargin": True, **more}


def _whole(numbers: Sequence[int]) -> dict[str, Any]:
    """Ticks at whole trial numbers only."""
    return {"tick0": 0, "dtick": 1} if max(numbers) - min(numbers) < 12 else {"tickformat": "d"}


def trade_off_figure(summary: Summary, key: str, label: str, scale: float) -> Figure | None:
    """Accuracy over one cost, all entries, with the front as steps; None: nothing was measured."""
    traces: list[dict[str, Any]] = []
    steps = front_steps(summary, key)
    if steps:
        line = {"shape": "hv", "color": PARETO_COLOUR, "width": 2}
        xs, ys = [x * scale for x, _ in steps], [100 * y for _, y in steps]
        traces.append(
            {"x": xs, "y": ys, "mode": "lines", "line": line, "opacity": 0.6, "hoverinfo": "skip", "showlegend": False}
        )
    groups = point_groups(summary)
    for group in groups:
        marker: dict[str, Any] = {"color": group.colour, "symbol": group.symbol, "size": group.size}
        marker["line"] = {"width": 1, "color": "rgba(255,255,255,0.8)"}
        if group.ring:
            marker |= {"symbol": "circle-open", "line": {"width": 2}}
        traces.append(
            {
                "x": [getattr(entry, key) * scale for entry in group.entries],
                "y": [100 * entry.accuracy for entry in group.entries],
                "text": [_hover(entry) for entry in group.entries],
                "mode": "markers",
                "marker": marker,
                "name": html.escape(group.name),
                "hovertemplate": "%{text}<extra></extra>",
            }
        )
    if not groups:
        return None
    ticks = axis_ticks([getattr(entry, key) * scale for group in groups for entry in group.entries])
    costs = _axis(label, type="log", tickvals=ticks, ticktext=[f"{tick:,g}" for tick in ticks])
    axes = {"xaxis": costs, "yaxis": _axis("validation accuracy, deployed (%)")}
    return {"data": [{"type": "scatter", **trace} for trace in traces], "layout": {**axes, "height": 440}}


def progress_figure(summary: Summary) -> Figure | None:
    """The hypervolume over the trials; None: there is none."""
    curve = hypervolume_over_trials(summary)
    if not curve:
        return None
    numbers, volumes = [number for number, _ in curve], [volume for _, volume in curve]
    hover = "after trial %{x}: %{y:.4f}<extra></extra>"
    line = {"shape": "hv", "color": PARETO_COLOUR, "width": 2}
    traces = [{"x": numbers, "y": volumes, "mode": "lines+markers", "line": line, "marker": {"size": 5}}]
    traces[0] |= {"name": "baselines and trials so far", "hovertemplate": hover}
    level = summary.baselines_hypervolume
    if level is not None:
        ends = [numbers[0], numbers[-1]] if len(numbers) > 1 else [numbers[0] - 0.5, numbers[0] + 0.5]
        dashed = {"color": _BASELINE, "width": 2, "dash": "dash"}
        traces.append({"x": ends, "y": [level, level], "mode": "lines", "line": dashed, "name": "baselines alone"})
        traces[1] |= {"hovertemplate": "baselines alone: %{y:.4f}<extra></extra>"}
    axes = {"xaxis": _axis("trial", **_whole(numbers)), "yaxis": _axis("hypervolume")}
    return {"data": [{"type": "scatter", **trace} for trace in traces], "layout": {**axes, "height": 360}}


def bits_figure(summary: Summary) -> Figure | None:
    """Bits by layer of every Pareto point; None: no point has any."""
    points = sorted(
        ((name_of(entry), entry) for entry in summary.pareto if entry.bits), key=lambda point: -point[1].accuracy
    )
    layers = list(dict.fromkeys(layer for _, entry in points for layer in entry.bits))
    if not layers:
        return None
    steps = len(_BITS)
    scale = [[edge / steps, colour] for i, colour in enumerate(_BIT_COLOURS) for edge in (i, i + 1)]
    shown = "%{text}" if len(points) <= 24 else ""
    traces = []
    for index, kind in enumerate(("weight", "activation")):
        cells = [[(entry.bits.get(layer) or (None, None))[index] for _, entry in points] for layer in layers]
        traces.append(
            {
                "type": "heatmap",
                "x": list(range(len(points))),
                "y": list(range(len(layers))),
                "z": [[_BITS.index(bit) if bit in _BITS else None for bit in row] for row in cells],
                "text": [["" if bit is None else str(bit) for bit in row] for row in cells],
                "customdata": [[[label, html.escape(layer)] for label, _ in points] for layer in layers],
                "texttemplate": shown,
                "hovertemplate": f"%{{customdata[0]}}, %{{customdata[1]}}: {kind} %{{text}} bit<extra></extra>",
                "colorscale": scale,
                "zmin": -0.5,
                "zmax": steps - 0.5,
                "xgap": 1,
                "ygap": 1,
                "showscale": index == 1,
                "colorbar": {
                    "title": {"text": "bits"},
                    "tickvals": list(range(steps)),
                    "ticktext": [str(bit) for bit in _BITS],
                    "thickness": 14,
                },
                "xaxis": "x" if index == 0 else "x2",
                "yaxis": "y",
            }
        )
    ticks = {"tickvals": list(range(len(points))), "ticktext": [label for label, _ in points], "showgrid": False}
    names = {"tickvals": list(range(len(layers))), "ticktext": [html.escape(layer) for layer in layers]}
    layout = {
        "xaxis": _axis("weights", domain=[0, 0.49], tickangle=-60, **ticks),
        "xaxis2": _axis("activations", domain=[0.51, 1], tickangle=-60, **ticks),
        "yaxis": _axis("", autorange="reversed", showgrid=False, **names),
        "height": 150 + 21 * len(layers),
    }
    return {"data": traces, "layout": layout}


def time_figure(summary: Summary) -> Figure | None:
    """Seconds of each trial by part; None: no trial took any."""
    trials = [entry for entry in summary.trials if entry.seconds]
    if not trials:
        return None
    traces = []
    numbers = [entry.number for entry in trials]
    for key, colour in _SECONDS.items():
        reported = [entry.seconds.get(key, 0.0) for entry in trials]
        values = [seconds if math.isfinite(seconds) else 0 for seconds in reported]
        name = f"{key}: {_duration(sum(values))}"
        hover = f"trial %{{x}}: {key} %{{y:.1f}} s<extra></extra>"
        trace = {"type": "bar", "x": numbers, "y": values, "name": name}
        traces.append({**trace, "hovertemplate": hover, "marker": {"color": colour}})
    axes = {"xaxis": _axis("trial", **_whole(numbers)), "yaxis": _axis("seconds")}
    return {"data": traces, "layout": {**axes, "barmode": "stack", "bargap": 0.15, "height": 360}}


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
