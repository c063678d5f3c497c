"""The report of a run: one HTML file that works offline, and the picture for a README.

    python -m lightning_baqe.runs.report <run_dir> [--picture out.png]

Both are made from `summary.json` alone, so a report can be written again at any time, also while the run goes on.
"""

from __future__ import annotations

import argparse
import html
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from lightning_baqe.errors import BaqeError
from lightning_baqe.files import replace_file
from lightning_baqe.runs.front import bits_summary
from lightning_baqe.runs.report_figures import (
    PARETO_COLOUR,
    Figure,
    axis_ticks,
    bits_figure,
    escaped,
    front_steps,
    in_kilobytes,
    in_microseconds,
    in_percent,
    name_of,
    point_groups,
    progress_figure,
    speedup,
    time_figure,
    trade_off_figure,
)
from lightning_baqe.runs.summary import Figures, Measured, Summary

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


def write_report(summary: Summary, path: Path) -> None:
    """Write the report as one self-contained HTML file (plotly.js inside); the file is replaced in one step.

    Args:
        summary: the content of `summary.json`, that of a run which goes on included.
        path: the file to write, usually `<run_dir>/report.html`.
    """
    figures = {
        "accuracy-latency": trade_off_figure(summary, "latency_us", "latency (µs)", 1.0),
        "accuracy-size": trade_off_figure(summary, "size_bytes", "size (kB)", 1e-3),
        "hypervolume": progress_figure(summary),
        "bits": bits_figure(summary),
        "seconds": time_figure(summary),
    }
    title = f"{escaped(summary.model)} on {escaped(summary.dataset)}"
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
        groups = point_groups(summary)
        for group in groups:
            xs, ys = (
                [getattr(entry, key) * scale for entry in group.entries],
                [100 * entry.accuracy for entry in group.entries],
            )
            look: dict[str, Any] = {"label": group.name, "marker": group.mark, "s": 0.55 * group.size**2, "zorder": 3}
            if group.ring:
                axis.scatter(xs, ys, facecolors="none", edgecolors=group.colour, linewidths=1.4, **look)
            else:
                axis.scatter(xs, ys, color=group.colour, edgecolors="white", linewidths=0.6, **look)
        if groups:
            ticks = axis_ticks([getattr(entry, key) * scale for group in groups for entry in group.entries])
            axis.set_xscale("log")
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.set_xticks([], minor=True)
        steps = [(x * scale, 100 * y) for x, y in front_steps(summary, key)]
        if steps:
            axis.step(*zip(*steps, strict=True), where="post", color=PARETO_COLOUR, linewidth=1.4, alpha=0.7, zorder=2)
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
    title = f"{summary.model} on {summary.dataset}, {summary.device.get('cpu') or 'unknown CPU'}"
    canvas.suptitle(title.replace("$", r"\$"), fontsize=12, fontweight="bold")
    content = io.BytesIO()
    canvas.savefig(content, format="png")
    replace_file(Path(path), content.getvalue())


# --- parts of the page --------------------------------------------------------------------------------------------


def _section(title: str, content: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{content}</section>"


def _chart(title: str, figure: Figure | None, name: str, nothing: str) -> str:
    if figure is None:
        return _section(title, f'<p class="quiet">{html.escape(nothing)}</p>')
    return _section(title, f'<div class="chart" id="{name}" style="height:{figure["layout"]["height"]}px"></div>')


def _header(summary: Summary, title: str) -> str:
    device = summary.device
    flags = [flag for flag in _FLAGS if flag in (device.get("flags") or [])]
    threads = device.get("threads")
    rows = {
        "recipe": escaped(summary.recipe),
        "device": f"{escaped(device.get('cpu'))}, {escaped(device.get('cores'))} cores"
        + ("" if threads is None else f", measured on {html.escape(str(threads))} thread{'s' * (threads != 1)}"),
        "instructions": " ".join(f"<code>{flag}</code>" for flag in flags) or "–",
        "limits": html.escape(", ".join(f"{name} {value:g}" for name, value in (summary.limits or {}).items())),
        "bits here": html.escape((summary.rewards or {}).get("line", "")),
        "versions": ", ".join(html.escape(f"{name} {version}") for name, version in summary.versions.items()) or "–",
    }
    facts = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows.items() if value)
    return f"<header><h1>{title}</h1><dl>{facts}</dl></header>"


def _cards(summary: Summary) -> str:
    reference, points = summary.reference or Figures(), summary.pareto
    best = max(points, key=lambda entry: (entry.accuracy, -entry.latency_us), default=None)
    floor = reference.accuracy
    near = [entry for entry in points if floor is not None and entry.accuracy >= floor - 0.01]
    fastest = min(near, key=lambda entry: (entry.latency_us, -entry.accuracy), default=None)
    figures = f"{in_microseconds(reference.latency_us)}, {in_kilobytes(reference.size_bytes)}"
    found, level = summary.hypervolume, summary.baselines_hypervolume
    gain = f"baselines alone {level:.4f}" if summary.baselines and level is not None else "no baselines"
    gain += f" ({found / level - 1:+.1%})" if level and found is not None else ""
    states = [entry.state for entry in summary.trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)) or "none yet"
    cards = [
        ("Float model", in_percent(floor), figures),
        ("Most accurate", *_figures(best, reference, lambda entry: in_percent(entry.accuracy))),
        (
            "Fastest within 1 point of float",
            *_figures(fastest, reference, lambda entry: in_microseconds(entry.latency_us)),
        ),
        ("Hypervolume", "–" if found is None else f"{found:.4f}", gain),
        ("Trials", str(len(states)), counts),
    ]
    return '<div class="cards">' + "".join(_card(*card) for card in cards) + "</div>"


def _card(title: str, value: str, note: str) -> str:
    return f'<div class="card"><h3>{title}</h3><p class="value">{value}</p><p class="quiet">{note}</p></div>'


def _figures(entry: Measured | None, reference: Figures, key: Callable[[Measured], str]) -> tuple[str, str]:
    if entry is None:
        return "–", "no such point so far"
    faster = speedup(reference.latency_us, entry.latency_us)
    smaller = speedup(reference.size_bytes, entry.size_bytes)
    figures = f"{in_percent(entry.accuracy)}, {in_microseconds(entry.latency_us)}, {in_kilobytes(entry.size_bytes)}"
    return key(entry), f"{html.escape(entry.key)}: {figures}<br>{faster} faster, {smaller} smaller than float"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """Cells are HTML already; the first `left` columns hold text, the others numbers."""

    def row(tag: str, cells: Sequence[str]) -> str:
        sides = [""] * left + [' class="number"'] * (len(cells) - left)
        content = "".join(f"<{tag}{side}>{cell}</{tag}>" for side, cell in zip(sides, cells, strict=True))
        return f"<tr>{content}</tr>"

    body = "".join(row("td", cells) for cells in rows)
    return f'<div class="wide"><table><thead>{row("th", header)}</thead><tbody>{body}</tbody></table></div>'


def _pareto_table(summary: Summary) -> str:
    reference = summary.reference or Figures()
    if not summary.pareto:
        return '<p class="quiet">There is no Pareto point yet.</p>'
    header = ["point", "phase", "bits: mean (range)", "accuracy", "fake-quantized", "test accuracy"]
    header += ["latency", "speedup", "size", "smaller"]
    header += ["within limits"] if summary.limits else []
    rows = [
        [
            html.escape(entry.key),
            escaped(entry.phase),
            html.escape(bits_summary(entry.bits)),
            in_percent(entry.accuracy),
            in_percent(entry.fake_quant_accuracy),
            in_percent(entry.test_accuracy),
            in_microseconds(entry.latency_us),
            speedup(reference.latency_us, entry.latency_us),
            in_kilobytes(entry.size_bytes),
            speedup(reference.size_bytes, entry.size_bytes),
            *(["yes" if entry.feasible else "no"] if summary.limits else []),
        ]
        for entry in summary.pareto
    ]
    return _table(header, rows, left=3)


def _failures(summary: Summary) -> str:
    failed = [entry for entry in summary.entries if entry.state == "failed"]
    if not failed:
        return ""
    rows = [
        [
            name_of(entry),
            escaped(entry.phase),
            html.escape(bits_summary(entry.bits)),
            f"<pre>{html.escape(entry.error or 'no reason was recorded')}</pre>",
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
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m lightning_baqe.runs.report", description=about)
    parser.add_argument("run_dir", type=Path, help="run folder, the one that holds summary.json")
    parser.add_argument("--picture", type=Path, metavar="out.png", help="draw the picture for a README, too")
    options = parser.parse_args(arguments)
    try:
        summary = Summary.load(options.run_dir)
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
