"""The main job mode by mode: what is run, what goes on, and what the table says."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lightning_baqe.benchmarks import modes
from lightning_baqe.errors import BaqeError
from lightning_baqe.runs.summary import Figures, Summary, Trial
from lightning_baqe.train import compose


def summary_of(points: list[tuple[float, float, float]], float_us: float = 100.0) -> Summary:
    """Accuracy, microseconds and bytes of each trial."""
    trials = [
        Trial(number=n, accuracy=a, latency_us=us, size_bytes=size, seconds={"train": 2.0, "build": 1.0})
        for n, (a, us, size) in enumerate(points)
    ]
    return Summary(
        reference=Figures(accuracy=0.9, latency_us=float_us, size_bytes=1000),
        trials=(*trials, Trial(number=len(trials), state="failed")),
        baselines=(),
        device={"cpu": "x"},
    )


@pytest.mark.parametrize("mode", modes.MODES)
def test_commands_are_those_of_the_recipe(mode: str, tmp_path: Path) -> None:
    *_, code, recipe, data = modes.command(mode, 3, 7, tmp_path, ["search.tune_s=1"])[:5]
    assert "lightning_baqe.train" in code
    assert (recipe, data) == ("recipe=qat_search", "data=glyphs")
    cfg = compose(modes.command(mode, 3, 7, tmp_path, ["search.tune_s=1"])[3:])
    assert (cfg.seed, cfg.search.trials, cfg.search.tune_s) == (3, 7, 1)
    assert list(cfg.search.bit_choices) == list(modes.BITS)
    assert (cfg.model.name, cfg.pretrain.learning_rate, cfg.search.steps_per_trial) == ("resnet18", 2e-3, 30)
    assert Path(cfg.search.records) == tmp_path / "records.db"  # what another run tuned would save time here
    assert cfg.search.mode == ("beyond" if mode == "beyond" else "paper")
    if mode == "random":
        assert cfg.search.sampler.seed == 3
    else:
        assert "sampler" not in cfg.search


def test_table_by_hand() -> None:
    half = (0.5, 50.0, 500.0)
    entries = modes.summarise(
        {
            ("paper", 0): summary_of([half, (0.9, 50.0, 500.0)]),
            ("beyond", 0): summary_of([(0.9, 50.0, 500.0), (0.4, 60.0, 600.0), half]),
            ("random", 0): summary_of([half, half], 120.0),
        },
        {("paper", 0): 60.0, ("beyond", 0): 30.0, ("random", 0): 90.0},
    )
    paper, beyond, random = entries
    one, five = 0.9 * (1.5 - 0.5) * (1.1 - 0.5), 0.5 * (1.5 - 0.5) * (1.1 - 0.5)  # over the median float latency
    assert paper["of_joint"] == pytest.approx(1.0)
    assert random["of_joint"] == pytest.approx(five / one)
    assert (paper["trials_to_paper"], beyond["trials_to_paper"], random["trials_to_paper"]) == (2, 1, None)
    assert (beyond["front"], beyond["of_front"], random["of_front"]) == (1, 1, 0)
    assert (beyond["best_accuracy"], beyond["fastest_us"], beyond["trial_s"]) == (0.9, 50.0, 3.0)
    assert [entry["seconds"] for entry in entries] == [60.0, 30.0, 90.0]
    assert paper["adrs"] == beyond["adrs"] == 0.0 < random["adrs"]


def test_runs_share_the_float_network_and_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status = [0]
    called: list[Path] = []

    def pretend(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        run_dir = Path(next(part for part in command if part.startswith("run_dir=")).removeprefix("run_dir="))
        called.append(run_dir)
        checkpoint = run_dir / "checkpoints" / "float.ckpt"
        if not checkpoint.exists():
            checkpoint.parent.mkdir(parents=True)
            checkpoint.write_text(run_dir.name)
        points = [(0.5 + 0.01 * n, 50.0 + n, 500.0) for n in range(5)]
        summary_of(points).write(run_dir)
        return subprocess.CompletedProcess(command, status[0])

    monkeypatch.setattr(modes.subprocess, "run", pretend)
    arguments = ["--modes", "beyond", "paper", "--seeds", "0", "--trials", "5", "--folder", str(tmp_path)]
    assert modes.main([*arguments, "--replays", "0"]) == 0
    assert [path.name for path in called] == ["beyond_0", "paper_0"]
    assert (tmp_path / "paper_0/checkpoints/float.ckpt").read_text() == "beyond_0"
    before = json.loads((tmp_path / "paper_0/seconds.json").read_text())
    assert modes.main([*arguments, "--replays", "1", "--table"]) == 0
    assert len(called) == 2
    content = json.loads((tmp_path / "modes.json").read_text())
    assert [run["hypervolume"]["5"] for run in content["runs"]] == [content["runs"][0]["hypervolume"]["5"]] * 2
    status[0] = 1
    capsys.readouterr()
    assert modes.main(arguments) == 1
    assert "output.log" in capsys.readouterr().out
    with pytest.raises(BaqeError):
        modes.run("paper", 0, 5, tmp_path, [])
    assert json.loads((tmp_path / "paper_0/seconds.json").read_text()) > before


def test_nothing_to_show(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        modes.main(["--table", "--folder", str(tmp_path)])
