"""``python -m lightning_baqe.benchmarks.landscape`` in its smallest form: four layers and made-up latencies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_device import FakeDevice
from smallest import SmallestNet

import lightning_baqe as baqe
from lightning_baqe.benchmarks import accuracy_rows, landscape, landscape_accuracy
from lightning_baqe.benchmarks.landscape_accuracy import Trial, bit_configs, searched_layers, wanted_rows, with_bits
from lightning_baqe.deploy.artifact import Artifact
from lightning_baqe.landscapes import latency_tables as landscape_latency
from lightning_baqe.landscapes import measured as landscapes
from lightning_baqe.landscapes.measured import Landscape, read_record
from lightning_baqe.search.knowledge import BoundKnowledge, Sum
from lightning_baqe.search.space import SearchSpace
from lightning_baqe.train import compose

SMALLEST = Trial(2, 8, 16, 16, 16, calibration_batches=1, float_sizes=accuracy_rows.SMALLEST)
ARGUMENTS = ["--network", "resnet18", "--configs", "5", "--tiles", "2", "--points", "5"]


class Board(FakeDevice):
    """No two measurements of a network agree."""

    def network_us(self, artifact: Artifact) -> float:
        return 50.0 + len(self.networks)


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Board]:
    for module in (accuracy_rows, landscapes):
        monkeypatch.setattr(module, "network", lambda name, classes, **model: SmallestNet(classes))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings = landscape_accuracy.SETTINGS["glyphs"]["resnet18"].with_epochs(1, 1)
    monkeypatch.setitem(landscape_accuracy.SETTINGS["glyphs"], "resnet18", settings)
    threads = torch.get_num_threads()
    yield Board(tmp_path / "none.db")
    torch.set_num_threads(threads)


def run(board: Board, folder: Path, *more: str) -> None:
    assert landscape.main([*ARGUMENTS, "--folder", str(folder), *more], board, SMALLEST) == 0


def test_everything_is_measured_once_and_any_point_is_answered(
    board: Board, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "landscape"
    run(board, folder, "--stages", "accuracy", "--share", "0/2")
    rows = (folder / "rows.jsonl").read_text().splitlines()
    run(board, folder)
    again = (folder / "rows.jsonl").read_text().splitlines()
    assert again[: len(rows)] == rows
    assert 0 < len(rows) < len(again) == 5 + len(landscape_accuracy.REPEATED) * landscape_accuracy.REPEATS
    assert len(board.kernels) > 20
    assert (
        1 + 4 <= len(board.networks) <= 1 + 5 + 5
    )  # the float network and twice each point, of which two may be equal

    before = (len(board.kernels), len(board.networks))
    first = (folder / "resnet18_glyphs.json.gz").read_bytes()
    run(board, folder)
    assert (len(board.kernels), len(board.networks)) == before
    assert (folder / "resnet18_glyphs.json.gz").read_bytes() == first
    printed = capsys.readouterr().out
    assert "corrections fitted to others" in printed
    assert "held-out predictions of 6 bit-configs" in printed

    found = Landscape.load(folder / "resnet18_glyphs.json.gz")
    check_any_point(found)
    check_sizes(found, folder)
    for row in map(json.loads, again):
        params = found.candidates(1, np.random.default_rng(0))[0]
        params.update({f"{layer}/bits": width for layer, width in row["bits"].items()})
        assert found.size_bytes(params) == row["size_bytes"]


def check_any_point(found: Landscape) -> None:
    space = SearchSpace(found.distributions)
    rng = np.random.default_rng(0)
    anywhere = [space.external(row) for row in space.from_unit(rng.random((20, len(space.names))))]
    points = [*found.candidates(10, rng), *anywhere]
    for point in points:
        values = found.evaluate(point)
        assert values == found.evaluate(dict(reversed(point.items())))
        assert len(values) == len(found.objectives) == len(found.reference_point) == 3
        assert all(np.isfinite(value) and value > 0 for value in values)
        assert found.seconds(point) > 0
        bits, schedules = found.space.point(point)
        kernels = sum(
            found.kernel_latency_us(layer, bits[layer].activation, schedules[layer]) for layer in found.space.defaults
        )
        assert found.parts(point)[0] == pytest.approx(kernels)
        assert all(found.kernel_seconds(layer, bits[layer].activation) > 0 for layer in found.space.defaults)


def check_sizes(found: Landscape, folder: Path) -> None:
    net, images = SmallestNet(62).eval(), torch.rand(2, 3, 32, 32)
    base = baqe.BitConfig.uniform(net, 8, 8)
    reference = read_record(folder / "resnet18_glyphs.json.gz")["reference"]
    rng = np.random.default_rng(3)
    for point in found.candidates(4, rng):
        bits = with_bits(base, {layer: point[f"{layer}/bits"] for layer in searched_layers(base)})
        graph = baqe.lower(baqe.calibrate(baqe.quantize(net, bits, images), [images]))
        assert found.size_bytes(point) == graph.size_bytes
        assert found.size(point) == graph.size_bytes / reference["size_bytes"]


def test_a_trial_is_the_recipes() -> None:
    cfg, trial = compose(["recipe=qat_search", "data=glyphs", *landscape_accuracy.OPTIONS]), Trial()
    assert (cfg.search.steps_per_trial, cfg.search.epochs_per_trial) == (trial.steps, 1)
    assert cfg.search.calibration_batches == trial.calibration_batches
    assert cfg.search.activation_range == trial.activation_range
    assert (cfg.task.learning_rate, cfg.task.weight_decay) == (trial.learning_rate, trial.weight_decay)
    assert (cfg.task.optimizer, cfg.task.scheduler, cfg.task.label_smoothing) == ("adamw", "none", 0.0)
    data = trial.data()
    assert {"train": cfg.data.train_size, "val": cfg.data.val_size, "test": cfg.data.test_size} == data.sizes
    assert (cfg.data.batch_size, cfg.data.seed) == (data.batch_size, data.seed)


def test_more_bit_configs_begin_with_the_same() -> None:
    base = baqe.BitConfig.uniform(SmallestNet(10), 8, 8)
    few, many = (bit_configs(base, n) for n in (10, 20))
    assert many[:10] == few
    assert len({tuple(bits.items()) for bits in many}) == 20
    numbers = [number for number, _ in wanted_rows(base, 20)]
    assert len(set(numbers)) == len(numbers) == 20 + len(landscape_accuracy.REPEATED) * landscape_accuracy.REPEATS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--share", "2/2"], "a share is k/m"),
        (["--tiles", "0"], "--tiles is at least 1"),
        (["--network", "lenet"], "invalid choice"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        landscape.main(arguments)
    assert message in capsys.readouterr().err


def test_a_table_wants_measurements(board: Board, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "empty"
    assert landscape.main([*ARGUMENTS, "--folder", str(folder), "--stages", "table"], board, SMALLEST) == 1
    assert "run the latency stage" in capsys.readouterr().out.replace("\n", " ")


def test_a_correction_is_checked_on_other_networks() -> None:
    rng = np.random.default_rng(0)
    parts = rng.uniform((10, 10, 1, 1), (100, 100, 20, 40), (60, 4))
    truth = landscape_latency.Correction((20.0, 1.0, 1.0, 3.0, 0.5, 1.0), 16.0)
    measured = truth.apply(parts)
    found = landscape_latency.fit_correction(parts, measured)
    assert found.cached_mb == 16.0
    assert found.factors == pytest.approx(truth.factors, rel=1e-6)
    assert landscape_latency.Correction.from_record(json.loads(json.dumps(found.record()))) == found
    check = landscape_latency.check_latency(parts, measured)
    assert check["corrected"]["largest_relative_error"] < 1e-6
    assert check["sum"]["mean_relative_error"] > 0.1


@pytest.mark.parametrize("bit_choices", [(4, 8), (4, 8, 32)])
def test_knowledge_of_a_shipped_landscape_leads_to_good_points(bit_choices: tuple[int, ...]) -> None:
    shipped = Landscape.load(landscapes.shipped()[0], bit_choices)
    space, knowledge = SearchSpace(shipped.distributions), shipped.knowledge()
    bound = BoundKnowledge(knowledge, space)
    size = knowledge.objectives[2]
    assert isinstance(size, Sum)
    assert size.kind == ("estimate" if 32 in bit_choices else "exact")
    rows = np.array([space.internal(point) for point in shipped.candidates(30, np.random.default_rng(0))])
    better = bound.improved(rows)
    sums = bound.estimates(better).numpy()
    found = np.array([shipped.evaluate(space.external(row)) for row in better])
    plain = np.array([shipped.evaluate(space.external(row)) for row in rows])
    assert np.allclose(sums[:, 2], found[:, 2], atol=1e-3)
    assert found[:, 1].mean() < plain[:, 1].mean()
    if 32 in bit_choices:
        assert np.corrcoef(sums[:, 1], found[:, 1])[0, 1] > 0.9
    assert shipped.preparation_s() > 0
