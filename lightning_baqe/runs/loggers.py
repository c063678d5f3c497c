"""A search's results for the trainer's loggers: a curve for all of them, tables and artifacts for Weights & Biases."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger, WandbLogger

from lightning_baqe.runs.report_figures import hypervolume_over_trials
from lightning_baqe.runs.summary import Entry, Figures, Summary

COLUMNS = ("name", "accuracy", "test_accuracy", "latency_us", "size_bytes", "speedup", "smaller", "feasible", "bits")


def log_entry(loggers: Iterable[Logger], entry: Entry, summary: Summary, step: int) -> None:
    """Log an entry's figures, where it has them, and the hypervolume so far: the metric that a sweep maximises."""
    keys = ("accuracy", "fake_quant_accuracy", "latency_us", "size_bytes")
    figures = {f"search/{key}": float(getattr(entry, key)) for key in keys if getattr(entry, key) is not None}
    for logger in loggers:
        logger.log_metrics({**figures, "search/hypervolume": summary.hypervolume or 0.0}, step=step)


def log_results(loggers: Iterable[Logger], summary: Summary, run_dir: Path) -> None:
    """Log what a search found to those of the loggers that are W&B's.

    The table ``search/pareto``, the chart ``search/hypervolume_curve``, and an artifact of type ``pareto-front`` with
    ``summary.json``, ``report.html`` and the artifact folder of each Pareto point that is in the run folder.
    """
    ours = [logger for logger in loggers if isinstance(logger, WandbLogger)]
    if not ours:
        return
    import wandb

    rows = pareto_rows(summary)
    for logger in ours:
        run = logger.experiment
        curve = wandb.Table(columns=["trial", "hypervolume"], data=[list(p) for p in hypervolume_over_trials(summary)])
        chart = wandb.plot.line(curve, "trial", "hypervolume", title="Hypervolume over trials")
        run.log({"search/pareto": wandb.Table(columns=list(COLUMNS), data=rows), "search/hypervolume_curve": chart})
        artifact = wandb.Artifact(f"pareto-{run.id}", type="pareto-front")
        for name in ("summary.json", "report.html"):
            if (run_dir / name).exists():
                artifact.add_file(str(run_dir / name))
        for entry in summary.pareto:
            folder = run_dir / "artifacts" / entry.key
            if folder.is_dir():  # not so for another worker's, with a run folder of its own
                artifact.add_dir(str(folder), name=f"artifacts/{entry.key}")
        run.log_artifact(artifact)


def pareto_rows(summary: Summary) -> list[list[Any]]:
    """The Pareto points as rows of a table, fastest first, with the columns ``COLUMNS``."""
    of = summary.reference or Figures()
    return [
        [
            entry.key, entry.accuracy, entry.test_accuracy, entry.latency_us, entry.size_bytes,
            of.latency_us / entry.latency_us if of.latency_us else None,
            of.size_bytes / entry.size_bytes if of.size_bytes else None,
            entry.feasible, json.dumps(entry.bits),
        ]
        for entry in summary.pareto
    ]  # fmt: skip
