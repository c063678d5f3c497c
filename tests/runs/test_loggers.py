"""What loggers get from a search; W&B offline."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning.loggers import CSVLogger, WandbLogger

from lightning_baqe.runs.loggers import COLUMNS, pareto_rows
from lightning_baqe.runs.summary import Summary

Make = Callable[..., Any]


def test_rows_are_the_pareto_points(sample_summary: dict[str, Any]) -> None:
    summary = Summary.model_validate(sample_summary)
    rows = pareto_rows(summary)
    assert [row[0] for row in rows] == [entry.key for entry in summary.pareto]
    latency = [row[COLUMNS.index("latency_us")] for row in rows]
    assert latency == sorted(latency)
    assert all(len(row) == len(COLUMNS) for row in rows)


def test_wandb_gets_table_curve_and_artifacts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    foreign: Make,
    search: Make,
    fit: Make,
    digits: Any,
    made_up_device: Any,
) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    logged: list[dict[str, Any]] = []
    artifacts: list[Any] = []
    log, log_artifact = wandb.Run.log, wandb.Run.log_artifact

    def spy_log(self: Any, data: dict[str, Any], *rest: Any, **options: Any) -> Any:
        logged.append(dict(data))
        return log(self, data, *rest, **options)

    def spy_artifact(self: Any, artifact: Any, *rest: Any, **options: Any) -> Any:
        artifacts.append(artifact)
        return log_artifact(self, artifact, *rest, **options)

    monkeypatch.setattr(wandb.Run, "log", spy_log)
    monkeypatch.setattr(wandb.Run, "log_artifact", spy_artifact)
    loggers = [WandbLogger(project="test", save_dir=tmp_path), CSVLogger(tmp_path / "csv")]
    try:
        fit(foreign(), search(measure_on=made_up_device, trials=2), digits, logger=loggers)
    finally:
        wandb.finish()
    summary = Summary.load(tmp_path / "run")
    (path,) = (tmp_path / "wandb").glob("offline-run-*/files/media/table/search/pareto_*.table.json")
    table = json.loads(path.read_text())
    assert table["columns"] == list(COLUMNS)
    assert [row[0] for row in table["data"]] == [row[0] for row in pareto_rows(summary)]

    volumes = [row["search/hypervolume"] for row in logged if "search/hypervolume" in row]
    assert len(volumes) == 3  # a baseline and two trials
    assert volumes == sorted(volumes)
    assert volumes[-1] == pytest.approx(summary.hypervolume)
    assert sum("search/hypervolume_curve" in row for row in logged) == 1
    (artifact,) = [a for a in artifacts if a.type == "pareto-front"]  # W&B makes one of the table itself
    held = set(artifact.manifest.entries)
    assert {"summary.json", "report.html"} <= held
    assert {f"artifacts/{entry.key}/manifest.json" for entry in summary.pareto} <= held
    assert "search/hypervolume" in next((tmp_path / "csv").rglob("metrics.csv")).read_text()
