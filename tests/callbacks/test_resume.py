"""A search that is killed in the middle of a trial goes on, and evaluates nothing twice."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import sys, torch, pytorch_lightning as pl
from foreign_module import ForeignModule
from lightning_baqe.callbacks import BayesianSearch
from lightning_baqe.data import DigitsDataModule
from lightning_baqe.runs.evaluation import MeasureOptions
torch.set_num_threads(1)
torch.manual_seed(0)
search = BayesianSearch(
    network="body.classifier", mode="paper", trials=4, n_initial=2, pool_size=20, steps_per_trial=3, baselines=(8,),
    run_dir=sys.argv[1],
    measurement=MeasureOptions(repeats=5, warmup=1), calibration_batches=1, tune_s=0.0, records=sys.argv[2],
    progress=False)
options = {"devices": 2, "strategy": "ddp"} if "ddp" in sys.argv else {}
trainer = pl.Trainer(max_epochs=-1, callbacks=[search], logger=False, enable_checkpointing=False,
    enable_progress_bar=False, num_sanity_val_steps=0, accelerator="cpu", **options)
module = ForeignModule()
trainer.fit(module, DigitsDataModule())
total = sum(float(value.double().abs().sum()) for value in module.body.classifier.state_dict().values())
print(f"rank {trainer.global_rank} holds {total!r}")
"""


def states(database: Path) -> list[tuple[int, str]]:
    if not database.exists():
        return []
    try:
        with sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=5) as connection:
            return connection.execute("SELECT number, state FROM trials ORDER BY number").fetchall()
    except sqlite3.OperationalError:  # not created yet
        return []


def test_kill_and_resume(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "run"), str(tmp_path / "records.db")]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    database = tmp_path / "run" / "study.db"

    process = subprocess.Popen(command, cwd=root, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + 240
        while (1, "RUNNING") not in states(database):
            assert process.poll() is None, "the search ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    killed = dict(states(database))
    assert killed[0] == "COMPLETE"
    assert killed[1] == "RUNNING"
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["trials"]  # the front found so far

    subprocess.run(command, cwd=root, env=environment, check=True, timeout=300)
    trials = json.loads((tmp_path / "run" / "summary.json").read_text())["trials"]
    complete = [entry for entry in trials if entry["state"] == "complete"]
    assert len(complete) == 4
    assert [entry["number"] for entry in trials if entry["state"] == "failed"] == [1]
    points = {json.dumps([entry["bits"], entry["schedules"]], sort_keys=True) for entry in complete}
    assert len(points) == 4


@pytest.mark.slow
def test_two_ranks_share_one_search(tmp_path: Path) -> None:
    script = tmp_path / "search.py"  # a file, since Lightning starts it again for the second rank
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(tmp_path / "run"), str(tmp_path / "records.db"), "ddp"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=True, timeout=300, capture_output=True, text=True)
    held = {line.split(" holds ")[1] for line in done.stdout.splitlines() if " holds " in line}
    assert len(held) == 1
    trials = json.loads((tmp_path / "run" / "summary.json").read_text())["trials"]
    assert [entry["state"] for entry in trials] == ["complete"] * 4
