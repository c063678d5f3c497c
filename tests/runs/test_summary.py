"""Summaries: what is written is what is read, older files load, damaged and foreign ones are refused by field."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from lightning_baqe.errors import ConfigError, DataError
from lightning_baqe.runs.front import Front
from lightning_baqe.runs.objectives import summarise
from lightning_baqe.runs.summary import Baseline, Figures, Summary, Trial, main


def test_an_older_file_loads_and_is_written_with_all_that_it_held(
    sample_run_dir: Path, sample_summary: dict[str, Any]
) -> None:
    summary = Summary.load(sample_run_dir)
    assert summary.version == 1
    summary.write(sample_run_dir)
    assert Summary.load(sample_run_dir) == summary
    content = json.loads((sample_run_dir / "summary.json").read_text())
    for name in ("trials", "baselines"):
        for new, old in zip(content.pop(name), sample_summary.pop(name), strict=True):
            assert {key: value for key, value in old.items() if value is not None} == {
                key: value for key, value in new.items() if value is not None
            }
    assert content["float"].items() >= sample_summary.pop("float").items()
    assert content.items() >= sample_summary.items()


def test_scores_agree_with_the_sample(sample_summary: dict[str, Any]) -> None:
    wanted = Summary.model_validate(sample_summary)
    plain = {"pareto": False, "test_accuracy": None}
    found = summarise(
        {"recipe": "x"},
        wanted.reference or Figures(),
        [entry.model_copy(update=plain) for entry in wanted.trials],
        [entry.model_copy(update=plain) for entry in wanted.baselines],
        limits={"latency_us": 700.0},
        tests={"float": 0.5, **{entry.key: 0.25 for entry in wanted.entries}},
    )
    assert [entry.key for entry in found.pareto] == [entry.key for entry in wanted.pareto]
    assert found.hypervolume == pytest.approx(wanted.hypervolume)
    assert found.baselines_hypervolume == pytest.approx(wanted.baselines_hypervolume)
    assert {entry.test_accuracy for entry in found.pareto} == {0.25}
    assert {entry.test_accuracy for entry in found.entries if not entry.pareto} == {None}
    assert all(entry.feasible == (entry.latency_us <= 700.0) for entry in found.complete)
    assert found.reference is not None
    assert found.reference.test_accuracy == 0.5


def test_artifacts_off_the_front_go_and_those_in_work_stay(tmp_path: Path) -> None:
    figures: dict[str, Any] = {"accuracy": 0.5, "latency_us": 1.0, "size_bytes": 1}
    trials = (Trial(number=0, pareto=True, **figures), Trial(number=1, **figures), Trial(number=2, state="running"))
    for name in ("float", "baseline_w8a8", "trial_0", "trial_1", "trial_2"):
        (tmp_path / "artifacts" / name).mkdir(parents=True)
    Summary(trials=trials, baselines=(Baseline(name="w8a8", **figures),)).write(tmp_path)
    assert {path.name for path in (tmp_path / "artifacts").iterdir()} == {"float", "trial_0", "trial_2"}


def test_bits_of_each_channel_are_kept(tmp_path: Path) -> None:
    trial = Trial(number=0, accuracy=0.5, latency_us=1.0, size_bytes=1, pareto=True, bits={"fc": ((2, 4), 8)})
    Summary(trials=(trial,), baselines=()).write(tmp_path)
    assert Summary.load(tmp_path).trials == (trial,)
    assert next(csv.DictReader((tmp_path / "pareto.csv").read_text().splitlines()))["mean_weight_bits"] == "3.0"


def test_the_schema_names_every_field(capsys: pytest.CaptureFixture[str], sample_summary: dict[str, Any]) -> None:
    assert main() == 0
    assert set(json.loads(capsys.readouterr().out)["properties"]) >= set(sample_summary)


def test_a_half_written_summary_is_refused(sample_run_dir: Path) -> None:
    path = sample_run_dir / "summary.json"
    path.write_text(path.read_text()[:5000])
    with pytest.raises(DataError, match=r"summary\.json is not whole JSON.*resumes from study\.db"):
        Front.load(sample_run_dir)


@pytest.mark.parametrize(
    ("summary", "pattern"),
    [
        ([], r"the whole: .*dictionary.*it holds \[\]"),
        ({"trials": []}, "baselines: Field required"),
        ({"trials": {}, "baselines": []}, "trials: Input should be a valid tuple"),
        ({"trials": [{"pareto": False}], "baselines": []}, "trials.0.number: Field required"),
        (
            {"trials": [{"number": 4, "pareto": True, "accuracy": 0.5}], "baselines": []},
            "trials.0: .*trial_4 is on the",
        ),
        ({"trials": [], "baselines": [], "float": 3}, "float: .*it holds 3"),
        ({"trials": [], "baselines": [], "version": "new"}, "version: .*it holds new"),
        ({"trials": [], "baselines": [], "version": 99}, "has version 99, .* up to 1: upgrade"),
    ],
)
def test_another_schema_is_refused(tmp_path: Path, summary: Any, pattern: str) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(ConfigError, match=pattern) as caught:
        Summary.load(tmp_path)
    assert str(tmp_path / "summary.json") in str(caught.value)


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"accuracy": 92.0}, "are 0 to 1"),
        ({"latency_us": -3.0}, "above 0"),
        ({"bits": {"fc": 8}}, r"trials\.0\.bits\.fc: .* it holds 8"),
    ],
)
def test_impossible_figures_are_refused(tmp_path: Path, change: dict[str, Any], pattern: str) -> None:
    entry = {"number": 2, "pareto": True, "accuracy": 0.9, "latency_us": 1.0, "size_bytes": 1, "bits": {"fc": [8, 8]}}
    (tmp_path / "summary.json").write_text(json.dumps({"trials": [entry | change], "baselines": []}))
    with pytest.raises(ConfigError, match=pattern):
        Front.load(tmp_path)


def test_csv_holds_the_pareto_points_and_their_ratios(tmp_path: Path, sample_summary: dict[str, Any]) -> None:
    summary = Summary.model_validate(sample_summary)
    summary.write(tmp_path)
    rows = list(csv.DictReader((tmp_path / "pareto.csv").read_text().splitlines()))
    entries = {entry.key: json.loads(entry.model_dump_json()) for entry in summary.pareto}
    assert {row["name"] for row in rows} == set(entries)
    assert [float(row["latency_us"]) for row in rows] == sorted(float(row["latency_us"]) for row in rows)
    for row in rows:
        entry = entries[row["name"]]
        assert json.loads(row["bits"]) == entry["bits"]
        assert float(row["latency_ratio"]) == entry["latency_us"] / sample_summary["float"]["latency_us"]
        assert float(row["size_ratio"]) == entry["size_bytes"] / sample_summary["float"]["size_bytes"]
        assert 2 <= float(row["mean_weight_bits"]) <= 8
    assert {path.name for path in tmp_path.iterdir()} == {"summary.json", "pareto.csv"}


def test_csv_without_float_model_leaves_the_ratios_empty(sample_summary: dict[str, Any]) -> None:
    text = Summary.model_validate(sample_summary | {"float": None}).pareto_csv()
    assert {row["latency_ratio"] for row in csv.DictReader(text.splitlines())} == {""}
