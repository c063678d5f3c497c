"""Traces of the loss's Hessian by layer, by Hutchinson's method, and the sensitivity of HAWQ.

For a random v of 1 and -1, the expectation of v' H v is the trace of H, and H v comes from differentiating the
gradient's product with v: H is never formed. Probing all layers at once would be unbiased, but what one layer's probe
adds to another's product is noise, in a deep network many times the trace. So the two parts of H are probed apart; see
:mod:`lightning_baqe.allocation.curvature`. One gradient serves the Gauss-Newton part of all layers. The rest is probed
layer by layer; where the output is piecewise linear in the weights of one layer, as with ReLU and pooling, it is 0,
which its first probe shows.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_baqe.allocation.curvature import Curvature, Tensors
from lightning_baqe.allocation.evidence import Evidence, Loss, Sensitivities, Sensitivity, Tell, float_free
from lightning_baqe.allocation.layer_gradients import layer_inputs, learning, watched_inputs
from lightning_baqe.errors import ConfigError, DataError, UnsupportedModelError, check_at_least
from lightning_baqe.quantization.batches import input_and_labels
from lightning_baqe.quantization.config import layers
from lightning_baqe.quantization.train_modes import evaluating
from lightning_baqe.quantization.wrappers import refuse_lazy, unwrapped

FLOOR = 0.01  # of the largest trace: smaller ones need not be known more exactly than one of this size
_FEWEST = 10  # probes, before their spread is believed
_NOTHING = 1e-6  # of a trace: rounding of a part that is 0

Of = Literal["weights", "inputs"]


class Traces(dict[str, float]):
    """``{layer: trace of the Hessian / number of entries}``, in network order.

    Attributes:
        standard_errors: of the figures, over the probes.
        counts: ``{layer: number of entries}``, of its weights or of one image's input.
        samples: probes of all layers that were taken.
    """

    def __init__(
        self, values: Mapping[str, float], standard_errors: Mapping[str, float], counts: Mapping[str, int], samples: int
    ):
        super().__init__(values)
        self.standard_errors, self.counts, self.samples = dict(standard_errors), dict(counts), samples

    def scales(self) -> dict[str, float]:
        """By layer, the larger of its trace and :data:`FLOOR` of the largest; what errors are compared with."""
        totals = {name: abs(value) * self.counts[name] for name, value in self.items()}
        floor = FLOOR * max(totals.values())
        return {name: max(total, floor) for name, total in totals.items()}

    def unsure(self, tolerance: float) -> list[str]:
        """Layers whose trace has a standard error above this part of its scale."""
        scales = self.scales()
        return [name for name in self if self.standard_errors[name] * self.counts[name] > tolerance * scales[name]]


def hessian_trace(
    model: nn.Module,
    loss_fn: Loss,
    batches: Iterable[Any],
    samples: int = 200,
    of: Of = "weights",
    tolerance: float = 0.05,
    chunk: int = 4,
    seed: int = 0,
    tell: Tell | None = None,
) -> Traces:
    """The average of the Hessian's diagonal by layer (HAWQ-V2, section 3.1), of the mean loss over all images.

    The network is differentiated in eval mode, on its device, and left as it was. Images go through it ``chunk`` by
    ``chunk``, each with probes of its own: memory is that of a chunk, and the estimate varies no more than with one
    probe for all of them.

    Args:
        model: float, trained; any that can be differentiated twice.
        loss_fn: ``loss_fn(output, y)``, the mean over the batch; it depends on weights through the output alone.
        batches: ``(x, y)``.
        samples: probes at most.
        of: ``"weights"``; ``"inputs"``: of each layer's input, the mean over images of the Hessian of an image's loss.
        tolerance: no more probes once each standard error is at most this part of the larger of its trace and 1 % of
            the largest; 0: all probes.
        chunk: images at once.
        seed: of the probes.
        tell: told of probes done, of at most how many.

    Returns:
        ``{layer: trace / number of entries}``. Figures may be negative: the curvature is, or probes were few.

    Raises:
        ConfigError: no layers, no batches, an argument out of range, or a loss that knows weights by itself.
        DataError: batches that are no ``(x, y)``, or a loss that is not finite.
        UnsupportedModelError: weights that are no parameters of their own.
    """
    for argument, value in (("samples", samples), ("chunk", chunk)):
        check_at_least(argument, value, 1)
    if of not in ("weights", "inputs"):
        raise ConfigError(f"of={of!r}, but 'weights' or 'inputs' is wanted")
    if not tolerance >= 0:
        raise ConfigError(f"tolerance={tolerance!r}, but a number of 0 or more is wanted")
    network = unwrapped(model)
    probed = _Weights(network) if of == "weights" else _Inputs(network)
    device = next(network.parameters()).device
    held = [input_and_labels(batch, "batches", DataError) for batch in batches]
    parts = [
        (x.to(device), y.to(device)) for xs, ys in held for x, y in zip(xs.split(chunk), ys.split(chunk), strict=True)
    ]
    if not parts:
        raise ConfigError("batches is empty: give some (x, y), at least one image")
    images, generator = sum(len(x) for x, _ in parts), torch.Generator().manual_seed(seed)
    estimates = _Estimates(probed.names, samples)
    with evaluating(network), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), probed.ready():
        while True:
            jointly, alone = estimates.wanted(tolerance)
            if not jointly and not alone:
                return estimates.traces()
            for x, y in parts:
                output, share = network(x), len(x) / images
                curvature = Curvature(output, y, loss_fn, probed.tensors(), generator)
                joint = [curvature.gauss_newton() for _ in range(jointly)]
                estimates.add(
                    share,
                    {name: [found.get(name, 0.0) for found in joint] for name in probed.names},
                    curvature.residual(alone),
                )
            estimates.finish(probed.counts)
            if tell is not None:
                tell(estimates.samples, samples)


class _Estimates:
    """Of the two parts of each layer's trace, by probe, and which are wanted next.

    Args:
        names: of the layers.
        most: probes of each part.
    """

    def __init__(self, names: Sequence[str], most: int) -> None:
        self._most = most
        self._parts = tuple({name: torch.zeros(0, dtype=torch.float64) for name in names} for _ in range(2))
        self._sums: tuple[dict[str, torch.Tensor], ...] = ({}, {})
        self._counts = dict.fromkeys(names, 1)

    @property
    def samples(self) -> int:
        """Probes of all layers."""
        return len(next(iter(self._parts[0].values())))

    def add(self, share: float, *parts: Mapping[str, Sequence[float]]) -> None:
        """What some images add to the estimates that were wanted."""
        for sums, part in zip(self._sums, parts, strict=True):
            for name, values in part.items():
                sums[name] = sums.get(name, 0.0) + share * torch.tensor(values, dtype=torch.float64)

    def finish(self, counts: Mapping[str, int]) -> None:
        """All images were there; ``counts`` are the layers' numbers of entries."""
        for part, sums in zip(self._parts, self._sums, strict=True):
            for name, values in sums.items():
                part[name] = torch.cat([part[name], values])
            sums.clear()
        self._counts = dict(counts)

    def traces(self) -> Traces:
        """So far."""
        joint, alone = self._parts
        errors = self._errors()
        values = {name: float(joint[name].mean() + alone[name].mean()) / n for name, n in self._counts.items()}
        known = {name: math.hypot(*errors[name]) / n for name, n in self._counts.items()}
        return Traces(values, known, self._counts, self.samples)

    def _errors(self) -> dict[str, tuple[float, float]]:
        """Standard errors of the two parts; of a single probe of the residual one, which is next to 0, its size."""
        joint, alone = self._parts
        return {
            name: (_error(joint[name]), _error(alone[name]) if len(alone[name]) > 1 else float(alone[name].abs()))
            for name in self._counts
        }

    def wanted(self, tolerance: float) -> tuple[int, dict[str, int]]:
        """Probes of the Gauss-Newton part, and of the residual part by layer; none: all is known, or was tried."""
        _, alone = self._parts
        if not self.samples:
            return min(_FEWEST, self._most), dict.fromkeys(alone, 1)  # one probe shows where the residual part is 0
        found, errors = self.traces(), self._errors()
        scales, unsure = found.scales(), {*found.unsure(tolerance)}
        jointly, by_layer = False, dict[str, int]()
        for name, taken in alone.items():
            left = self._most - len(taken)
            least = max(tolerance / 2, _NOTHING) * scales[name]
            # Two probes may be near each other by chance, but hardly both be next to 0.
            allowed = _NOTHING * scales[name] if len(taken) == 1 else least
            hardly_seen = len(taken) < _FEWEST and bool(taken.abs().max() > allowed)
            of_joint, of_alone = errors[name]
            unknown = name in unsure and of_alone > _NOTHING * scales[name]
            if left and (hardly_seen or (unknown and (of_alone >= of_joint or self.samples == self._most))):
                by_layer[name] = min(1 if len(taken) == 1 else _FEWEST - len(taken) if hardly_seen else _FEWEST, left)
            elif name in unsure:
                jointly = True
        return min(_FEWEST, self._most - self.samples) if jointly else 0, by_layer


def _error(values: torch.Tensor) -> float:
    """Of the mean, its standard error."""
    return float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.inf


class _Probed(ABC):
    """Tensors by layer that are probed; several layers may have one tensor in common."""

    def __init__(self, network: nn.Module) -> None:
        self.names = layers(network)
        if not self.names:
            raise ConfigError(
                f"{type(network).__name__} has no layers with weights: there is nothing to take a trace of"
            )
        self.counts: dict[str, int] = dict.fromkeys(self.names, 1)

    @abstractmethod
    def tensors(self) -> Tensors:
        """That the last output was computed with."""

    @abstractmethod
    def ready(self) -> AbstractContextManager[None]:
        """Within the block, outputs depend on the tensors."""


class _Weights(_Probed):
    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self._weights: dict[str, nn.Parameter] = {}
        for name in self.names:
            weight = network.get_submodule(name)._parameters.get("weight")
            if weight is None:
                raise UnsupportedModelError(
                    f"the weight of {name!r} is computed at each call (a parametrization, pruning or normalisation): "
                    "make it permanent first, as with torch.nn.utils.parametrize.remove_parametrizations"
                )
            refuse_lazy(f"{name}.weight", weight)
            self._weights[name] = weight
        self.counts = {name: weight.numel() for name, weight in self._weights.items()}
        self._others = [p for p in network.parameters() if all(p is not weight for weight in self._weights.values())]

    def tensors(self) -> Tensors:
        return {name: (weight,) for name, weight in self._weights.items()}

    @contextmanager
    def ready(self) -> Iterator[None]:
        with learning(dict.fromkeys(self._others, False) | dict.fromkeys(self._weights.values(), True)):
            yield


class _Inputs(_Probed):
    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self._network, self._shifts = network, dict[str, list[torch.Tensor]]()

    def tensors(self) -> Tensors:
        sizes = {name: sum(shift[0].numel() for shift in shifts) for name, shifts in self._shifts.items()}
        self.counts = {name: sizes.get(name, 1) for name in self.names}
        return self._shifts

    @contextmanager
    def ready(self) -> Iterator[None]:
        paths = {name: name for name in self.names}
        with (
            learning(dict.fromkeys(self._network.parameters(), False)),
            watched_inputs(self._network, paths) as (_, self._shifts),
        ):
            yield


@dataclass(frozen=True)
class HessianTrace(Sensitivity):
    """HAWQ-V2 (equation 9), as HAWQ-V3 takes it: the average of the Hessian's diagonal times the squared quantization
    error, halved, so that it is the second-order term of the loss's rise; of weights, and of inputs likewise.

    A trace below its standard error, negative ones among them, counts as the standard error: a trained network has no
    direction in which rounding helps, and a layer whose curvature drowned in noise must not seem free.

    Args:
        samples, tolerance, chunk: of :func:`hessian_trace`.
        inputs: whether the errors of layers' inputs count, too.
    """

    samples: int = 100
    tolerance: float = 0.1
    chunk: int = 4
    inputs: bool = True

    def __post_init__(self) -> None:
        check_at_least("samples", self.samples, 2)  # one has no standard error

    def measure(self, evidence: Evidence) -> Sensitivities:
        """The sensitivity of each layer at each of its bits.

        Raises:
            DataError: the loss is not finite.

        Warns:
            UserWarning: traces below their standard errors; names the layers.
        """
        layerwise = evidence.layerwise
        kinds: tuple[Of, ...] = ("weights", "inputs") if self.inputs else ("weights",)
        values = {name: dict.fromkeys(bits, 0.0) for name, bits in layerwise.choices.items()}
        for place, of in enumerate(kinds):

            def tell(done: int, total: int, place: int = place) -> None:
                evidence.tell(place * total + done, len(kinds) * total)

            traces = hessian_trace(
                layerwise.network, evidence.loss_fn, evidence.batches, self.samples, of, self.tolerance, self.chunk,
                evidence.seed, tell,
            )  # fmt: skip
            curvature = _believed(layerwise.paths, traces, of)
            errors = _weight_errors(evidence) if of == "weights" else _input_errors(evidence)
            for name, by_bits in errors.items():
                for bits, error in by_bits.items():
                    values[name][bits] += 0.5 * curvature[name] * error
        return Sensitivities(float_free(values, layerwise.choices))


def _believed(paths: Mapping[str, str], traces: Traces, of: Of) -> dict[str, float]:
    small = [name for name, path in paths.items() if traces[path] < traces.standard_errors[path]]
    if small:
        figures = {name: (traces[paths[name]], traces.standard_errors[paths[name]]) for name in small[:5]}
        shown = ", ".join(f"{name} ({trace:.2g} ± {error:.2g})" for name, (trace, error) in figures.items())
        warnings.warn(
            f"Hessian traces of {of} below their standard errors count as these: {shown}"
            f"{f' and {len(small) - 5} more' if len(small) > 5 else ''}; more samples or images would tell them better",
            UserWarning,
            stacklevel=3,
        )
    return {name: max(traces[path], traces.standard_errors[path]) for name, path in paths.items()}


def _weight_errors(evidence: Evidence) -> dict[str, dict[int, float]]:
    """Squared, summed over each layer's weights."""
    layerwise = evidence.layerwise
    return {
        name: {b: float(layerwise.weight_error(name, b).square().sum()) for b in bits}
        for name, bits in layerwise.choices.items()
    }


@torch.no_grad()
def _input_errors(evidence: Evidence) -> dict[str, dict[int, float]]:
    """Squared, summed over an image's input of each layer, the mean over images."""
    layerwise = evidence.layerwise
    found = {name: dict.fromkeys(bits, 0.0) for name, bits in layerwise.choices.items()}
    for share, x, _ in evidence.chunks(32):
        for name, calls in layer_inputs(evidence, x).items():
            for call, values in enumerate(calls):
                for bits in found[name]:
                    error = layerwise.input_error(name, bits, values, call).square().sum() / len(x)
                    found[name][bits] += share * float(error)
    return found
