"""The report of a run: one HTML file that works offline, and the picture for a README.

    python -m lightning_baqe.report <run_dir> [--picture out.png]

Both are made from `summary.json` alone, so a report can be written again at any time, also while the run goes on.
"""

from __future__ import annotations

import argparse
import html
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from plotly.offline import get_plotlyjs

from lightning_baqe.deploy.front import bits_summary, is_measured, pareto_entries, read_summary, replace_file
from lightning_baqe.errors import BaqeError
from lightning_baqe.search import hypervolume

Summary = Mapping[str, Any]
Entry = Mapping[str, Any]
Figure = dict[str, Any]

_PHASE_COLOURS = {"ted": "#e08a1e", "bo": "#3b82c4", "random": "#8d6cc4"}
_OTHER, _PARETO, _BASELINE, _FLOAT = "#7a9a4e", "#d6336c", "#12957f", "#8a8f98"
_BITS = (2, 3, 4, 5, 6, 7, 8, 32)
_BIT_COLOURS = ("#b2182b", "#e0653f", "#f6a565", "#f3dfa2", "#a9d8c8", "#5aa9c9", "#2b6cb0", "#8a8f98")
_SECONDS = {"train": "#3b82c4", "build": "#e08a1e", "measure": "#12957f", "propose": "#8d6cc4"}
_FLAGS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx_vnni",
    "amx_int8",
    "asimd",
    "asimddp",
    "i8mm",
    "sve",
)
_RUNNING = "The run has no complete trial yet."


def hypervolume_over_trials(summary: Summary) -> list[tuple[int, float]]:
    """(trial number, hypervolume of the baselines and all complete trials up to it), in the order of the numbers.

    Objectives as in the summary: error, latency and size over the float model's. Empty without a float model.
    """
    reference = torch.tensor(summary.get("reference_point") or [1.0, 1.5, 1.1], dtype=torch.float64)
    front: list[tuple[float, ...]] = []
    volume, curve = 0.0, []
    trials = sorted(_complete(summary.get("trials")), key=lambda entry: entry["number"])
    for entry in [*_complete(summary.get("baselines")), *trials]:
        point = _objectives(entry, summary.get("float") or {})
        if point is None:
            return []
        if not any(all(a <= b for a, b in zip(other, point, strict=True)) for other in front):
            front = [other for other in front if any(b > a for a, b in zip(other, point, strict=True))] + [point]
            volume = float(hypervolume(torch.tensor(front, dtype=torch.float64), reference))
        if "name" not in entry:
            curve.append((int(entry["number"]), volume))
    return curve


def write_report(summary: Summary, path: Path) -> None:
    """Write the report as one self-contained HTML file (plotly.js inside); the file is replaced in one step.

    Args:
        summary: the content of `summary.json`, that of a run which goes on included.
        path: the file to write, usually `<run_dir>/report.html`.
    """
    figures = {
        "accuracy-latency": _trade_off(summary, "latency_us", "latency (µs)", 1.0),
        "accuracy-size": _trade_off(summary, "size_bytes", "size (kB)", 1e-3),
        "hypervolume": _progress(summary),
        "bits": _bits_per_layer(summary),
        "seconds": _time_spent(summary),
    }
    title = f"{_text(summary, 'model')} on {_text(summary, 'dataset')}"
    body = [
        _header(summary, title),
        _cards(summary),
        '<div class="pair">',
        _chart("Accuracy over latency", figures["accuracy-latency"], "accuracy-latency", _RUNNING),
        _chart("Accuracy over size", figures["accuracy-size"], "accuracy-size", _RUNNING),
        "</div>",
        _section("Pareto set", _pareto_table(summary)),
        _chart("Bits per layer of the Pareto points", figures["bits"], "bits", "There is no Pareto point yet."),
        '<div class="pair">',
        _chart("Hypervolume over trials", figures["hypervolume"], "hypervolume", _RUNNING),
        _chart("Where the time went", figures["seconds"], "seconds", "No trial has reported its times yet."),
        "</div>",
        _failures(summary),
    ]
    data = {name: figure for name, figure in figures.items() if figure}
    # Inside a script element only "<" can end it early; in JSON it may be written as an escape.
    payload = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">{_POLICY}'
        f"<title>{title} · lightning_baqe</title><style>{_STYLE}</style></head><body><main>"
        + "\n".join(body)
        + f'</main><script type="application/json" id="figures">{payload}</script>'
        f"<script>{get_plotlyjs()}</script><script>{_SCRIPT}</script></body></html>\n"
    )
    replace_file(Path(path), page.encode("utf-8"))


def write_picture(summary: Summary, path: Path) -> None:
    """Draw accuracy over latency and over size side by side as PNG; the file is replaced in one step."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(11, 4.6), dpi=160, layout="constrained")
    kinds = ((1e-3, "latency_us", "latency of one image (ms)"), (1e-3, "size_bytes", "size (kB)"))
    for axis, (scale, key, label) in zip(canvas.subplots(1, 2, sharey=True), kinds, strict=True):
        groups = _groups(summary)
        for group in groups:
            xs, ys = (
                [entry[key] * scale for entry in group.entries],
                [100 * entry["accuracy"] for entry in group.entries],
            )
            look: dict[str, Any] = {"label": group.name, "marker": group.mark, "s": 0.55 * group.size**2, "zorder": 3}
            if group.ring:
                axis.scatter(xs, ys, facecolors="none", edgecolors=group.colour, linewidths=1.4, **look)
            else:
                axis.scatter(xs, ys, color=group.colour, edgecolors="white", linewidths=0.6, **look)
        if groups:
            ticks = _ticks([entry[key] * scale for group in groups for entry in group.entries])
            axis.set_xscale("log")
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.set_xticks([], minor=True)
        steps = [(x * scale, 100 * y) for x, y in _staircase(summary, key)]
        if steps:
            axis.step(*zip(*steps, strict=True), where="post", color=_PARETO, linewidth=1.4, alpha=0.7, zorder=2)
        axis.set_xlabel(label)
        axis.grid(color="#e6e8eb", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color("#9aa0a8")
        axis.tick_params(color="#9aa0a8")
    first = canvas.axes[0]
    first.set_ylabel("validation accuracy, deployed (%)")
    handles, labels = first.get_legend_handles_labels()
    if labels:
        canvas.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    cpu = (summary.get("device") or {}).get("cpu") or "unknown CPU"
    title = f"{summary.get('model')} on {summary.get('dataset')}, {cpu}"
    canvas.suptitle(title.replace("$", r"\$"), fontsize=12, fontweight="bold")
    content = io.BytesIO()
    canvas.savefig(content, format="png")
    replace_file(Path(path), content.getvalue())


# --- what is in the summary ---------------------------------------------------------------------------------------


def _complete(entries: Sequence[Entry] | None) -> list[Entry]:
    return [entry for entry in entries or [] if is_measured(entry)]


def _objectives(entry: Entry, reference: Entry) -> tuple[float, ...] | None:
    if not (reference.get("latency_us") and reference.get("size_bytes")):
        return None
    latency, size = entry["latency_us"] / reference["latency_us"], entry["size_bytes"] / reference["size_bytes"]
    return 1 - entry["accuracy"], latency, size


@dataclass(frozen=True)
class _Group:
    """Points that are drawn alike; `symbol` is Plotly's name of the marker, `mark` matplotlib's."""

    name: str
    entries: list[Entry]
    colour: str
    symbol: str = "circle"
    mark: str = "o"
    size: float = 8
    ring: bool = False


def _groups(summary: Summary) -> list[_Group]:
    """All complete entries by how they are drawn, from back to front; Pareto points come once more, as rings."""
    trials, baselines = _complete(summary.get("trials")), _complete(summary.get("baselines"))
    groups = []
    for phase in dict.fromkeys(str(entry.get("phase")) for entry in trials):
        entries = [entry for entry in trials if str(entry.get("phase")) == phase]
        groups.append(_Group(f"trials: {phase}", entries, _PHASE_COLOURS.get(phase, _OTHER)))
    groups.append(_Group("baselines", baselines, _BASELINE, "square", "s", 9))
    reference = summary.get("float") or {}
    if is_measured(reference):
        groups.append(_Group("float model", [{**reference, "name": "float"}], _FLOAT, "star", "*", 14))
    pareto = [entry for _, entry in pareto_entries(summary)]
    groups.append(_Group("Pareto set", pareto, _PARETO, size=14, ring=True))
    return [group for group in groups if group.entries]


def _ticks(values: Sequence[float]) -> list[float]:
    """Round numbers for a logarithmic axis over `values`, few enough to be read."""
    low, high = min(values) * 0.8, max(values) * 1.25
    decades = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    fine = (1, 1.5, 2, 3, 4, 5, 7) if high / low < 12 else (1, 2, 5) if high / low < 120 else (1,)
    return [step * decade for decade in decades for step in fine if low <= step * decade <= high]


def _staircase(summary: Summary, key: str) -> list[tuple[float, float]]:
    """(cost, accuracy) of the Pareto points that no other beats in this one cost, by rising cost."""
    entries = [entry for _, entry in pareto_entries(summary) if entry.get(key) is not None]
    steps: list[tuple[float, float]] = []
    for entry in sorted(entries, key=lambda entry: (entry[key], -entry["accuracy"])):
        if not steps or entry["accuracy"] > steps[-1][1]:
            steps.append((entry[key], entry["accuracy"]))
    return steps


# --- text ---------------------------------------------------------------------------------------------------------


def _text(entry: Entry, key: str) -> str:
    value = entry.get(key)
    return "–" if value is None else html.escape(str(value))


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2%}"


def _kilobytes(value: float | None) -> str:
    return "–" if value is None else f"{value / 1000:,.1f} kB"


def _microseconds(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f} µs" if value >= 1000 else f"{value:.1f} µs"


def _ratio(reference: float | None, value: float | None) -> str:
    return f"{reference / value:.2f}×" if reference and value else "–"


def _label(entry: Entry) -> str:
    return html.escape(str(entry["name"])) if "name" in entry else f"#{html.escape(str(entry.get('number')))}"


def _hover(entry: Entry) -> str:
    bits = html.escape(bits_summary(entry.get("bits") or {}))
    return (
        f"<b>{_label(entry)}</b>  {bits}<br>accuracy {_percent(entry['accuracy'])}"
        f"<br>latency {_microseconds(entry['latency_us'])}<br>size {_kilobytes(entry['size_bytes'])}"
    )


# --- charts: plain Plotly figures ---------------------------------------------------------------------------------


def _axis(title: str, **more: Any) -> dict[str, Any]:
    return {"title": {"text": title, "standoff": 10}, "zeroline": False, "automargin": True, **more}


def _whole(numbers: Sequence[int]) -> dict[str, Any]:
    """Ticks at whole trial numbers only."""
    return {"tick0": 0, "dtick": 1} if max(numbers) - min(numbers) < 12 else {"tickformat": "d"}


def _trade_off(summary: Summary, key: str, label: str, scale: float) -> Figure | None:
    traces: list[dict[str, Any]] = []
    steps = _staircase(summary, key)
    if steps:
        line = {"shape": "hv", "color": _PARETO, "width": 2}
        xs, ys = [x * scale for x, _ in steps], [100 * y for _, y in steps]
        traces.append(
            {"x": xs, "y": ys, "mode": "lines", "line": line, "opacity": 0.6, "hoverinfo": "skip", "showlegend": False}
        )
    groups = _groups(summary)
    for group in groups:
        marker: dict[str, Any] = {"color": group.colour, "symbol": group.symbol, "size": group.size}
        marker["line"] = {"width": 1, "color": "rgba(255,255,255,0.8)"}
        if group.ring:
            marker |= {"symbol": "circle-open", "line": {"width": 2}}
        traces.append(
            {
                "x": [entry[key] * scale for entry in group.entries],
                "y": [100 * entry["accuracy"] for entry in group.entries],
                "text": [_hover(entry) for entry in group.entries],
                "mode": "markers",
                "marker": marker,
                "name": html.escape(group.name),
                "hovertemplate": "%{text}<extra></extra>",
            }
        )
    if not groups:
        return None
    ticks = _ticks([entry[key] * scale for group in groups for entry in group.entries])
    costs = _axis(label, type="log", tickvals=ticks, ticktext=[f"{tick:,g}" for tick in ticks])
    axes = {"xaxis": costs, "yaxis": _axis("validation accuracy, deployed (%)")}
    return {"data": [{"type": "scatter", **trace} for trace in traces], "layout": {**axes, "height": 440}}


def _progress(summary: Summary) -> Figure | None:
    curve = hypervolume_over_trials(summary)
    if not curve:
        return None
    numbers, volumes = [number for number, _ in curve], [volume for _, volume in curve]
    hover = "after trial %{x}: %{y:.4f}<extra></extra>"
    line = {"shape": "hv", "color": _PARETO, "width": 2}
    traces = [{"x": numbers, "y": volumes, "mode": "lines+markers", "line": line, "marker": {"size": 5}}]
    traces[0] |= {"name": "baselines and trials so far", "hovertemplate": hover}
    level = summary.get("baselines_hypervolume")
    if level is not None:
        ends = [numbers[0], numbers[-1]] if len(numbers) > 1 else [numbers[0] - 0.5, numbers[0] + 0.5]
        dashed = {"color": _BASELINE, "width": 2, "dash": "dash"}
        traces.append({"x": ends, "y": [level, level], "mode": "lines", "line": dashed, "name": "baselines alone"})
        traces[1] |= {"hovertemplate": "baselines alone: %{y:.4f}<extra></extra>"}
    axes = {"xaxis": _axis("trial", **_whole(numbers)), "yaxis": _axis("hypervolume")}
    return {"data": [{"type": "scatter", **trace} for trace in traces], "layout": {**axes, "height": 360}}


def _bits_per_layer(summary: Summary) -> Figure | None:
    points = sorted(
        ((_label(entry), entry) for _, entry in pareto_entries(summary) if entry.get("bits")),
        key=lambda point: -point[1]["accuracy"],
    )
    layers = list(dict.fromkeys(layer for _, entry in points for layer in entry["bits"]))
    if not layers:
        return None
    steps = len(_BITS)
    scale = [[edge / steps, colour] for i, colour in enumerate(_BIT_COLOURS) for edge in (i, i + 1)]
    shown = "%{text}" if len(points) <= 24 else ""
    traces = []
    for index, kind in enumerate(("weight", "activation")):
        cells = [[(entry["bits"].get(layer) or (None, None))[index] for _, entry in points] for layer in layers]
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


def _time_spent(summary: Summary) -> Figure | None:
    trials = [entry for entry in summary.get("trials") or [] if entry.get("seconds")]
    if not trials:
        return None
    traces = []
    numbers = [entry["number"] for entry in trials]
    for key, colour in _SECONDS.items():
        reported = [entry["seconds"].get(key) or 0 for entry in trials]
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


# --- parts of the page --------------------------------------------------------------------------------------------


def _section(title: str, content: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{content}</section>"


def _chart(title: str, figure: Figure | None, name: str, nothing: str) -> str:
    if figure is None:
        return _section(title, f'<p class="quiet">{html.escape(nothing)}</p>')
    return _section(title, f'<div class="chart" id="{name}" style="height:{figure["layout"]["height"]}px"></div>')


def _header(summary: Summary, title: str) -> str:
    device, versions = summary.get("device") or {}, summary.get("versions") or {}
    flags = [flag for flag in _FLAGS if flag in (device.get("flags") or [])]
    threads = device.get("threads")
    rows = {
        "recipe": _text(summary, "recipe"),
        "device": f"{_text(device, 'cpu')}, {_text(device, 'cores')} cores"
        + ("" if threads is None else f", measured on {html.escape(str(threads))} thread{'s' * (threads != 1)}"),
        "instructions": " ".join(f"<code>{flag}</code>" for flag in flags) or "–",
        "versions": ", ".join(html.escape(f"{name} {version}") for name, version in versions.items()) or "–",
    }
    facts = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows.items())
    return f"<header><h1>{title}</h1><dl>{facts}</dl></header>"


def _cards(summary: Summary) -> str:
    reference = summary.get("float") or {}
    points = [{**entry, "name": name} for name, entry in pareto_entries(summary)]
    best = max(points, key=lambda entry: (entry["accuracy"], -entry["latency_us"]), default=None)
    floor = reference.get("accuracy")
    near = [entry for entry in points if floor is not None and entry["accuracy"] >= floor - 0.01]
    fastest = min(near, key=lambda entry: (entry["latency_us"], -entry["accuracy"]), default=None)
    figures = f"{_microseconds(reference.get('latency_us'))}, {_kilobytes(reference.get('size_bytes'))}"
    found, level = summary.get("hypervolume"), summary.get("baselines_hypervolume")
    gain = f"baselines alone {level:.4f}" if summary.get("baselines") and level is not None else "no baselines"
    gain += f" ({found / level - 1:+.1%})" if level and found is not None else ""
    states = [str(entry.get("state")) for entry in summary.get("trials") or []]
    counts = ", ".join(f"{states.count(state)} {html.escape(state)}" for state in dict.fromkeys(states)) or "none yet"
    cards = [
        ("Float model", _percent(floor), figures),
        ("Most accurate", *_figures(best, reference, lambda entry: _percent(entry["accuracy"]))),
        (
            "Fastest within 1 point of float",
            *_figures(fastest, reference, lambda entry: _microseconds(entry["latency_us"])),
        ),
        ("Hypervolume", "–" if found is None else f"{found:.4f}", gain),
        ("Trials", str(len(states)), counts),
    ]
    return '<div class="cards">' + "".join(_card(*card) for card in cards) + "</div>"


def _card(title: str, value: str, note: str) -> str:
    return f'<div class="card"><h3>{title}</h3><p class="value">{value}</p><p class="quiet">{note}</p></div>'


def _figures(entry: Entry | None, reference: Entry, key: Callable[[Entry], str]) -> tuple[str, str]:
    if entry is None:
        return "–", "no such point so far"
    faster = _ratio(reference.get("latency_us"), entry["latency_us"])
    smaller = _ratio(reference.get("size_bytes"), entry["size_bytes"])
    figures = f"{_percent(entry['accuracy'])}, {_microseconds(entry['latency_us'])}, {_kilobytes(entry['size_bytes'])}"
    return key(entry), f"{html.escape(str(entry['name']))}: {figures}<br>{faster} faster, {smaller} smaller than float"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """Cells are HTML already; the first `left` columns hold text, the others numbers."""

    def row(tag: str, cells: Sequence[str]) -> str:
        sides = [""] * left + [' class="number"'] * (len(cells) - left)
        content = "".join(f"<{tag}{side}>{cell}</{tag}>" for side, cell in zip(sides, cells, strict=True))
        return f"<tr>{content}</tr>"

    body = "".join(row("td", cells) for cells in rows)
    return f'<div class="wide"><table><thead>{row("th", header)}</thead><tbody>{body}</tbody></table></div>'


def _pareto_table(summary: Summary) -> str:
    reference = summary.get("float") or {}
    points = sorted(pareto_entries(summary), key=lambda point: (point[1]["latency_us"], point[0]))
    if not points:
        return '<p class="quiet">There is no Pareto point yet.</p>'
    header = ["point", "phase", "bits: mean (range)", "accuracy", "fake-quantized", "test accuracy"]
    header += ["latency", "speedup", "size", "smaller"]
    rows = [
        [
            html.escape(name),
            _text(entry, "phase"),
            html.escape(bits_summary(entry.get("bits") or {})),
            _percent(entry["accuracy"]),
            _percent(entry.get("fake_quant_accuracy")),
            _percent(entry.get("test_accuracy")),
            _microseconds(entry["latency_us"]),
            _ratio(reference.get("latency_us"), entry["latency_us"]),
            _kilobytes(entry["size_bytes"]),
            _ratio(reference.get("size_bytes"), entry["size_bytes"]),
        ]
        for name, entry in points
    ]
    return _table(header, rows, left=3)


def _failures(summary: Summary) -> str:
    entries = [*(summary.get("baselines") or []), *(summary.get("trials") or [])]
    failed = [entry for entry in entries if entry.get("state") == "failed"]
    if not failed:
        return ""
    rows = [
        [
            _label(entry),
            _text(entry, "phase"),
            html.escape(bits_summary(entry.get("bits") or {})),
            f"<pre>{html.escape(str(entry.get('error') or 'no reason was recorded'))}</pre>",
        ]
        for entry in failed
    ]
    return _section(
        f"Failed trials ({len(failed)})", _table(["trial", "phase", "bits: mean (range)", "reason"], rows, left=4)
    )


# The policy lets a browser load nothing from anywhere: what is not in the file does not exist for it.
_POLICY = (
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; img-src data: blob:\">"
)

_STYLE = """
:root { color-scheme: light dark; --page: #f5f6f8; --card: #fff; --text: #1d2129; --quiet: #626a76; --line: #e3e6ea; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171c; --card: #1d2128; --text: #e6e9ee; --quiet: #9aa3b0; --line: #323843; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1280px; margin: 0 auto; padding: 28px 24px 48px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 12px; letter-spacing: -0.01em; }
h2 { font-size: 17px; margin: 0 0 10px; }
h3 { font-size: 13px; font-weight: 600; margin: 0; color: var(--quiet); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 18px; margin: 0 0 22px; font-size: 14px; }
dt { color: var(--quiet); } dd { margin: 0; overflow-wrap: anywhere; }
code { font: 12px ui-monospace, "SF Mono", Menlo, Consolas, monospace; padding: 1px 6px; border: 1px solid var(--line);
  border-radius: 4px; background: var(--card); }
section, .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
section { padding: 16px 18px; margin: 0 0 18px; min-width: 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(215px, 1fr)); gap: 14px; margin: 0 0 18px; }
.card { padding: 14px 16px; } .card p { margin: 0; overflow-wrap: anywhere; }
.value { font-size: 25px; font-weight: 650; font-variant-numeric: tabular-nums; letter-spacing: -0.01em; }
.quiet { color: var(--quiet); font-size: 13px; }
.pair { display: grid; grid-template-columns: 1fr; gap: 0 18px; }
@media (min-width: 980px) { .pair { grid-template-columns: 1fr 1fr; } }
.chart { width: 100%; } .wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th { color: var(--quiet); font-weight: 600; text-align: left; border-bottom: 1px solid var(--line); }
th, td { padding: 5px 10px; vertical-align: top; white-space: nowrap; }
tbody tr + tr td { border-top: 1px solid var(--line); }
.number { text-align: right; font-variant-numeric: tabular-nums; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; min-width: 320px; max-height: 220px; overflow-y: auto;
  font: 12px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
"""

_SCRIPT = """
const figures = JSON.parse(document.getElementById("figures").textContent);
const dark = window.matchMedia("(prefers-color-scheme: dark)");
function draw() {
  const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  for (const [name, figure] of Object.entries(figures)) {
    // The legend hangs 66 px below the plot, whose height is the chart's without the margins.
    const layout = Object.assign({}, figure.layout, {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hovermode: "closest",
      font: {family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("--text")},
      hoverlabel: {bgcolor: colour("--card"), bordercolor: colour("--line"), font: {color: colour("--text")},
        align: "left"},
      modebar: {bgcolor: "rgba(0,0,0,0)", color: colour("--quiet"), activecolor: colour("--text")},
      legend: {orientation: "h", x: 0, y: -66 / (figure.layout.height - 106), yanchor: "top", traceorder: "normal"},
      margin: {l: 60, r: 16, t: 34, b: 72},
    });
    for (const key of Object.keys(layout).filter(key => /^[xy]axis/.test(key)))
      layout[key] = Object.assign({gridcolor: colour("--line"), linecolor: colour("--line")}, layout[key]);
    Plotly.react(name, figure.data, layout, {responsive: true, displaylogo: false,
      modeBarButtons: [["toImage"], ["zoom2d", "pan2d"], ["zoomIn2d", "zoomOut2d", "resetScale2d"]]});
  }
}
draw();
dark.addEventListener("change", draw);
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write `report.html` of a run folder again. Returns the exit status: 0, or 2 when the summary cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m lightning_baqe.report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run_dir", type=Path, help="run folder, the one that holds summary.json")
    parser.add_argument("--picture", type=Path, metavar="out.png", help="draw the picture for a README, too")
    options = parser.parse_args(arguments)
    try:
        summary = read_summary(options.run_dir)
    except BaqeError as error:
        parser.exit(2, f"{error}\n")
    write_report(summary, options.run_dir / "report.html")
    print(options.run_dir / "report.html")
    if options.picture:
        write_picture(summary, options.picture)
        print(options.picture)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
