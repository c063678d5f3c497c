"""The landscapes that come with the package."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.samplers import TPESampler

import lightning_baqe as baqe
from lightning_baqe.benchmarks.landscape_accuracy import searched_layers, with_bits
from lightning_baqe.errors import ConfigError, DataError
from lightning_baqe.landscapes.measured import FOLDER, Landscape, read_record, shipped
from lightning_baqe.landscapes.problem import Problem
from lightning_baqe.search.pool import breed
from lightning_baqe.search.space import SearchSpace
from lightning_baqe.tasks.networks import network

LANDSCAPES = shipped()


@pytest.fixture(scope="module", params=LANDSCAPES)
def landscape(request: pytest.FixtureRequest) -> Landscape:
    return Landscape.load(request.param)


def points_of(landscape: Landscape, n: int = 10) -> list[dict[str, Any]]:
    """Candidates, uniform points, and children of both."""
    rng, space = np.random.default_rng(0), SearchSpace(landscape.distributions)
    rows = np.concatenate(
        [
            np.array([space.internal(point) for point in landscape.candidates(n, rng)]),
            space.from_unit(rng.random((n, len(space.names)))),
        ]
    )
    return [space.external(row) for row in np.concatenate([rows, breed(space, rows, n, rng)])]


def test_two_networks_are_shipped_with_their_origin() -> None:
    assert {"resnet18_glyphs", "mobilenet_v2_glyphs"} <= set(LANDSCAPES)
    for name in LANDSCAPES:
        about = read_record(name)["about"]
        assert about["device"]["cpu"]
        assert about["versions"]["apache-tvm"]
        assert about["command"].startswith("python -m lightning_baqe.benchmarks.landscape")
        assert about["latency_check"]["networks"] >= 40
        assert about["latency_check"]["corrected"]["spearman"] > 0.9


def test_any_point_is_answered_and_always_the_same(landscape: Landscape) -> None:
    problem: Problem = landscape
    again = Landscape.load(landscape.name)
    for point in points_of(landscape):
        values = problem.evaluate(point)
        assert again.evaluate(point) == values
        assert len(values) == len(problem.objectives) == len(problem.reference_point)
        assert 0 < values[0] < 1
        assert all(value > 0 for value in values)
        assert problem.seconds(point) > 1
        assert landscape.size(point) == values[2]


def test_samplers_that_breed_find_their_way(landscape: Landscape) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(directions=["minimize"] * 3, sampler=TPESampler(seed=0, n_startup_trials=5))
    for _ in range(8):
        trial = study.ask(dict(landscape.distributions))
        study.tell(trial, landscape.evaluate(trial.params))
    assert len(study.get_trials(states=[optuna.trial.TrialState.COMPLETE])) == 8


@pytest.mark.filterwarnings("ignore:8 bits lose")  # random weights let signals vanish
def test_sizes_are_those_of_lowered_networks(landscape: Landscape) -> None:
    record = read_record(landscape.name)
    torch.manual_seed(0)
    net = network(record["network"], record["num_classes"]).eval()
    images = torch.rand(2, *record["input_shape"])
    base = baqe.BitConfig.uniform(net, 8, 8)
    for point in landscape.candidates(3, np.random.default_rng(1)):
        bits = with_bits(base, {layer: point[f"{layer}/bits"] for layer in searched_layers(base)})
        graph = baqe.lower(baqe.calibrate(baqe.quantize(net, bits, images), [images]))
        assert landscape.size_bytes(point) == graph.size_bytes


def test_bits_change_size_and_knobs_only_latency(landscape: Landscape) -> None:
    (point,) = landscape.candidates(1, np.random.default_rng(2))
    layer = next(layer for layer in landscape.space.bit_choices if layer in landscape.space.knobs)
    narrow, wide = ({**point, f"{layer}/bits": bits} for bits in (4, 32))
    assert landscape.size(narrow) < landscape.size(wide)
    knobs = landscape.space.knobs[layer]
    others = [{**point, f"{layer}/{knob}": value} for knob, values in knobs.items() for value in values]
    assert {landscape.error(other) for other in others} == {landscape.error(point)}
    assert {landscape.size(other) for other in others} == {landscape.size(point)}
    assert len({landscape.latency_us(other) for other in others}) > 1


def test_latency_is_the_sum_of_its_kernels(landscape: Landscape) -> None:
    for point in points_of(landscape, 3):
        bits, schedules = landscape.space.point(point)
        kernels = [
            landscape.kernel_latency_us(layer, bits[layer].activation, schedules[layer])
            for layer in landscape.space.defaults
        ]
        assert landscape.parts(point)[0] == pytest.approx(sum(kernels))
        assert landscape.kernel_seconds(next(iter(bits)), 8) > 0


def test_best_known_knobs_are_better_than_random_ones(landscape: Landscape) -> None:
    rng = np.random.default_rng(4)
    for width in (4, 8, 32):
        best, drawn = 0.0, np.zeros(20)
        for layer in landscape.space.bit_choices:
            knobs = landscape.space.knobs.get(layer, {})
            best += landscape.kernel_latency_us(layer, width, landscape.space.defaults[layer][width])
            for index in range(len(drawn)):
                one = {knob: values[rng.integers(len(values))] for knob, values in knobs.items()}
                drawn[index] += landscape.kernel_latency_us(layer, width, one)
        assert best < np.median(drawn)


def test_noise_follows_from_seed_and_point() -> None:
    plain, first, same, other = (Landscape.load(LANDSCAPES[0], noise_seed=seed) for seed in (None, 1, 1, 2))
    points = points_of(plain, 3)
    assert [first.evaluate(point) for point in points] == [same.evaluate(point) for point in points]
    for point in points:
        assert len({landscape.evaluate(point)[1] for landscape in (plain, first, other)}) == 3
        assert plain.evaluate(point)[2] == first.evaluate(point)[2]


def test_fewer_bits_can_be_offered() -> None:
    found = Landscape.load(LANDSCAPES[0], bit_choices=(4, 8, 32))
    assert {found.distributions[f"{layer}/bits"].choices for layer in found.space.bit_choices} == {(4, 8, 32)}  # type: ignore[attr-defined]
    for point in points_of(found, 3):
        assert found.evaluate(point) == Landscape.load(LANDSCAPES[0]).evaluate(point)
    with pytest.raises(ConfigError, match=r"measured without \[3\]"):
        Landscape.load(LANDSCAPES[0], bit_choices=(3, 8))


def test_what_was_not_measured_is_refused(landscape: Landscape) -> None:
    (point,) = landscape.candidates(1, np.random.default_rng(0))
    layer, knobs = next(iter(landscape.space.knobs.items()))
    with pytest.raises(ConfigError, match="measured were"):
        landscape.evaluate({**point, f"{next(iter(landscape.space.bit_choices))}/bits": 3})
    with pytest.raises(ConfigError, match="measured were"):
        landscape.latency_us({**point, f"{layer}/tile": "0x0x0"})
    with pytest.raises(ConfigError, match="the point lacks"):
        landscape.latency_us({name: value for name, value in point.items() if name != f"{layer}/{next(iter(knobs))}"})
    with pytest.raises(ConfigError, match="has no layer 'nowhere'"):
        landscape.kernel_latency_us("nowhere", 8, {})
    with pytest.raises(ConfigError, match="was measured at"):
        landscape.kernel_seconds(layer, 3)


def test_unknown_landscapes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no landscape 'nothing'"):
        Landscape.load("nothing")
    path = tmp_path / "old.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"format": 0}).encode()))
    with pytest.raises(DataError, match="has format 0"):
        Landscape.load(path)


def test_they_are_small() -> None:
    assert sum(len(file.read_bytes()) for file in FOLDER.iterdir()) < 2**20
