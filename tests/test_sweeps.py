"""W&B sweep files: what W&B accepts, and command lines that Hydra composes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from lightning_baqe.train import compose, open_run, recipe_groups

FILES = sorted((Path(__file__).parent.parent / "recipes" / "sweeps").glob("*.yaml"))
KEYS = {"program", "name", "description", "method", "metric", "parameters", "command", "run_cap", "early_terminate"}
DISTRIBUTIONS = {"uniform", "log_uniform_values", "int_uniform", "q_uniform", "categorical", "normal"}
# Named by a sweep, logged by a test of its own.
METRICS = {"search/hypervolume", "val/acc"}


def values_of(parameter: dict[str, Any]) -> list[Any]:
    """Every value of a discrete parameter, both ends of a continuous one."""
    if "value" in parameter:
        return [parameter["value"]]
    return list(parameter.get("values") or [parameter["min"], parameter["max"]])


def command_lines(sweep: dict[str, Any]) -> list[list[str]]:
    """What agents start, but for the program and what starts it; composed by W&B's own code."""
    names = list(sweep["parameters"])
    found = []
    for values in itertools.product(*(values_of(sweep["parameters"][name]) for name in names)):
        run = {"args": {name: {"value": value} for name, value in zip(names, values, strict=True)}}
        filled = create_sweep_command_args(run)
        command = create_sweep_command(list(sweep["command"]))
        assert command[:3] == ["${env}", "${interpreter}", "${program}"]
        (macro,) = command[3:]
        found.append(filled[macro.removeprefix("${").removesuffix("}")])
    return found


def test_there_are_some() -> None:
    assert FILES
    assert "sweeps" not in recipe_groups()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_sweeps_are_what_wandb_accepts(path: Path) -> None:
    sweep = yaml.safe_load(path.read_text())
    assert set(sweep) <= KEYS
    assert sweep["program"] == "train.py"
    assert sweep["method"] in ("grid", "random", "bayes")
    assert sweep["metric"]["goal"] in ("minimize", "maximize")
    assert sweep["metric"]["name"] in METRICS
    for name, parameter in sweep["parameters"].items():
        kinds = {"value", "values", "min"} & set(parameter)
        assert len(kinds) == 1, name
        assert set(parameter) <= {"value", "values", "min", "max", "distribution"}
        assert ("min" in parameter) == ("max" in parameter)
        assert parameter.get("distribution", "uniform") in DISTRIBUTIONS
        assert sweep["method"] != "grid" or "min" not in parameter  # W&B refuses a grid over an interval


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_command_lines_compose(path: Path) -> None:
    sweep = yaml.safe_load(path.read_text())
    lines = command_lines(sweep)
    assert len({tuple(line) for line in lines}) == len(lines)
    for line in lines[:3] + lines[-3:]:
        cfg = compose(line)
        assert cfg.logger._target_.endswith("WandbLogger")


def test_workers_of_one_sweep_may_share_a_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (path,) = [path for path in FILES if path.stem == "workers"]
    folders = {open_run(compose(line)) for line in command_lines(yaml.safe_load(path.read_text()))}
    assert len(folders) == 1


def test_runs_that_begin_in_one_second_have_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [open_run(compose(["recipe=qat", f"seed={seed}"])) for seed in range(3)]
    assert len(set(folders)) == 3
