"""The report: self-contained, safe to open, complete, and right about half a run too."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from plotly.offline import get_plotlyjs
from sample_run import make_summary

from lightning_baqe.runs.report import main, write_picture, write_report
from lightning_baqe.runs.report_figures import hypervolume_over_trials
from lightning_baqe.runs.summary import Summary

PARTIAL: dict[str, dict[str, Any]] = {
    "nothing": {"trials": [], "baselines": []},
    "no trials, no baselines": make_summary(0, baselines=False),
    "only baselines": make_summary(0),
    "one Pareto point": make_summary(1, baselines=False, failed=()),
    "only failures": make_summary(3, baselines=False, failed=(0, 1, 2)),
    "no float model": make_summary(6) | {"float": None},
    "just begun": {"trials": [{"number": 0, "state": "running"}], "baselines": [], "float": {"accuracy": 0.9}},
}


def page_of(summary: dict[str, Any], folder: Path) -> str:
    """The report without the plotly.js in it."""
    write_report(Summary.model_validate(summary), folder / "report.html")
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count(get_plotlyjs()) == 1
    return page.replace(get_plotlyjs(), "")


def figures_of(page: str) -> dict[str, go.Figure]:
    """The charts, checked by Plotly's own validation."""
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    assert found
    return {name: go.Figure(figure) for name, figure in json.loads(found[1]).items()}


def test_nothing_is_loaded_from_elsewhere(tmp_path: Path, sample_summary: dict[str, Any]) -> None:
    page = page_of(sample_summary, tmp_path)
    assert not re.search(r"""(?:src|href)\s*=|url\(|@import|<link|<iframe|https?://""", page)
    assert "default-src 'none'" in page
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_every_pareto_point_is_in_table_and_charts(tmp_path: Path, sample_summary: dict[str, Any]) -> None:
    page = page_of(sample_summary, tmp_path)
    entries = Summary.model_validate(sample_summary).pareto
    for entry in entries:
        assert f"<td>{entry.key}</td>" in page
        assert f"{entry.test_accuracy:.2%}" in page
    figures = figures_of(page)
    assert set(figures) == {"accuracy-latency", "accuracy-size", "hypervolume", "bits", "seconds"}
    for name in ("accuracy-latency", "accuracy-size"):
        traces = {trace.name: trace for trace in figures[name].data}
        assert len(traces["Pareto set"].x) == len(entries)
        assert len(traces["trials: ted"].x) + len(traces["trials: bo"].x) == 37
        assert len(traces["baselines"].x) == 3
        assert len(traces["float model"].x) == 1
        line = figures[name].data[0]
        assert line.line.shape == "hv"
        assert list(line.x) == sorted(line.x)
        assert list(line.y) == sorted(line.y)
    weights, activations = figures["bits"].data
    assert len(weights.z) == len(activations.z) == 20
    assert len(weights.z[0]) == len(entries)
    assert sum(figures["seconds"].data[0].y) == pytest.approx(
        sum(entry["seconds"]["train"] for entry in sample_summary["trials"])
    )


def test_what_the_device_rewards(tmp_path: Path, sample_summary: dict[str, Any]) -> None:
    line = "4 bit buys 1.50x the speed & 0.50x the size"
    page = page_of(sample_summary | {"rewards": {"line": line}}, tmp_path)
    assert f"<dt>bits here</dt><dd>{html.escape(line)}</dd>" in page
    for nothing in (None, {"line": ""}):
        assert "bits here" not in page_of(sample_summary | {"rewards": nothing}, tmp_path)


def test_failures_are_listed_with_their_reasons(tmp_path: Path, sample_summary: dict[str, Any]) -> None:
    page = page_of(sample_summary, tmp_path)
    assert "Failed trials (2)" in page
    assert page.count(html.escape(sample_summary["trials"][7]["error"])) == 2
    assert "Failed trials" not in page_of(make_summary(5, failed=()), tmp_path)


def test_text_of_the_summary_is_escaped(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>&\"'"
    summary = make_summary(4, failed=(0,))
    summary |= {"recipe": evil, "model": evil, "dataset": evil, "versions": {evil: evil}}
    summary["device"] |= {"cpu": evil, "cores": evil, "threads": evil}
    summary["trials"][0] |= {"error": evil, "phase": evil}
    for entry in summary["baselines"] + summary["trials"]:
        entry["phase"] = evil
        entry["bits"] = {evil: [8, 8]}
    for entry in summary["baselines"]:
        entry["name"] = evil.replace("/", "")  # names of folders
    page = page_of(summary, tmp_path)
    assert "<img" not in page
    assert "alert(1)</script>" not in page
    assert page.count("<script") == page.count("</script>") == 3
    figures_of(page)
    write_picture(Summary.model_validate(summary | {"model": "$a_b$ costs 5$"}), tmp_path / "picture.png")


@pytest.mark.parametrize("name", PARTIAL)
def test_parts_of_a_run_are_reported(tmp_path: Path, name: str) -> None:
    page = page_of(PARTIAL[name], tmp_path)
    figures_of(page)
    assert "None" not in page
    write_picture(Summary.model_validate(PARTIAL[name]), tmp_path / "picture.png")


def test_figures_that_are_not_numbers_are_left_out(tmp_path: Path) -> None:
    summary = make_summary(5, failed=())
    summary["trials"][1] |= {"accuracy": float("nan"), "pareto": False}
    summary["trials"][2] |= {"seconds": {"build": float("nan")}}
    assert "NaN" not in page_of(summary, tmp_path)


def test_hypervolume_grows_to_that_of_the_summary(sample_summary: dict[str, Any]) -> None:
    curve = hypervolume_over_trials(Summary.model_validate(sample_summary))
    assert [number for number, _ in curve] == [n for n in range(39) if n not in (7, 23)]
    volumes = [volume for _, volume in curve]
    assert volumes == sorted(volumes)
    assert volumes[0] >= sample_summary["baselines_hypervolume"]
    assert volumes[-1] == pytest.approx(sample_summary["hypervolume"])
    assert hypervolume_over_trials(Summary.model_validate(sample_summary | {"float": None})) == []


def test_picture_is_a_png(tmp_path: Path, sample_summary: dict[str, Any]) -> None:
    write_picture(Summary.model_validate(sample_summary), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]


def test_command_line(sample_run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(sample_run_dir), "--picture", str(tmp_path / "out.png")]) == 0
    assert (sample_run_dir / "report.html").is_file()
    assert (tmp_path / "out.png").is_file()
    assert "report.html" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path)])
    assert caught.value.code == 2
    assert "summary.json does not exist" in capsys.readouterr().err
