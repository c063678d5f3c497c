"""The report of a run: one HTML file that works offline, and the picture for a README.

    python -m lightning_baqe.runs.report <run_dir> [--picture out.png]

Both are made from `summary.json` alone, so a report can be written again at any time, also while the run goes on.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from lightning_baqe.errors import BaqeError
from lightning_baqe.files import replace_file
from lightning_baqe.runs import report_figures as draw
from lightning_baqe.runs.front import bits_summary
from lightning_baqe.runs.summary import Figures, Measured, Summary

_X86 = ("avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "amx_int8")
_ARM = ("asimd", "asimddp", "i8mm", "sve")
_PAGES = jinja2.Environment(
    loader=jinja2.PackageLoader("lightning_baqe.runs", ""),
    autoescape=True,
    trim_blocks=True,
    keep_trailing_newline=True,
    undefined=jinja2.StrictUndefined,
)
_PAGES.policies["json.dumps_kwargs"] = {"allow_nan": False}


def write_report(summary: Summary, path: Path) -> None:
    """Write the report, also of a run that goes on, as one HTML file (plotly.js inside), replaced in one step."""
    figures = {
        "accuracy-latency": draw.trade_off_figure(summary, "latency_us", "latency (µs)", 1.0),
        "accuracy-size": draw.trade_off_figure(summary, "size_bytes", "size (kB)", 1e-3),
        "hypervolume": draw.progress_figure(summary),
        "bits": draw.bits_figure(summary),
        "seconds": draw.time_figure(summary),
    }
    page = _PAGES.get_template("report.html.jinja").render(
        summary=summary,
        flags=[flag for flag in (*_X86, *_ARM) if flag in (summary.device.get("flags") or [])],
        limits=", ".join(f"{name} {value:g}" for name, value in (summary.limits or {}).items()),
        cards=_cards(summary),
        pareto=_pareto_rows(summary),
        failed=[entry for entry in summary.entries if entry.state == "failed"],
        name_of=draw.name_of,
        bits_summary=bits_summary,
        figures=figures,
        drawn={name: figure for name, figure in figures.items() if figure},
        plotly=get_plotlyjs(),
    )
    replace_file(Path(path), page.encode("utf-8"))


def write_picture(summary: Summary, path: Path) -> None:
    """Draw accuracy over latency and over size side by side as PNG; the file is replaced in one step."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(11, 4.6), dpi=160, layout="constrained")
    kinds = ((1e-3, "latency_us", "latency of one image (ms)"), (1e-3, "size_bytes", "size (kB)"))
    for axis, (scale, key, label) in zip(canvas.subplots(1, 2, sharey=True), kinds, strict=True):
        groups = draw.point_groups(summary)
        for group in groups:
            xs, ys = group.points(key, scale)
            look: dict[str, Any] = {"label": group.name, "marker": group.mark, "s": 0.55 * group.size**2, "zorder": 3}
            if group.ring:
                axis.scatter(xs, ys, facecolors="none", edgecolors=group.colour, linewidths=1.4, **look)
            else:
                axis.scatter(xs, ys, color=group.colour, edgecolors="white", linewidths=0.6, **look)
        if groups:
            ticks = draw.axis_ticks([x for group in groups for x in group.points(key, scale)[0]])
            axis.set_xscale("log")
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.set_xticks([], minor=True)
        steps = [(x * scale, 100 * y) for x, y in draw.front_steps(summary, key)]
        if steps:
            line = {"color": draw.PARETO_COLOUR, "linewidth": 1.4, "alpha": 0.7, "zorder": 2}
            axis.step(*zip(*steps, strict=True), where="post", **line)
        axis.set_xlabel(label)
        axis.grid(color="#e6e8eb", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color("#9aa0a8")
        axis.tick_params(color="#9aa0a8")
    first = canvas.axes[0]
    first.set_ylabel(f"validation {summary.measure}, deployed (%)")
    handles, labels = first.get_legend_handles_labels()
    if labels:
        canvas.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    title = f"{summary.model} on {summary.dataset}, {summary.device.get('cpu') or 'unknown CPU'}"
    canvas.suptitle(title.replace("$", r"\$"), fontsize=12, fontweight="bold")
    content = io.BytesIO()
    canvas.savefig(content, format="png")
    replace_file(Path(path), content.getvalue())


# --- parts of the page --------------------------------------------------------------------------------------------


def _cards(summary: Summary) -> list[tuple[str, str, list[str]]]:
    """Heading, figure and the lines below it."""
    reference, points = summary.reference or Figures(), summary.pareto
    best = max(points, key=lambda entry: (entry.accuracy, -entry.latency_us), default=None)
    floor = reference.accuracy
    near = [entry for entry in points if floor is not None and entry.accuracy >= floor - 0.01]
    fastest = min(near, key=lambda entry: (entry.latency_us, -entry.accuracy), default=None)
    figures = f"{draw.in_microseconds(reference.latency_us)}, {draw.in_kilobytes(reference.size_bytes)}"
    found, level = summary.hypervolume, summary.baselines_hypervolume
    gain = f"baselines alone {level:.4f}" if summary.baselines and level is not None else "no baselines"
    gain += f" ({found / level - 1:+.1%})" if level and found is not None else ""
    states = [entry.state for entry in summary.trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)) or "none yet"
    heading = "Most accurate" if summary.measure == "accuracy" else f"Best {summary.measure}"
    return [
        ("Float model", draw.in_percent(floor), [figures]),
        (heading, draw.in_percent(best.accuracy if best else None), _beside(best, reference)),
        (
            "Fastest within 1 point of float",
            draw.in_microseconds(fastest.latency_us if fastest else None),
            _beside(fastest, reference),
        ),
        ("Hypervolume", "–" if found is None else f"{found:.4f}", [gain]),
        ("Trials", str(len(states)), [counts]),
    ]


def _beside(entry: Measured | None, reference: Figures) -> list[str]:
    """An entry's figures, and how they compare with the float model's."""
    if entry is None:
        return ["no such point so far"]
    accuracy, latency, size = (
        draw.in_percent(entry.accuracy),
        draw.in_microseconds(entry.latency_us),
        draw.in_kilobytes(entry.size_bytes),
    )
    faster = draw.speedup(reference.latency_us, entry.latency_us)
    smaller = draw.speedup(reference.size_bytes, entry.size_bytes)
    return [f"{entry.key}: {accuracy}, {latency}, {size}", f"{faster} faster, {smaller} smaller than float"]


def _pareto_rows(summary: Summary) -> list[dict[str, str | None]]:
    """Cells by the heading of their column; the first three hold text, the others numbers."""
    reference = summary.reference or Figures()
    return [
        {
            "point": entry.key,
            "phase": entry.phase,
            "bits: mean (range)": bits_summary(entry.bits),
            summary.measure: draw.in_percent(entry.accuracy),
            "fake-quantized": draw.in_percent(entry.fake_quant_accuracy),
            f"test {summary.measure}": draw.in_percent(entry.test_accuracy),
            "latency": draw.in_microseconds(entry.latency_us),
            "speedup": draw.speedup(reference.latency_us, entry.latency_us),
            "size": draw.in_kilobytes(entry.size_bytes),
            "smaller": draw.speedup(reference.size_bytes, entry.size_bytes),
            **({"within limits": "yes" if entry.feasible else "no"} if summary.limits else {}),
        }
        for entry in summary.pareto
    ]


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
