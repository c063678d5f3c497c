"""What outputs are scored by: the default accuracies against counting by hand, users' metrics against scikit-learn."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from sklearn.metrics import cohen_kappa_score, f1_score, r2_score, roc_auc_score
from torch import Tensor
from torchmetrics import classification

from lightning_baqe.errors import ConfigError
from lightning_baqe.tasks.scoring import Scorer, check_metric, default_metric, kind_of, metric_name

Batches = list[tuple[Tensor, Tensor]]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole(below: int, *shape: int, seed: int = 1) -> Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


def batches_of(outputs: Tensor, targets: Tensor, size: int = 7) -> Batches:
    """Batches whose images are what `predict` gives back."""
    return list(zip(outputs.split(size), targets.split(size), strict=True))


def predict(x: Tensor) -> Tensor:
    return x


def scored(outputs: Tensor, targets: Tensor, metric: Any = None, size: int = 7) -> float:
    batches = batches_of(outputs, targets, size)
    return Scorer.of(predict, batches, metric).score(predict, batches)


@pytest.mark.parametrize(
    ("outputs", "targets", "name", "right"),
    [
        (drawn(30, 5), whole(5, 30), "TopOneAccuracy(num_classes=5)", lambda o, y: o.argmax(1) == y),
        (drawn(30, 2), whole(2, 30).int(), "TopOneAccuracy(num_classes=2)", lambda o, y: o.argmax(1) == y),
        (drawn(30, 1), whole(2, 30), "BinaryAccuracy", lambda o, y: (o[:, 0] > 0) == y),
        (drawn(30), whole(2, 30).float(), "BinaryAccuracy", lambda o, y: (o > 0) == y),
        (drawn(30), whole(2, 30, 1), "BinaryAccuracy", lambda o, y: (o > 0) == y[:, 0]),
        (drawn(30, 1), whole(2, 30, 1).bool(), "BinaryAccuracy", lambda o, y: (o > 0) == y),
        (drawn(30, 1).sigmoid(), whole(2, 30), "BinaryAccuracy", lambda o, y: (o[:, 0] > 0.5) == y),
        (drawn(30, 4), whole(2, 30, 4).float(), "MultilabelAccuracy(num_labels=4)", lambda o, y: (o > 0) == y),
        (drawn(30, 4).sigmoid(), whole(2, 30, 4), "MultilabelAccuracy(num_labels=4)", lambda o, y: (o > 0.5) == y),
        (drawn(30, 3, 4, 5), whole(3, 30, 4, 5), "PixelAccuracy(num_classes=3)", lambda o, y: o.argmax(1) == y),
    ],
)  # fmt: skip
def test_defaults_count_what_is_right(
    outputs: Tensor, targets: Tensor, name: str, right: Callable[[Tensor, Tensor], Tensor]
) -> None:
    batches = batches_of(outputs, targets)
    scorer = Scorer.of(predict, batches)
    assert scorer.name == name
    counted = right(outputs, targets)
    assert scorer.score(predict, batches) == int(counted.sum()) / counted.numel()  # exactly, in double precision
    assert name in scorer.line
    assert f"outputs {tuple(batches[0][0].shape)}" in scorer.line


def test_logits_are_told_from_probabilities_once() -> None:
    outputs, targets = torch.tensor([0.3, 0.4, 0.2, -2.0]), torch.tensor([1, 1, 1, 0])
    assert scored(outputs, targets, size=1) == 1.0  # torchmetrics would take each of the first three for a probability
    assert scored(outputs, targets, classification.BinaryAccuracy(), size=1) == 1.0
    scorer = Scorer.of(predict, batches_of(outputs, targets))
    assert "logits with the threshold 0" in scorer.line
    assert scorer.score(predict, batches_of(outputs[:3], targets[:3])) == 1.0  # of another network, all within 0..1
    probable = Scorer.of(predict, batches_of(torch.tensor([0.7, 0.2]), torch.tensor([1, 0])))
    assert "probabilities with the threshold 0.5" in probable.line
    outputs, targets = torch.tensor([[0.2, 0.9, 0.8], [5.0, 3.0, 1.0], [0.9, 0.1, 0.2]]), torch.tensor([2, 1, 0])
    for size in (1, 3):
        found = scored(outputs, targets, classification.MulticlassAUROC(num_classes=3), size=size)
        assert found == pytest.approx(roc_auc_score(targets, outputs.softmax(1), multi_class="ovr"))
    # Quantized probabilities may end a step beyond 1.
    assert probable.score(predict, batches_of(torch.tensor([1.002, 0.2]), torch.tensor([1, 0]))) == 1.0


def test_users_metrics_are_those_of_scikit_learn() -> None:
    logits, binary = drawn(60, 1) * 20, whole(2, 60).float()  # float targets, as binary cross entropy wants them
    flat = logits[:, 0].numpy()
    assert scored(logits, binary, classification.BinaryF1Score()) == pytest.approx(f1_score(binary, flat > 0))
    assert scored(logits, binary, classification.BinaryAUROC()) == pytest.approx(roc_auc_score(binary, flat))
    outputs, classes = drawn(60, 4), whole(4, 60)
    macro = classification.MulticlassF1Score(num_classes=4, average="macro")
    assert scored(outputs, classes, macro) == pytest.approx(f1_score(classes, outputs.argmax(1), average="macro"))
    kappa = classification.MulticlassCohenKappa(num_classes=4)
    wanted = cohen_kappa_score(classes, outputs.argmax(1))
    assert scored(outputs, classes, kappa) == pytest.approx(wanted, abs=1e-6)
    values, found = drawn(60), (drawn(60) + 0.3 * drawn(60, seed=2))[:, None]
    assert scored(found, values, torchmetrics.R2Score(), size=1) == pytest.approx(r2_score(values, found[:, 0]))


def test_a_share_below_zero_is_kept() -> None:
    classes = torch.arange(12) % 3
    outputs = torch.nn.functional.one_hot((classes + 1) % 3, 3).float()
    assert scored(outputs, classes, classification.MulticlassCohenKappa(num_classes=3)) == pytest.approx(-0.5)


class Own(torchmetrics.Metric):
    """The mean probability of the right class."""

    higher_is_better = True

    def __init__(self, scale: float = 1.0, words: str = "") -> None:
        super().__init__()
        self.scale, self.words = scale, words
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("seen", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.total += outputs.softmax(1).gather(1, targets[:, None]).sum()
        self.seen += len(targets)

    def compute(self) -> Tensor:
        return self.scale * self.total / self.seen


def test_a_metric_of_ones_own_and_its_state() -> None:
    outputs, targets = drawn(30, 5), whole(5, 30)
    metric = Own()
    metric.update(drawn(9, 5, seed=5), whole(5, 9))  # of somebody's training
    before = metric.compute()
    wanted = np.mean(outputs.softmax(1)[torch.arange(30), targets].numpy())
    scorer = Scorer.of(predict, batches_of(outputs, targets), metric)
    for _ in range(2):
        assert scorer.score(predict, batches_of(outputs, targets)) == pytest.approx(float(wanted))
    assert metric.seen == 9
    assert torch.equal(metric.compute(), before)


def test_one_rank_evaluates_alone() -> None:
    options: dict[str, Any] = {"distributed_available_fn": lambda: True}  # there is no process group to wait for
    outputs, targets = drawn(30, 1), whole(2, 30)
    metric = classification.BinaryAccuracy(**options)
    wanted = float(((outputs[:, 0] > 0) == targets).float().mean())
    assert scored(outputs, targets, metric) == pytest.approx(wanted)
    assert metric.distributed_available_fn()


def test_names_tell_arguments_that_are_not_the_defaults() -> None:
    assert metric_name(Own()) == "Own"
    assert metric_name(Own(2.0, words="x")) == "Own(scale=2.0, words='x')"
    assert metric_name(classification.BinaryF1Score(threshold=0.4)) == "BinaryF1Score(threshold=0.4)"
    weighted = classification.MulticlassF1Score(num_classes=3, average="weighted")
    assert metric_name(weighted) == "MulticlassF1Score(num_classes=3, average='weighted')"


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (torchmetrics.MeanSquaredError(), "MeanSquaredError: lower is better.*R2Score"),
        (classification.BinaryHammingDistance(), "BinaryHammingDistance: lower is better"),
        (classification.MulticlassConfusionMatrix(num_classes=3), "MulticlassConfusionMatrix.*does not say"),
        (1 - classification.BinaryHammingDistance(), "CompositionalMetric.*: does not say whether higher is better"),
        (torchmetrics.MetricCollection([classification.BinaryAccuracy()]), "metric is a MetricCollection"),
        (classification.BinaryAccuracy, "the class BinaryAccuracy"),
        (lambda outputs, targets: 1.0, "metric is a function"),
        ("accuracy", "metric is a str"),
    ],
)
def test_what_is_refused_before_there_are_data(metric: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_metric(metric)


class Percent(Own):
    plot_upper_bound = 100.0


def test_bounds_above_one_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"Percent\(scale=100.0\) has the upper bound plot_upper_bound = 100"):
        check_metric(Percent(100.0))
    with pytest.raises(ConfigError, match=r"Own\(scale=100.0\) is [\d.]+; .*scaled to at most 1"):
        scored(drawn(8, 3), whole(3, 8), Own(100.0))


class Fidelity(torchmetrics.image.PeakSignalNoiseRatio):
    """Of docs/search.md."""

    plot_upper_bound = 1.0

    def compute(self) -> Tensor:
        return (super().compute() / 60).clamp(max=1)


def test_a_scaled_metric_of_images() -> None:
    images, noise = drawn(14, 3, 8, 8), 0.1 * drawn(14, 3, 8, 8, seed=2)
    wanted = 10 * float((1 / noise.square().mean()).log10()) / 60
    assert scored(images + noise, images, Fidelity(data_range=1.0)) == pytest.approx(wanted, rel=1e-5)
    assert scored(images, images, Fidelity(data_range=1.0)) == 1
    with pytest.raises(ConfigError, match=r"PeakSignalNoiseRatio.* is [\d.]+; .*scaled to at most 1"):
        scored(images + noise, images, torchmetrics.image.PeakSignalNoiseRatio(data_range=1.0))


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (classification.MulticlassAccuracy(num_classes=3, average=None), r"MulticlassAccuracy.* gives a tensor \(3,\)"),
        (classification.MulticlassAccuracy(num_classes=4), r"num_classes=4\) does not take outputs \(7, 3\)"),
        (classification.BinaryAccuracy(), r"BinaryAccuracy does not take outputs \(7, 3\) and targets int64 \(7,\)"),
        (classification.MulticlassROC(num_classes=3), "MulticlassROC.*does not say"),
    ],
)
def test_what_is_refused_on_the_first_batch(metric: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        scored(drawn(21, 3), whole(3, 21), metric)


@pytest.mark.parametrize(
    ("outputs", "targets"),
    [
        (drawn(9, 3), drawn(9)),
        (drawn(9, 1), drawn(9)),  # regression
        (drawn(9, 1), whole(5, 9) + 2),
        (drawn(9, 3), drawn(9, 3).softmax(1)),
        (drawn(9, 3), whole(2, 9, 4)),
        (drawn(9, 3), whole(3, 9, 1)),
        (drawn(9, 3, 4), whole(3, 9, 4)),
        (drawn(9, 1, 4, 4), whole(2, 9, 4, 4)),
        (drawn(9, 3, 4, 4), whole(3, 9, 2, 2)),
    ],
)
def test_other_shapes_need_a_metric(outputs: Tensor, targets: Tensor) -> None:
    with pytest.raises(ConfigError) as error:
        default_metric(outputs, targets)
    for part in (str(tuple(outputs.shape)), str(tuple(targets.shape)), "Give metric="):
        assert part in str(error.value)


def test_one_hot_targets_may_be_classes() -> None:
    outputs, targets = drawn(9, 3), torch.nn.functional.one_hot(whole(3, 9), 3)
    with pytest.raises(ConfigError, match=r"exactly one 1.*class indices"):
        default_metric(outputs, targets)
    found = scored(outputs, targets, classification.MultilabelAccuracy(num_labels=3, average="micro"))
    assert found == pytest.approx(float(((outputs > 0) == targets).float().mean()))


def test_masks_of_one_channel_meet_their_targets() -> None:
    outputs, targets = drawn(9, 1, 4, 4), whole(2, 9, 4, 4)
    assert kind_of(outputs, targets) == "labels"
    union = ((outputs[:, 0] > 0) | (targets > 0)).sum()
    wanted = float(((outputs[:, 0] > 0) & (targets > 0)).sum() / union)
    assert scored(outputs, targets, classification.BinaryJaccardIndex()) == pytest.approx(wanted)


def test_accuracy_needs_images_and_finite_numbers() -> None:
    with pytest.raises(ConfigError, match="at least one image"):
        Scorer.of(predict, [])
    with pytest.raises(ConfigError, match="Own is nan on 4 images"):
        scored(torch.full((4, 2), torch.nan), whole(2, 4), Own())
    with pytest.raises(ConfigError, match="gives a tuple"):
        Scorer.of(lambda x: (x,), batches_of(drawn(4, 2), whole(2, 4)))


def test_a_metric_may_need_more_than_one_batch() -> None:
    """Of the first batch it knows one class, or too few values: neither a refusal nor a warning of ours."""
    logits, targets = drawn(20), torch.arange(20) // 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = scored(logits, targets, classification.BinaryAUROC(), size=10)
    assert found == pytest.approx(roc_auc_score(targets, logits))
