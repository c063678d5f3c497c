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
from lightning_baqe.search.archive import ParetoArchive
from lightning_baqe.search.pareto import hypervolume

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
    front, volume, curve = ParetoArchive(), 0.0, []
    for entry in sorted(summary.complete, key=lambda entry: -1 if entry.number is None else entry.number):
        joined, _ = front.offer(objectives(entry, of))
        if joined:
            volume = hypervolume(torch.tensor(front.points, dtype=torch.float64), summary.reference_point)
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

    def points(self, key: str, scale: float) -> tuple[list[float], list[float]]:
        """One cost of the entries, scaled, and their accuracies in percent."""
        return [getattr(entry, key) * scale for entry in self.entries], [100 * entry.accuracy for entry in self.entries]


def point_groups(summary: Summary) -> list[_Group]:
    """All complete entries by how they are drawn, from back to front; Pareto points come once more, as rings."""
    trials = [entry for entry in summary.complete if entry.name is None]
    baselines = [entry for entry in summary.complete if entry.name is not None]
    reference = Baseline(name="float", **dict(summary.reference or {}))
    groups = [
        *(
            _Group(f"trials: {phase}", [e for e in trials if e.phase == phase], _PHASE_COLOURS.get(phase, _OTHER))
            for phase in dict.fromkeys(entry.phase for entry in trials)
        ),
        _Group("baselines", baselines, _BASELINE, "square", "s", 9),
        _Group("float model", [reference] if is_measured(reference) else [], _FLOAT, "star", "*", 14),
        _Group("Pareto set", summary.pareto, PARETO_COLOUR, size=14, ring=True),
    ]
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


def _hover(entry: Measured, measure: str) -> str:
    bits = html.escape(bits_summary(entry.bits))
    return (
        f"<b>{name_of(entry)}</b>  {bits}<br>{html.escape(measure)} {in_percent(entry.accuracy)}"
        f"<br>latency {in_microseconds(entry.latency_us)}<br>size {in_kilobytes(entry.size_bytes)}"
    )


# --- charts: plain Plotly figures ---------------------------------------------------------------------------------


def _axis(title: str, **more: Any) -> dict[str, Any]:
    return {"title": {"text": title, "standoff": 10}, "zeroline": False, "automargin": True, **more}


def _whole(numbers: Sequence[int]) -> dict[str, Any]:
    """Ticks at whole trial numbers only."""
    return {"tick0": 0, "dtick": 1} if max(numbers) - min(numbers) < 12 else {"tickformat": "d"}


def _figure(traces: list[dict[str, Any]], across: Figure, up: Figure, height: int, **more: Any) -> Figure:
    return {"data": traces, "layout": {"xaxis": across, "yaxis": up, "height": height, **more}}


def trade_off_figure(summary: Summary, key: str, label: str, scale: float) -> Figure | None:
    """Accuracy over one cost, all entries, with the front as steps; None: nothing was measured."""
    groups = point_groups(summary)
    if not groups:
        return None
    traces: list[dict[str, Any]] = []
    steps = front_steps(summary, key)
    if steps:
        xs, ys = [x * scale for x, _ in steps], [100 * y for _, y in steps]
        line = {"shape": "hv", "color": PARETO_COLOUR, "width": 2}
        quiet = {"opacity": 0.6, "hoverinfo": "skip", "showlegend": False}
        traces.append({"type": "scatter", "x": xs, "y": ys, "mode": "lines", "line": line, **quiet})
    for group in groups:
        marker: dict[str, Any] = {"color": group.colour, "symbol": group.symbol, "size": group.size}
        marker["line"] = {"width": 1, "color": "rgba(255,255,255,0.8)"}
        if group.ring:
            marker |= {"symbol": "circle-open", "line": {"width": 2}}
        xs, ys = group.points(key, scale)
        about = {"name": html.escape(group.name), "text": [_hover(entry, summary.measure) for entry in group.entries]}
        look = {"mode": "markers", "marker": marker, "hovertemplate": "%{text}<extra></extra>"}
        traces.append({"type": "scatter", "x": xs, "y": ys, **about, **look})
    ticks = axis_ticks([x for group in groups for x in group.points(key, scale)[0]])
    costs = _axis(label, type="log", tickvals=ticks, ticktext=[f"{tick:,g}" for tick in ticks])
    return _figure(traces, costs, _axis(f"validation {html.escape(summary.measure)}, deployed (%)"), 440)


def progress_figure(summary: Summary) -> Figure | None:
    """The hypervolume over the trials; None: there is none."""
    curve = hypervolume_over_trials(summary)
    if not curve:
        return None
    numbers, volumes = [number for number, _ in curve], [volume for _, volume in curve]
    line = {"shape": "hv", "color": PARETO_COLOUR, "width": 2}
    look = {"mode": "lines+markers", "line": line, "marker": {"size": 5}, "name": "baselines and trials so far"}
    hover = {"hovertemplate": "after trial %{x}: %{y:.4f}<extra></extra>"}
    traces: list[dict[str, Any]] = [{"type": "scatter", "x": numbers, "y": volumes, **look, **hover}]
    level = summary.baselines_hypervolume
    if level is not None:
        ends = [numbers[0], numbers[-1]] if len(numbers) > 1 else [numbers[0] - 0.5, numbers[0] + 0.5]
        look = {"mode": "lines", "line": {"color": _BASELINE, "width": 2, "dash": "dash"}, "name": "baselines alone"}
        hover = {"hovertemplate": "baselines alone: %{y:.4f}<extra></extra>"}
        traces.append({"type": "scatter", "x": ends, "y": [level, level], **look, **hover})
    return _figure(traces, _axis("trial", **_whole(numbers)), _axis("hypervolume"), 360)


def bits_figure(summary: Summary) -> Figure | None:
    """Bits by layer of every Pareto point; None: no point has any."""
    points = sorted((entry for entry in summary.pareto if entry.bits), key=lambda entry: -entry.accuracy)
    layers = list(dict.fromkeys(layer for entry in points for layer in entry.bits))
    if not layers:
        return None
    labels, names = [name_of(entry) for entry in points], [html.escape(layer) for layer in layers]
    columns, rows, steps = list(range(len(points))), list(range(len(layers))), len(_BITS)
    scale = [[edge / steps, colour] for i, colour in enumerate(_BIT_COLOURS) for edge in (i, i + 1)]
    widths = {"tickvals": list(range(steps)), "ticktext": [str(bit) for bit in _BITS]}
    bar = {"title": {"text": "bits"}, "thickness": 14, **widths}
    colours = {"colorscale": scale, "zmin": -0.5, "zmax": steps - 0.5, "colorbar": bar}
    grid: dict[str, Any] = {"type": "heatmap", "x": columns, "y": rows, "yaxis": "y", "xgap": 1, "ygap": 1}
    grid["customdata"] = [[[label, name] for label in labels] for name in names]
    grid["texttemplate"] = "%{text}" if len(points) <= 24 else ""
    traces = []
    for index, (kind, axis) in enumerate((("weight", "x"), ("activation", "x2"))):
        cells = [[(entry.bits.get(layer) or (None, None))[index] for entry in points] for layer in layers]
        shown = {
            "z": [[_BITS.index(bit) if bit in _BITS else None for bit in row] for row in cells],
            "text": [["" if bit is None else str(bit) for bit in row] for row in cells],
        }
        hover = f"%{{customdata[0]}}, %{{customdata[1]}}: {kind} %{{text}} bit<extra></extra>"
        traces.append({**grid, **colours, **shown, "xaxis": axis, "showscale": axis == "x2", "hovertemplate": hover})
    across = {"tickvals": columns, "ticktext": labels, "showgrid": False, "tickangle": -60}
    second = _axis("activations", domain=[0.51, 1], **across)
    up = _axis("", autorange="reversed", showgrid=False, tickvals=rows, ticktext=names)
    height = 150 + 21 * len(layers)
    return _figure(traces, _axis("weights", domain=[0, 0.49], **across), up, height, xaxis2=second)


def time_figure(summary: Summary) -> Figure | None:
    """Seconds of each trial by part; None: no trial took any."""
    trials = [entry for entry in summary.trials if entry.seconds]
    if not trials:
        return None
    numbers, traces = [entry.number for entry in trials], []
    for key, colour in _SECONDS.items():
        reported = [entry.seconds.get(key, 0.0) for entry in trials]
        values = [seconds if math.isfinite(seconds) else 0 for seconds in reported]
        look = {"name": f"{key}: {_duration(sum(values))}", "marker": {"color": colour}}
        hover = f"trial %{{x}}: {key} %{{y:.1f}} s<extra></extra>"
        traces.append({"type": "bar", "x": numbers, "y": values, **look, "hovertemplate": hover})
    bars = {"barmode": "stack", "bargap": 0.15}
    return _figure(traces, _axis("trial", **_whole(numbers)), _axis("seconds"), 360, **bars)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
