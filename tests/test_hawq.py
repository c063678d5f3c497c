"""The recipe of HAWQ-V3 in its smallest form: budgets are kept, runs go on, what is stale is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_data import small_fashion_mnist
from smallest import HAWQ, SMALLEST

import lightning_baqe as baqe
from lightning_baqe.costs.layer_costs import LayerCosts
from lightning_baqe.runs.allocator import Allocator
from lightning_baqe.runs.budgets import Row
from lightning_baqe.train import main

pytestmark = pytest.mark.filterwarnings("ignore:Hessian traces of .* below their standard errors")
OURS = ["recipe=hawq", *SMALLEST, *HAWQ]


@pytest.fixture(autouse=True)
def _own_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_BAQE_CACHE", str(tmp_path / "cache"))


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def times(folder: Path, pattern: str) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.glob(pattern)}


def test_a_run_its_resumption_and_another_budget(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    small_fashion_mnist(tmp_path / "fashion", 64, 32)
    # Training images that change from reading to reading are the same when the run goes on.
    data = ["data=fashion_mnist", f"data.root={tmp_path}/fashion", "data.val_size=32", "data.batch_size=8"]
    arguments = [*OURS, *data, f"run_dir={run_dir}"]
    assert main(arguments) == 0
    shown = capfd.readouterr()
    names = [f"{level}-{cost}" for cost in ("size", "bops", "latency") for level in ("high", "low")]
    assert all(name in shown.out for name in ("Table II", "uniform_8", *names))
    folder = run_dir / "allocation"
    assert (folder / "table.txt").read_text() in shown.out
    assert (folder / "layers.png").stat().st_size > 5000
    costs = LayerCosts.from_record(read(folder / "costs.json")["content"])
    rows = read(folder / "allocations.json")
    assert [row["budget"] for row in rows] == names
    for row in rows:
        ((cost, limit),) = row["limits"].items()
        assert row["predicted"][cost] <= limit * (1 + 1e-9)
        assert costs.total(cost, row["bits"]) == pytest.approx(row["predicted"][cost])
        assert (row["bits"]["stem.0"], row["bits"]["fc"]) == (8, 8)
    summary = read(run_dir / "summary.json")
    assert summary["recipe"] == "hawq"
    assert [entry["name"] for entry in summary["baselines"]] == ["uniform_8"]
    by_bits = {
        json.dumps({n: b[0] for n, b in e["bits"].items()}): e for e in (*summary["trials"], *summary["baselines"])
    }
    for row in rows:
        measured = by_bits[json.dumps(row["bits"])]
        assert measured["size_bytes"] == pytest.approx(row["predicted"]["size_bytes"], abs=100)
        assert measured["test_accuracy"] is not None or not measured["pareto"]
    assert baqe.Front.load(run_dir).select().size_bytes > 0

    before = times(run_dir, "checkpoints/*") | times(folder, "*_?.json") | times(folder, "[sc]*.json")
    assert main(arguments) == 0  # nothing is done again
    assert before == times(run_dir, "checkpoints/*") | times(folder, "*_?.json") | times(folder, "[sc]*.json")
    again = capfd.readouterr()
    assert "Training" not in again.err

    trials = len(summary["trials"])
    assert main([*arguments, "allocation.budget.mean_bits=6.5"]) == 0
    err = capfd.readouterr().err
    assert err.count("Training") <= 1  # another network at most; sensitivities and costs are the kept ones
    assert "Sensitivities" not in err
    assert [row["budget"] for row in read(folder / "allocations.json")] == ["own"]
    assert trials <= len(read(run_dir / "summary.json")["trials"]) <= trials + 1
    exported = folder / "trial_0-bits.json"
    qat = ["recipe=qat", *SMALLEST, *data, "qat.epochs=0", f"bits.file={exported}", f"run_dir={tmp_path}/qat"]
    assert main(qat) == 0
    assert read(tmp_path / "qat" / "summary.json")["trials"][0]["bits"] == summary["trials"][0]["bits"]


def test_figures_of_another_network_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = [*OURS, f"run_dir={tmp_path}/run", "allocation.budget.size_bytes=3000", "allocation.baselines=[]"]
    assert main(arguments) == 0
    path = tmp_path / "run" / "allocation" / "sensitivities.json"
    content = read(path)
    content["signature"]["weights"] = "of another network"
    path.write_text(json.dumps(content))
    capfd.readouterr()
    assert main(arguments) == 1
    assert "was made for other weights than this run has: remove it" in capfd.readouterr().err.replace("\n", " ")


def test_a_budget_that_cannot_be_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*OURS, f"run_dir={tmp_path}/run", "allocation.budget.size_bytes=100"]) == 1
    assert "size_bytes=100 is too small: the smallest that these bits can reach is" in capfd.readouterr().err
    assert not list((tmp_path / "run" / "checkpoints").glob("trial*"))


@pytest.mark.parametrize(
    ("option", "wanted"),
    [
        ("allocation.images=0", "allocation.images=0"),
        ("allocation.bit_choices=[4]", "allocation.bit_choices are 2..8 or 32 (float), each once; got [4]"),
        ("allocation.bit_choices=some", "wanted are widths, or 'auto'"),
        ("allocation.baselines=[9]", "allocation.baselines are 2..8"),
        ("allocation.bit_choices=4", "allocation.bit_choices=4, wanted is a list of bits"),
        ("allocation.baselines=8", "allocation.baselines=8, wanted is a list of bits"),
        ("allocation.tune_s=-5", "allocation.tune_s=-5, but seconds of 0 or more"),
        ("bits.weight=4", "recipe=hawq finds them"),
        ("sensitivity.samples=1", "samples=1"),
        ("allocation.budget.latency_us=-1", "allocation.budget.latency_us=-1, but a number above 0 is wanted"),
        ("allocation.budget.levels.high=2", "allocation.budget.levels.high=2, but a number of 0 to 1"),
        ("qat.steps=0", "qat.steps=0"),
        ("sensitivity=strategy", "There is no sensitivity 'strategy'"),
    ],
)
def test_wrong_options_are_refused_before_any_training(
    option: str, wanted: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*OURS, f"run_dir={tmp_path}/run", option]) > 0
    assert wanted in capfd.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_network_of_two_layers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    two = ["model._target_=smallest.two_layers", "model.name=two"]
    assert main([*OURS, *two, f"run_dir={tmp_path}/run"]) == 1
    assert "has 2 layers, of which the first and the last keep 8 bits" in capfd.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_float_beside_one_width(tmp_path: Path) -> None:
    options = ["allocation.bit_choices=[8,32]", "allocation.budget.mean_bits=18", "allocation.baselines=[]"]
    assert main([*OURS, *options, f"run_dir={tmp_path}/run"]) == 0
    (row,) = read(tmp_path / "run" / "allocation" / "allocations.json")
    assert (row["bits"]["stem.0"], row["bits"]["fc"]) == (8, 8)
    assert set(row["bits"].values()) == {8, 32}


def test_a_network_that_is_slower_than_its_layers_say(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ever faster networks are tried, as long as the other limit lets them; the run goes on and tells."""
    measured: list[float] = []

    def slow(self: Allocator, row: Row) -> float:
        measured.append(row.predicted["latency_us"])
        return 1e9

    monkeypatch.setattr(Allocator, "_network_us", slow)
    limits = ["allocation.budget.latency_us=1e6", "allocation.budget.size_bytes=1300", "allocation.baselines=[]"]
    assert main([*OURS, *limits, f"run_dir={tmp_path}/run"]) == 0
    assert len(measured) > 1
    assert "1000000000.0 us measured, 1000000.0 wanted; no faster network was found" in capfd.readouterr().err
    (row,) = read(tmp_path / "run" / "allocation" / "allocations.json")
    assert row["limits"] == {"size_bytes": 1300, "latency_us": 1e6}
