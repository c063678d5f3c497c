"""The benchmarks of searches: resumable, each figure from the rows alone, tables and figures written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from rich.console import Console

from lightning_baqe.benchmarks import problems, search
from lightning_baqe.benchmarks.loops import FUNCTIONS, evaluate, function_of, initial_points, reference_of, run
from lightning_baqe.benchmarks.search_runs import POOLLESS, SAMPLERS, replay
from lightning_baqe.benchmarks.search_tables import curves_of, runs_of, summarise
from lightning_baqe.benchmarks.setups import begin
from lightning_baqe.benchmarks.synthetic import BITS, Additive, problem_named
from lightning_baqe.errors import ConfigError
from lightning_baqe.files import Rows
from lightning_baqe.landscapes.measured import shipped
from lightning_baqe.search import hypervolume, pareto_mask
from lightning_baqe.search.evolution import crowding, evolve, survivors


@pytest.fixture(autouse=True)
def _quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def test_additive_problem_is_what_it_says() -> None:
    problem = Additive(layers=5, knobs=2)
    points = problem.candidates(40, np.random.default_rng(0))
    values = torch.tensor([problem.evaluate(point) for point in points], dtype=torch.float64)
    assert bool((values > 0).all())
    most = dict(points[0]) | {f"bits{layer:02d}": 8 for layer in range(5)}
    assert problem.evaluate(most)[2] == pytest.approx(1.0)
    for layer in range(5):  # more bits in one layer: less error, more bytes
        fewer = most | {f"bits{layer:02d}": BITS[0]}
        assert problem.evaluate(fewer)[0] > problem.evaluate(most)[0]
        assert problem.evaluate(fewer)[2] < problem.evaluate(most)[2]
    knob = most | {"knob00_0": 1 if most["knob00_0"] != 1 else 32}
    assert problem.evaluate(knob)[1] != problem.evaluate(most)[1]
    assert (problem.evaluate(knob)[0], problem.evaluate(knob)[2]) == (
        problem.evaluate(most)[0],
        problem.evaluate(most)[2],
    )
    with pytest.raises(ConfigError, match="layers=0"):
        Additive(layers=0)


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "qLogNEHVI"])
def test_a_replay_can_be_repeated(sampler: str) -> None:
    first, second = (replay("additive3x1", sampler, seed=1, trials=6, initial=4) for _ in range(2))
    assert first["values"] == second["values"]
    assert len(first["values"]) == len(first["propose_s"]) == len(first["seconds"]) == 6


@pytest.mark.parametrize("sampler", POOLLESS)
def test_samplers_without_a_pool_begin_in_it(sampler: str) -> None:
    problem = problem_named("additive3x1")
    pool = [list(problem.evaluate(point)) for point in problem.candidates(500, np.random.default_rng([2, 0]))]
    values = replay("additive3x1", sampler, seed=2, trials=4, initial=4)["values"]
    assert all(one in pool for one in values)
    assert values != replay("additive3x1", sampler, seed=3, trials=4, initial=4)["values"]


def test_noise_is_told_and_not_judged() -> None:
    name = shipped()[0]
    plain = replay(name, "random", seed=0, trials=3, initial=2)
    noisy = replay(name, "random", seed=0, trials=3, initial=2, noisy=True)
    assert noisy["values"] == plain["values"]  # random search asks for the same points, whatever it is told
    point = problem_named(name).candidates(1, np.random.default_rng(0))[0]
    true, told = (np.array(problem_named(name, seed).evaluate(point)) for seed in (None, 0))
    assert (true != told).tolist() == [True, True, False]  # size is exact
    with pytest.raises(ConfigError, match="made up and has no noise"):
        problem_named("additive3x1", 0)


def row(sampler: str, seed: int, values: list[list[float]]) -> dict[str, Any]:
    n = len(values)
    return {"problem": "p", "sampler": sampler, "seed": seed, "trials": n, "initial": 2, "values": values,
            "propose_s": [0.5] * n, "seconds": [10.0] * n}  # fmt: skip


def test_summary_by_hand() -> None:
    front = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    paper = [[1.0, 1.0], [0.0, 1.0], [1.0, 0.0]]
    chance = [[1.0, 1.0], [2.0, 2.0], [1.5, 0.5]]
    rows = [row("paper", seed, paper) for seed in range(6)] + [row("random", seed, chance) for seed in range(6)]
    rows.append(row("paper", 6, paper))  # without its partner
    runs = runs_of(rows, "p", 3, ["random", "paper"])
    curves = curves_of(runs, front, [2.0, 2.0], 20)
    assert curves.seeds == (0, 1, 2, 3, 4, 5)
    random, best = summarise(runs, curves, front, [2, 3])
    assert best["hypervolume"] == {2: [pytest.approx(2 / 3)] * 3, 3: [1.0] * 3}
    assert random["hypervolume"][3] == [pytest.approx(1.25 / 3)] * 3
    assert best["adrs"] == 0
    assert random["adrs"] == pytest.approx((1.0 + 0.5**0.5) / 2)  # of (1, 1) and (1.5, 0.5)
    assert (best["optimal"], random["optimal"], best["share"]) == (2, 0, 1.0)
    assert random["normalised_adrs"] is None  # the anchor's is 0
    assert (best["trials_to_target"], best["seconds_to_target"], best["reached"]) == (3, 31.5, 6)
    assert (random["trials_to_target"], random["reached"]) == (float("inf"), 0)
    assert random["against"]["paper"]["p"] == pytest.approx(2 / 64)
    assert random["against"]["paper"]["effect"] == -1.0
    with pytest.raises(ConfigError, match="no seed below 20"):
        curves_of(runs_of(rows, "p", 3, ["random", "TPE"]), front, [2.0, 2.0], 20)


def test_benchmark_search_goes_on_where_it_was_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--problem", "additive3x1", "--samplers", "random", "NSGA-II", "--trials", "6", "--initial", "3",
               "--jobs", "1", "--population", "20", "--generations", "5", "--folder", str(tmp_path)]  # fmt: skip
    search.main([*command, "--seeds", "1"])
    first = (tmp_path / "runs.jsonl").read_text()
    search.main([*command, "--seeds", "3"])
    assert (tmp_path / "runs.jsonl").read_text().startswith(first)
    assert len(Rows(tmp_path / "runs.jsonl").read()) == 6
    content = json.loads((tmp_path / "search_additive3x1.json").read_text())
    assert content["seeds"] == [0, 1, 2]
    assert [entry["sampler"] for entry in content["samplers"]] == ["random", "NSGA-II"]
    for name in ("search_additive3x1.png", "points_additive3x1.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "HV at 6" in capsys.readouterr().out


def test_a_folder_of_another_setup_is_refused(tmp_path: Path) -> None:
    begin(tmp_path, {"version": 1})
    begin(tmp_path, {"version": 1})
    with pytest.raises(ConfigError, match="version: 1 there, 2 here"):
        begin(tmp_path, {"version": 2})


def test_a_cut_off_row_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": ')
    rows = Rows(path)
    rows.append({"a": 2})
    assert Rows(path).read() == [{"a": 1}, {"a": 2}]


def test_evolution_finds_the_front_of_a_small_problem() -> None:
    problem = problem_named("additive3x0")
    points = problem.candidates(1000, np.random.default_rng(0))
    every = torch.tensor([problem.evaluate(point) for point in points], dtype=torch.float64)
    front = torch.unique(every[pareto_mask(every)], dim=0)
    found = evolve(problem.distributions, problem.evaluate, population=30, generations=20)
    torch.testing.assert_close(found, front)


def test_survivors_are_the_first_fronts_and_the_ends_of_the_last() -> None:
    values = torch.tensor([[0.0, 3.0], [1.0, 1.0], [3.0, 0.0], [0.9, 1.2], [4.0, 4.0]], dtype=torch.float64)
    assert set(survivors(values, 4).tolist()) == {0, 1, 2, 3}
    assert set(survivors(values, 2).tolist()) == {0, 2}
    assert crowding(values[:3]).isinf().tolist() == [True, False, True]


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_functions_carry_their_published_volume(name: str) -> None:
    function = function_of(name)
    y = evaluate(function, initial_points(function.dim, 64, seed=0))
    assert y.dtype == torch.float64
    assert 0 <= hypervolume(-y, reference_of(function)) <= function.max_hv * 1.001


@pytest.mark.parametrize("method", [pytest.param("botorch", marks=pytest.mark.slow), "beyond"])
def test_both_loops_start_from_the_same_points_and_can_be_repeated(method: str) -> None:
    function = function_of("DTLZ2")
    found = run(method, "DTLZ2", 3, 1)
    start = -evaluate(function, initial_points(function.dim, 14, seed=3))
    torch.testing.assert_close(torch.tensor(found["values"][:14], dtype=torch.float64), start)
    assert len(found["values"]) == 15
    assert run(method, "DTLZ2", 3, 1)["values"] == found["values"]


def test_ratio_of_the_problems_is_paired_by_seed() -> None:
    better, worse = [[0.0, 0.0]], [[0.5, 0.5]]
    rows = [
        {"problem": "DTLZ2", "method": method, "seed": seed, "evaluations": 1, "values": values, "propose_s": [1.0]}
        for seed in range(3)
        for method, values in (("beyond", better), ("botorch", worse))
    ]
    entry = problems.summarise(rows[:-1], "DTLZ2", 1, 20)
    assert entry["seeds"] == [0, 1]
    assert entry["ratio"] == pytest.approx(1.21 / 0.36)
    assert entry["within"]
    empty = problems.summarise([], "ZDT1", 1, 20)
    problems.print_summary(Console(), [entry, empty], 1)
    assert empty["seeds"] == []
