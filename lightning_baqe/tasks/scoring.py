"""How good a network's outputs are: a torchmetrics metric, by default the accuracy that their shapes call for.

| outputs                  | targets                                | default                           |
| ------------------------ | -------------------------------------- | --------------------------------- |
| ``(n, classes)``         | class indices ``(n,)``                 | :class:`TopOneAccuracy`           |
| ``(n,)`` or ``(n, 1)``   | 0 or 1, ``(n,)`` or ``(n, 1)``         | :class:`BinaryAccuracy`           |
| ``(n, labels)``          | 0 or 1, ``(n, labels)``                | :class:`MultilabelAccuracy`       |
| ``(n, classes, h, w)``   | class indices ``(n, h, w)``            | :class:`PixelAccuracy`            |
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import BinaryStatScores, MulticlassStatScores, MultilabelStatScores

from lightning_baqe.errors import ConfigError
from lightning_baqe.quantization.batches import input_and_labels
from lightning_baqe.quantization.sensitivity import OutputKind

Predict = Callable[[Tensor], Any]  # images (n, channels, h, w) to outputs
Batches = Iterable[Any]  # as quantization.batches reads them: (x, y), or a dict

ROUNDING = 1e-5  # of metrics in float32, by which they may be above 1
_REJECTED = (ValueError, RuntimeError, TypeError, IndexError, AssertionError)  # what metrics raise on what they get
_EXAMPLES = "torchmetrics.classification.MulticlassF1Score(num_classes=10), torchmetrics.R2Score()"


def _share(right: Tensor, wrong: Tensor) -> Tensor:
    """Of what is right, in double precision: 299 of 300 is no float32. On the CPU, since not every device has it."""
    total = int(right) + int(wrong)
    return torch.tensor(int(right) / total if total else math.nan, dtype=torch.float64)


class TopOneAccuracy(MulticlassStatScores):
    """The share of images whose largest output is that of their class."""

    higher_is_better: bool | None = True
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes=num_classes, average="micro")

    def compute(self) -> Tensor:
        """Of all updates, scalar float64, 0..1."""
        right, _, _, wrong, _ = super().compute()
        return _share(right, wrong)


class PixelAccuracy(TopOneAccuracy):
    """The share of pixels whose largest output is that of their class."""


class BinaryAccuracy(BinaryStatScores):
    """The share of images on the right side of the threshold."""

    higher_is_better: bool | None = True
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    def compute(self) -> Tensor:
        """Of all updates, scalar float64, 0..1."""
        true_positive, false_positive, true_negative, false_negative, _ = super().compute()
        return _share(true_positive + true_negative, false_positive + false_negative)


class MultilabelAccuracy(MultilabelStatScores):
    """The share of labels, over all images, on the right side of the threshold."""

    higher_is_better: bool | None = True
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    def __init__(self, num_labels: int) -> None:
        super().__init__(num_labels=num_labels, average="micro")

    def compute(self) -> Tensor:
        """Of all updates, scalar float64, 0..1."""
        true_positive, false_positive, true_negative, false_negative, _ = super().compute()
        return _share(true_positive + true_negative, false_positive + false_negative)


def kind_of(outputs: Tensor, targets: Tensor) -> OutputKind:
    """What outputs are, by their shape and that of their targets.

    Returns:
        ``classes`` along dimension 1 for class indices, independent ``labels`` for targets of their own shape (but for
        a dimension 1 of size 1) that are all 0 or 1, ``values`` for all else.
    """
    indices = not targets.is_floating_point() and targets.dtype != torch.bool
    spread = outputs.ndim == targets.ndim + 1 and outputs.shape[1] > 1
    if indices and spread and outputs.shape[:1] + outputs.shape[2:] == targets.shape:
        return "classes"
    outputs, targets = _of_one_shape(outputs, targets)
    if outputs.shape == targets.shape and bool(((targets == 0) | (targets == 1)).all()):
        return "labels"
    return "values"


def default_metric(outputs: Tensor, targets: Tensor) -> Metric:
    """The accuracy of the table above.

    Args:
        outputs, targets: of the first batch.

    Raises:
        ConfigError: shapes or values that are none of these, or 0 and 1 that may as well be one class of several.
    """
    kind, shapes = kind_of(outputs, targets), _shapes(outputs, targets)
    if kind == "classes" and targets.ndim in (1, 3):
        return (TopOneAccuracy if targets.ndim == 1 else PixelAccuracy)(outputs.shape[1])
    flat, wanted = _of_one_shape(outputs, targets)
    if kind == "labels" and flat.ndim == 1:
        return BinaryAccuracy()
    if kind == "labels" and flat.ndim == 2:
        if bool((wanted.sum(1) == 1).all()):
            raise ConfigError(
                f"{shapes}: every row of the first targets holds exactly one 1, so that these may be classes as well "
                "as labels. Give class indices (n,) as targets if they are classes, and "
                f"metric=torchmetrics.classification.MultilabelAccuracy(num_labels={flat.shape[1]}) if they are labels."
            )
        return MultilabelAccuracy(flat.shape[1])
    raise ConfigError(
        f"{shapes}: it is not known what accuracy is there. Known are class indices (n,) for outputs (n, classes), 0 "
        "or 1 (n,) for one output (n,) or (n, 1), 0 or 1 (n, labels) for outputs (n, labels), and class indices "
        f"(n, h, w) for outputs (n, classes, h, w). Give metric=, a torchmetrics metric: {_EXAMPLES}."
    )


def check_metric(metric: Any) -> None:
    """Refuse what cannot be a search's metric, whatever the data.

    Raises:
        ConfigError: no torchmetrics metric, or one that does not say that higher is better, or with another upper bound
            than 1.
    """
    if isinstance(metric, MetricCollection) or not isinstance(metric, Metric):
        what = f"the class {metric.__name__}" if isinstance(metric, type) else f"a {type(metric).__name__}"
        raise ConfigError(f"metric is {what}; wanted is one torchmetrics metric of (outputs, targets): {_EXAMPLES}.")
    name = metric_name(metric)
    if metric.higher_is_better is not True:
        found = "lower is better" if metric.higher_is_better is False else "does not say whether higher is better"
        raise ConfigError(
            f"metric {name}: {found} (higher_is_better = {metric.higher_is_better}); the first objective is the error, "
            "1 - metric. Give a metric that grows to 1 with quality: R2Score for squared errors, an Accuracy for "
            "HammingDistance, or a subclass whose compute() gives that, with higher_is_better = True."
        )
    if metric.plot_upper_bound not in (None, 1.0):
        raise ConfigError(f"metric {name} has the upper bound plot_upper_bound = {metric.plot_upper_bound}; {_SCALED}")


_SCALED = (
    "the first objective is the error, 1 - metric, which must not become negative. Give a subclass whose compute() is "
    "scaled to at most 1, with plot_upper_bound = 1.0."
)


def metric_name(metric: Metric) -> str:
    """A metric's class with those of its constructor's arguments that differ from their defaults."""
    shown = []
    for name, parameter in inspect.signature(type(metric).__init__).parameters.items():
        value = getattr(metric, name, parameter.default)
        if name != "self" and isinstance(value, bool | int | float | str) and value != parameter.default:
            shown.append(f"{name}={value!r}")
    return f"{type(metric).__name__}({', '.join(shown)})" if shown else type(metric).__name__


def align(metric: Metric, outputs: Tensor, targets: Tensor, logits: bool) -> tuple[Tensor, Tensor]:
    """Outputs and targets as torchmetrics wants them.

    One output ``(n, 1)`` meets targets ``(n,)`` and the reverse. torchmetrics' metrics of classification get targets as
    integers, where a loss had them as 0.0 and 1.0, and probabilities: they would ask each batch anew whether it holds
    logits, and take one for probabilities that happens to be in 0..1.

    Args:
        metric: that will be updated with them.
        outputs, targets: of one batch.
        logits: whether outputs are before their sigmoid or softmax.
    """
    outputs, targets = _of_one_shape(outputs, targets)
    if _takes_probabilities(metric) and outputs.is_floating_point():
        if not logits:
            outputs = outputs.clamp(0, 1)  # a quantized network may end a step beyond
        elif _is_from(metric, ("Binary", "Multilabel")):
            outputs = outputs.sigmoid()
        elif outputs.ndim > targets.ndim:
            outputs = outputs.softmax(1)
    as_float = targets.is_floating_point() and bool((targets == targets.round()).all())
    if (as_float or targets.dtype == torch.bool) and _is_from(metric, ("Binary", "Multiclass", "Multilabel")):
        targets = targets.long()
    return outputs, targets


@dataclass(frozen=True, eq=False)
class Scorer:
    """A metric of networks' outputs; each evaluation has a fresh copy of it.

    Attributes:
        metric: higher is better, at most 1; never updated itself.
        kind: what the outputs are.
        logits: whether outputs are before their sigmoid or softmax.
        shapes: of the first outputs and targets, to read.
    """

    metric: Metric
    kind: OutputKind
    logits: bool
    shapes: str

    @classmethod
    def of(cls, predict: Predict, batches: Batches, metric: Metric | None = None) -> Scorer:
        """What suits a float network and its data, or the given metric.

        Whether outputs are logits is decided once, for all networks that are compared: they are, unless all outputs of
        this one lie in 0..1.

        Args:
            predict: of the float network, in eval mode.
            batches: images and targets of the validation split.
            metric: None: :func:`default_metric`.

        Raises:
            ConfigError: no images, no metric for these shapes, or a metric that refuses them or gives anything but one
                number of at most 1.
        """
        scorer = check_outputs(predict, batches, metric)
        if not _takes_probabilities(scorer.metric):
            return scorer
        outside = (bool(((outputs < 0) | (outputs > 1)).any()) for outputs in (_tensor(predict(x)) for x, _ in batches))
        return cls(scorer.metric, scorer.kind, any(outside), scorer.shapes)

    @property
    def name(self) -> str:
        """Of the metric, with its arguments."""
        return metric_name(self.metric)

    @property
    def line(self) -> str:
        """What is counted, for the user."""
        threshold = ""
        if self.kind == "labels" and _is_from(self.metric, ("Binary", "Multilabel")):
            threshold = ", logits with the threshold 0" if self.logits else ", probabilities with the threshold 0.5"
            if getattr(self.metric, "threshold", None) != 0.5:
                threshold = ", logits" if self.logits else ", probabilities"
        return f"accuracy is {self.name} of {self.shapes}{threshold}; metric= takes another"

    def score(self, predict: Predict, batches: Batches) -> float:
        """The metric of a network's outputs over all batches, at most 1.

        Raises:
            ConfigError: no images, or the metric refuses them or gives no finite number of at most 1.
        """
        metric, seen = self._fresh(), 0
        for x, y in (input_and_labels(batch, "the loader that is scored on", ConfigError) for batch in batches):
            self._update(metric, predict(x), y)
            seen += len(y)
        if not seen:
            raise ConfigError(_NO_IMAGES)
        try:
            value = self._number(metric.compute())
        except _REJECTED as error:
            raise self._refusal(error) from error
        if not math.isfinite(value):
            raise ConfigError(f"metric {self.name} is {value} on {seen} images; a finite number is wanted")
        return value

    def probe(self, predict: Predict, batches: Batches) -> None:
        """See on the first batch, on as many as the metric needs, that it gives one number.

        Raises:
            ConfigError: as :meth:`score`.
        """
        metric, refusal = self._fresh(), None
        for x, y in (input_and_labels(batch, "the loader that is scored on", ConfigError) for batch in batches):
            self._update(metric, predict(x), y)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of the rest of the data nothing is known yet
                    found = metric.compute()
            except _REJECTED as error:  # too few images for it
                refusal = error
                continue
            self._number(found)
            return
        if refusal is not None:
            raise self._refusal(refusal) from refusal

    def _fresh(self) -> Metric:
        metric = self.metric.clone().cpu()
        metric.reset()
        for part in metric.modules():
            if isinstance(part, Metric):
                part.distributed_available_fn = _alone  # one rank evaluates, the others wait elsewhere
        return metric

    def _update(self, metric: Metric, outputs: Any, targets: Tensor) -> None:
        outputs = _tensor(outputs)
        if _takes_probabilities(metric) and outputs.is_floating_point():
            outputs = outputs.double()  # in float32 the probabilities of large logits are equal
        try:
            metric.update(*align(metric, outputs, targets.detach().cpu(), self.logits))
        except _REJECTED as error:
            raise self._refusal(error) from error

    def _refusal(self, error: Exception) -> ConfigError:
        if isinstance(error, ConfigError):
            return error
        return ConfigError(f"metric {self.name} does not take {self.shapes}: {error}. Give another metric=.")

    def _number(self, value: Any) -> float:
        if isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1):
            number = float(value)
            if number > 1 + ROUNDING:
                raise ConfigError(f"metric {self.name} is {number:g}; {_SCALED}")
            return min(number, 1.0) if math.isfinite(number) else number
        found = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ConfigError(
            f"metric {self.name} gives {found}; the search ranks by one number: give a metric of a single one, such as "
            "average='macro' in place of one for each class."
        )


_NO_IMAGES = "accuracy needs at least one image; the loader gave none"


def check_outputs(predict: Predict, batches: Batches, metric: Metric | None = None) -> Scorer:
    """The part of :meth:`Scorer.of` that an untrained network tells, from its first batch; ``logits`` is a guess."""
    first = next(iter(batches), None)
    if first is None:
        raise ConfigError(_NO_IMAGES)
    outputs, targets = _tensor(predict(first[0])), first[1].detach().cpu()
    if metric is None:
        metric = default_metric(outputs, targets)
    check_metric(metric)
    scorer = Scorer(metric, kind_of(outputs, targets), True, _shapes(outputs, targets))
    scorer.probe(predict, batches)
    return scorer


def _alone() -> bool:
    return False


def _tensor(outputs: Any) -> Tensor:
    """Outputs on the CPU, float32 where they are of any float type."""
    if not isinstance(outputs, Tensor):
        raise ConfigError(
            f"the network gives a {type(outputs).__name__}; wanted is one tensor of outputs, which a metric is taken of"
        )
    outputs = outputs.detach().cpu()
    return outputs.float() if outputs.is_floating_point() else outputs


def _of_one_shape(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Both without a dimension 1 of size 1 where that makes their shapes equal."""
    if outputs.ndim == targets.ndim == 1:
        return outputs, targets
    one, other = (tensor.squeeze(1) if tensor.ndim > 1 else tensor for tensor in (outputs, targets))
    return (one, other) if one.shape == other.shape else (outputs, targets)


def _takes_probabilities(metric: Metric) -> bool:
    return not isinstance(metric, TopOneAccuracy) and _is_from(metric, ("Binary", "Multiclass", "Multilabel"))


def _is_from(metric: Metric, tasks: tuple[str, ...]) -> bool:
    """Whether it is, or derives from, one of torchmetrics' classification metrics for these tasks."""
    return any(
        kind.__module__.startswith("torchmetrics.classification") and kind.__name__.startswith(tasks)
        for kind in type(metric).__mro__
    )


def _shapes(outputs: Tensor, targets: Tensor) -> str:
    kind = str(targets.dtype).removeprefix("torch.")
    return f"outputs {tuple(outputs.shape)} and targets {kind} {tuple(targets.shape)}"
