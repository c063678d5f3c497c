"""Searches over networks whose outputs are no class logits, and with metrics of the user's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from fake_device import FakeDevice
from foreign_module import ForeignModule, SmallResNet
from sklearn.metrics import f1_score
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import classification

import lightning_baqe as baqe
from lightning_baqe.errors import ConfigError
from lightning_baqe.runs.summary import Summary

Make = Callable[..., Any]
SMALL: dict[str, Any] = {"trials": 1, "n_initial": 1, "bit_choices": (4, 8)}


class PerPixel(nn.Module):
    """``(n, 3, h, w)`` to logits ``(n, classes, h, w)``."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.first, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()
        self.second, self.last = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.relu(self.second(self.relu(self.first(x)))))


class Squashed(SmallResNet):
    """Ends in a sigmoid."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(super().forward(x))


class Module(ForeignModule):
    """Somebody's module of another task."""

    def __init__(self, network: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.loss, self.steps = nn.ModuleDict({"classifier": network}), loss, 0

    def training_step(self, batch: Any, index: int) -> Tensor:
        self.steps += 1
        return self.loss(self.body.classifier(batch[0]), batch[1])

    def validation_step(self, batch: Any, index: int) -> None:
        pass


def images(count: int = 64) -> tuple[Tensor, Tensor]:
    """Noise of one of four levels, the same in a half of each image, and the levels."""
    generator = torch.Generator().manual_seed(0)
    levels = torch.arange(count) % 4
    return torch.randn(count, 3, 16, 16, generator=generator) * 0.3 + levels.view(-1, 1, 1, 1) - 1.5, levels


def trained(network: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Module:
    torch.manual_seed(0)
    for layer in network.train().modules():
        if isinstance(layer, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            layer.reset_parameters()
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        loss(network(x), y).backward()
        optimizer.step()
    return Module(network, loss)


def loaders(x: Tensor, y: Tensor, size: int = 16) -> tuple[DataLoader[Any], DataLoader[Any]]:
    data = TensorDataset(x, y)
    return DataLoader(data, size), DataLoader(data, size)


def front_outputs(folder: Path, x: Tensor) -> list[tuple[float, Tensor]]:
    """Of every point its accuracy in the summary, and the outputs of its integer graph."""
    points = list(baqe.Front.load(folder))
    assert points
    return [(point.accuracy, baqe.Artifact.load_graph(point.artifact_path).run(x)) for point in points]


def one_logit(logits: Tensor, y: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(logits.squeeze(1), y.float())


def one_probability(found: Tensor, y: Tensor) -> Tensor:
    return functional.binary_cross_entropy(found.squeeze(1).clamp(0, 1), y.float())  # quantized: a step beyond


X, LEVELS = images()
BRIGHT = (LEVELS > 1).long()
LABELS = torch.stack([LEVELS > 0, LEVELS > 1, LEVELS % 2 == 0], 1).float()
HALVES = (X.mean(1) > 0).long()


@pytest.mark.parametrize(
    ("network", "loss", "targets", "metric", "right"),
    [
        (SmallResNet(classes=1), one_logit, BRIGHT, "BinaryAccuracy", lambda o, y: (o[:, 0] > 0) == y),
        (SmallResNet(classes=1), one_logit, BRIGHT.float(), "BinaryAccuracy", lambda o, y: (o[:, 0] > 0) == y),
        (Squashed(classes=1), one_probability, BRIGHT, "BinaryAccuracy", lambda o, y: (o[:, 0] > 0.5) == y),
        (
            SmallResNet(classes=3), functional.binary_cross_entropy_with_logits, LABELS,
            "MultilabelAccuracy(num_labels=3)", lambda o, y: (o > 0) == y,
        ),
        (
            PerPixel(2), functional.cross_entropy, HALVES,
            "PixelAccuracy(num_classes=2)", lambda o, y: o.argmax(1) == y,
        ),
    ],
    ids=["one logit", "float targets", "one probability", "labels", "pixels"],
)  # fmt: skip
@pytest.mark.parametrize("mode", ["paper", "beyond"])
def test_the_accuracy_is_what_outputs_and_targets_call_for(
    network: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    targets: Tensor,
    metric: str,
    right: Callable[[Tensor, Tensor], Tensor],
    mode: str,
    tmp_path: Path,
    search: Make,
    fit: Make,
    made_up_device: FakeDevice,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = trained(network, loss, X, targets)
    fit(module, search(measure_on=made_up_device, mode=mode, example_input=X[:1], **SMALL), loaders(X, targets))
    summary = Summary.load(tmp_path / "run")
    assert [entry.state for entry in summary.entries] == ["complete"] * 2
    assert (summary.metric, summary.measure) == (metric, "accuracy")
    with torch.no_grad():
        wanted = right(network.eval()(X), targets).double().mean()
    assert summary.reference is not None
    assert summary.reference.accuracy == pytest.approx(float(wanted))
    assert wanted > 0.9
    for accuracy, outputs in front_outputs(tmp_path / "run", X):
        assert accuracy == pytest.approx(float(right(outputs, targets).double().mean()))
    # Fake-quantized and deployed networks are scored alike.
    assert all(abs(entry.accuracy - (entry.fake_quant_accuracy or 0)) < 0.05 for entry in summary.complete)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("accuracy is ")]
    assert metric in line


def test_a_search_by_a_metric_of_the_users(
    tmp_path: Path, search: Make, fit: Make, made_up_device: FakeDevice, digits: Any, foreign: Make
) -> None:
    metric = classification.MulticlassF1Score(num_classes=10, average="macro")
    fit(foreign(), search(measure_on=made_up_device, metric=metric, **SMALL), digits)
    assert metric.update_count == 0
    summary = Summary.load(tmp_path / "run")
    assert (summary.metric, summary.measure) == ("MulticlassF1Score(num_classes=10)", "MulticlassF1Score")
    for loader, name in ((digits.val_dataloader(), "accuracy"), (digits.test_dataloader(), "test_accuracy")):
        x, y = (torch.cat(tensors) for tensors in zip(*loader, strict=True))
        for entry in summary.pareto:
            graph = baqe.Artifact.load_graph(tmp_path / "run" / "artifacts" / entry.key)
            wanted = f1_score(y, graph.run(x).argmax(1), average="macro")
            assert getattr(entry, name) == pytest.approx(wanted)
    report = (tmp_path / "run" / "report.html").read_text()
    assert "MulticlassF1Score over latency" in report
    assert "test MulticlassF1Score" in report
    headers = [column.header for column in baqe.Front.load(tmp_path / "run").table().columns]
    assert "MulticlassF1Score" in headers
    assert baqe.Front.load(tmp_path / "run").select_point(accuracy=0.01).accuracy > 0

    other = classification.MulticlassF1Score(num_classes=10, average="weighted")
    with pytest.raises(ConfigError, match=r"metric = 'MulticlassF1Score\(num_classes=10\)', now it is .*weighted"):
        fit(foreign(), search(measure_on=made_up_device, metric=other, **SMALL), digits)


def test_a_regression_by_its_r2(tmp_path: Path, search: Make, fit: Make, made_up_device: FakeDevice) -> None:
    values = X.mean((1, 2, 3)) * 3 + 1

    def loss(found: Tensor, y: Tensor) -> Tensor:
        return functional.mse_loss(found.squeeze(1), y)

    network = SmallResNet(classes=1)
    module = trained(network, loss, X, values)
    options = {**SMALL, "mode": "beyond", "metric": torchmetrics.R2Score(), "example_input": X[:1]}
    fit(module, search(measure_on=made_up_device, **options), loaders(X, values))
    summary = Summary.load(tmp_path / "run")
    for entry in summary.pareto:
        found = baqe.Artifact.load_graph(tmp_path / "run" / "artifacts" / entry.key).run(X)[:, 0]
        wanted = 1 - float(((found - values) ** 2).sum() / ((values - values.mean()) ** 2).sum())
        assert entry.accuracy == pytest.approx(wanted, abs=1e-4)
        assert 0.5 < wanted < 1


@pytest.mark.parametrize(
    ("options", "targets", "message"),
    [
        ({"metric": classification.MulticlassAccuracy(num_classes=10, average=None)}, LEVELS, "gives a tensor"),
        ({"metric": classification.BinaryAccuracy()}, LEVELS, "BinaryAccuracy does not take outputs"),
        ({}, LEVELS.float() / 2, r"outputs \(16, 10\) and targets float32 \(16,\): it is not known"),
    ],
    ids=["one number for each class", "other outputs", "no default"],
)
def test_what_cannot_be_scored_is_refused_before_any_training(
    options: dict[str, Any],
    targets: Tensor,
    message: str,
    tmp_path: Path,
    search: Make,
    fit: Make,
    made_up_device: FakeDevice,
) -> None:
    module = Module(SmallResNet(), functional.cross_entropy)
    with pytest.raises(ConfigError, match=message):
        fit(module, search(measure_on=made_up_device, example_input=X[:1], **options, **SMALL), loaders(X, targets))
    assert module.steps == 0
    assert made_up_device.kernels == made_up_device.networks == []
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_metric_that_no_data_can_save_is_refused_at_once(search: Make) -> None:
    with pytest.raises(ConfigError, match="MeanSquaredError: lower is better"):
        search(metric=torchmetrics.MeanSquaredError())


def test_a_study_of_before_there_was_a_choice_goes_on(
    tmp_path: Path, search: Make, fit: Make, made_up_device: FakeDevice, foreign: Make, digits: Any
) -> None:
    fit(foreign(), search(measure_on=made_up_device, **SMALL), digits)
    import optuna

    study = optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path / 'run' / 'study.db'}")
    conditions = study.user_attrs["conditions"]
    assert conditions["metric"] is None
    study.set_user_attr("conditions", {name: value for name, value in conditions.items() if name != "metric"})
    fit(foreign(), search(measure_on=made_up_device, **{**SMALL, "trials": 2}), digits)
    found = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert found["metric"] == "TopOneAccuracy(num_classes=10)"
    assert [entry["state"] for entry in found["trials"]] == ["complete"] * 2
