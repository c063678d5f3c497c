"""Strategies of the tuner: which knobs of a kernel to measure next.

A strategy is a pure function of what was measured, so that a run that was killed goes on as if it had not been. What it
wishes for is filtered here: nothing is proposed twice, the default comes first, and random knobs fill up what a
strategy leaves open, until none are left.

| symbol | meaning                                                                    | shape |
| ------ | -------------------------------------------------------------------------- | ----- |
| x      | features of knobs: numbers, never one column for each value                | d     |
| y      | logarithm of latency over that of the kernel's default knobs               |       |
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import re
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

Key = tuple[tuple[str, Any], ...]
_LISTED = 100_000  # points of a space that are shuffled as a whole; of larger ones random points are drawn


def key_of(knobs: Mapping[str, Any]) -> Key:
    """Knobs as something that can be looked up."""
    return tuple(sorted(knobs.items()))


@dataclass(frozen=True, eq=False)
class KernelSpace:
    """The knobs of one kernel.

    Args:
        name: of the kernel; seeds random numbers.
        values: of each knob, best guess first.
        default: the shipped knobs, in canonical form.
        check: knobs to their canonical form; several points may have the same.
        cost: an estimate of the latency of knobs, in any positive unit.
        context: numbers that tell this kernel from others of its template.
    """

    name: str
    values: Mapping[str, Sequence[Any]]
    default: dict[str, Any]
    check: Callable[[Mapping[str, Any]], dict[str, Any]]
    cost: Callable[[Mapping[str, Any]], float]
    context: tuple[float, ...] = ()
    _features: dict[Key, list[float]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Points, those with the same canonical form counted apart."""
        return math.prod(len(values) for values in self.values.values())

    def point(self, indices: Sequence[int]) -> dict[str, Any]:
        """The knobs at one index for each knob, in no canonical form."""
        return {name: values[i] for (name, values), i in zip(self.values.items(), indices, strict=True)}

    def features(self, knobs: Mapping[str, Any]) -> list[float]:
        """Numbers that describe knobs, as many for each kernel of a template: extents, estimated cost, context."""
        key = key_of(knobs)
        if key not in self._features:
            numbers = [n for name in sorted(self.values) for n in _numbers(knobs[name], self.values[name])]
            cost = math.log2(self.cost(knobs))
            self._features[key] = [*numbers, cost - math.log2(self.cost(self.default)), cost, *self.context]
        return self._features[key]

    def matters(self, name: str) -> bool:
        """Whether another value of a knob is another kernel, the others being the default."""
        return any(self.check({**self.default, name: value}) != self.default for value in self.values[name])

    def is_like(self, other: KernelSpace) -> bool:
        """Whether the features of both have the same meaning."""
        mine, theirs = ((sorted(one.values), len(one.context), len(one.features(one.default))) for one in (self, other))
        return mine == theirs

    def shuffled(self, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
        """Canonical knobs in random order: all of them, of huge spaces some."""
        shape = [len(values) for values in self.values.values()]
        flat = rng.permutation(self.size) if self.size <= _LISTED else rng.integers(0, self.size, _LISTED)
        for index in flat:
            yield self.check(self.point([int(i) for i in np.unravel_index(int(index), shape)]))


def _numbers(value: Any, choices: Sequence[Any]) -> list[float]:
    """A knob's value as numbers: logarithms of sizes and of their product, or the rank among unordered choices."""
    if isinstance(value, str) and re.fullmatch(r"\d+(x\d+)+", value):
        extents = [int(part) for part in value.split("x")]
        return [math.log2(1 + extent) for extent in (*extents, math.prod(extents))]
    if isinstance(value, int | float):
        return [math.log2(1 + abs(value))]
    return [float(sorted(choices).index(value))]


@dataclass(frozen=True)
class Tried:
    """One measured candidate; ``latency_us`` is None where it failed."""

    knobs: dict[str, Any]
    latency_us: float | None


Known = tuple[KernelSpace, Sequence[Tried]]


@dataclass(frozen=True)
class _Question:
    """The arguments of :meth:`Strategy.propose`, what was tried sorted, and random numbers."""

    space: KernelSpace
    tried: Sequence[Tried]
    count: int
    others: Sequence[Known]
    rng: np.random.Generator

    @functools.cached_property
    def known(self) -> frozenset[Key]:
        """What was tried, to look it up."""
        return frozenset(key_of(one.knobs) for one in self.tried)


@dataclass(eq=False)
class Strategy(ABC):
    """Proposes knobs; ``seed`` is that of its random numbers."""

    seed: int = 0

    def propose(
        self, space: KernelSpace, tried: Sequence[Tried], count: int, others: Sequence[Known] = ()
    ) -> list[dict[str, Any]]:
        """The knobs to measure next: ``count`` canonical ones that were not tried, the default first; fewer where there
        are no more.

        ``tried`` is what was measured of the space's kernel, ``others`` what was measured of other kernels.
        """
        known = {key_of(one.knobs) for one in tried}
        rng = _generator(f"{self.seed} {space.name} {len(known)}")
        ordered = sorted(tried, key=lambda one: repr(key_of(one.knobs)))
        wishes = self._wishes(_Question(space, ordered, count, others, rng))
        found: list[dict[str, Any]] = []
        for knobs in itertools.chain([space.default], wishes, space.shuffled(rng)):
            if len(found) == count:
                break
            key = key_of(knobs)
            if key not in known:
                known.add(key)
                found.append(knobs)
        return found

    @abstractmethod
    def _wishes(self, asked: _Question) -> Iterator[dict[str, Any]]:
        """Canonical knobs, most wanted first; those that were tried are skipped."""


def _generator(text: str) -> np.random.Generator:
    """Random numbers for a text."""
    return np.random.default_rng(list(hashlib.sha256(text.encode()).digest()))


class Random(Strategy):
    """Random knobs, all equally likely."""

    def _wishes(self, asked: _Question) -> Iterator[dict[str, Any]]:
        return iter(())


@dataclass(eq=False)
class Ranked(Strategy):
    """By the templates' own estimates: the best values of the knob with the most, everything else at its default, in
    turns with random knobs out of the most promising values.

    Args:
        promising: values of each knob to draw from.
    """

    promising: int = 16

    def _wishes(self, asked: _Question) -> Iterator[dict[str, Any]]:
        space, rng, known = asked.space, asked.rng, asked.known
        widest = max(filter(space.matters, space.values), key=lambda name: len(space.values[name]), default=None)
        few = {name: values[: self.promising] for name, values in space.values.items()}
        best = (space.check({**space.default, str(widest): value}) for value in few.get(str(widest), ()))
        ranked = (knobs for knobs in best if key_of(knobs) not in known)
        drawn = (
            space.check({name: values[int(rng.integers(len(values)))] for name, values in few.items()})
            for _ in range(20 * asked.count)
        )
        for turn in itertools.zip_longest(*([drawn, ranked] if len(known) % 2 else [ranked, drawn])):
            yield from (knobs for knobs in turn if knobs is not None)


def observations(
    space: KernelSpace, tried: Sequence[Tried], others: Sequence[Known], most: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """What models learn from: all of this kernel and, spread evenly, at most ``most`` of others of its template.

    A failure counts as twice the slowest latency of its kernel; kernels of which nothing succeeded say nothing. Where
    the default failed, the median latency takes its place.

    Returns:
        x ``(n, d)`` and y ``(n,)``, those of the kernel itself first, and how many are of it.
    """
    x, y = _rows(space, tried)
    more = [_rows(other, seen) for other, seen in others if other.is_like(space)]
    xs, ys = [row for rows, _ in more for row in rows], [value for _, values in more for value in values]
    kept = np.unique(np.linspace(0, len(ys) - 1, min(most, len(ys))).astype(int))
    return np.array(x + [xs[i] for i in kept]), np.array(y + [ys[i] for i in kept]), len(y)


def _rows(space: KernelSpace, tried: Sequence[Tried]) -> tuple[list[list[float]], list[float]]:
    good = [one.latency_us for one in tried if one.latency_us is not None]
    if not good:
        return [], []
    default = key_of(space.default)
    base = next((o.latency_us for o in tried if o.latency_us and key_of(o.knobs) == default), statistics.median(good))
    figures = [2 * max(good) if one.latency_us is None else one.latency_us for one in tried]
    return [space.features(one.knobs) for one in tried], [math.log(figure / base) for figure in figures]


@dataclass(eq=False)
class SimulatedAnnealing(Strategy):
    """AutoTVM's: gradient-boosted trees predict latency, simulated annealing over the space finds where it is low.

    Chen et al., "Learning to Optimize Tensor Programs", NeurIPS 2018; BAQE's baseline. Chains start at random points,
    one knob changes in each step, the temperature falls linearly to 0; a small share of proposals stays random.
    What was measured of other kernels is learned from, too.

    Args:
        initial: random candidates before the first model, unless other kernels give as many.
        chains, steps: of the annealing.
        epsilon: share of random proposals.
    """

    initial: int = 8
    chains: int = 32
    steps: int = 60
    epsilon: float = 0.05

    def _wishes(self, asked: _Question) -> Iterator[dict[str, Any]]:
        x, y, _ = observations(asked.space, asked.tried, asked.others, most=2000)
        if len(y) < self.initial:
            return
        randoms = asked.space.shuffled(asked.rng)
        for knobs in self._annealed(asked, _trees(x, y, self.seed)):
            if asked.rng.random() < self.epsilon:
                yield next(randoms)
            yield knobs

    def _annealed(self, asked: _Question, predict: Callable[[np.ndarray], np.ndarray]) -> list[dict[str, Any]]:
        """The points that the chains met and nobody tried, lowest prediction first."""
        space, rng = asked.space, asked.rng
        sizes = np.array([len(values) for values in space.values.values()])
        movable = np.flatnonzero(sizes > 1)
        seen: dict[tuple[int, ...], tuple[Key, float]] = {}

        def energies(points: np.ndarray) -> np.ndarray:
            keys = [tuple(int(i) for i in point) for point in points]
            fresh = [key for key in dict.fromkeys(keys) if key not in seen]
            if fresh:
                knobs = [space.check(space.point(key)) for key in fresh]
                predicted = predict(np.array([space.features(one) for one in knobs]))
                seen.update({k: (key_of(one), float(p)) for k, one, p in zip(fresh, knobs, predicted, strict=True)})
            return np.array([seen[key][1] for key in keys])

        points = rng.integers(0, sizes, (self.chains, len(sizes)))
        energy = energies(points)
        for step in range(self.steps if len(movable) else 0):
            temperature = 1.0 - step / self.steps
            moved = points.copy()
            knob = rng.choice(movable, self.chains)
            rows = np.arange(self.chains)
            moved[rows, knob] = (moved[rows, knob] + rng.integers(1, sizes[knob])) % sizes[knob]
            reached = energies(moved)
            accepted = rng.random(self.chains) < np.exp(np.minimum(0.0, (energy - reached) / (temperature + 1e-5)))
            points[accepted], energy[accepted] = moved[accepted], reached[accepted]
        unknown = {key: energy for key, energy in seen.values() if key not in asked.known}
        return [dict(key) for key in sorted(unknown, key=lambda key: (unknown[key], repr(key)))]


def _trees(x: np.ndarray, y: np.ndarray, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    import xgboost  # slow to load, and one strategy needs it

    options = {"max_depth": 3, "eta": 0.3, "nthread": 1, "objective": "reg:squarederror", "seed": seed}
    booster = xgboost.train(options, xgboost.DMatrix(x, y), num_boost_round=60)
    return lambda rows: np.asarray(booster.inplace_predict(rows))


@dataclass(eq=False)
class DeepKernel(Strategy):
    """BAQE's for one kernel: TED chooses the first candidates, then a deep-kernel GP and the expected improvement.

    Sections III-C and III-D with latency as the only objective, over features of the knobs. Other kernels'
    measurements are learned from, too.

    Args:
        initial: candidates that TED chooses.
        pool: points that stand for the space (500 in the paper), for TED and for the improvement.
        most: observations of other kernels; the cost of the model grows with their cube.
        widths: of the perceptron. The paper's (1000, 500, 50, 48) take longer to fit than a kernel to measure.
    """

    initial: int = 8
    pool: int = 500
    most: int = 60
    widths: tuple[int, ...] = (64, 32, 16)

    def __post_init__(self) -> None:
        self._pool_of = functools.lru_cache(maxsize=256)(self._make_pool)

    def _make_pool(self, space: KernelSpace) -> tuple[list[dict[str, Any]], torch.Tensor]:
        """Points of a space without those of equal form, and their features ``(n, d)``."""
        points: dict[Key, dict[str, Any]] = {}
        for knobs in space.shuffled(_generator(f"{self.seed} {space.name} pool")):
            points.setdefault(key_of(knobs), knobs)
            if len(points) == self.pool:
                break
        chosen = list(points.values())
        return chosen, torch.tensor([space.features(knobs) for knobs in chosen], dtype=torch.float64)

    def _wishes(self, asked: _Question) -> Iterator[dict[str, Any]]:
        from lightning_baqe.search import DeepKernelGP, DeepKernelOptions, expected_hypervolume_improvement, ted

        pool, features = self._pool_of(asked.space)
        if len(asked.tried) < 1 + self.initial:
            chosen = ted(_scaled(features, features), min(self.initial, len(pool)))
            yield from (pool[int(index)] for index in chosen)
            return
        x, y, count = observations(asked.space, asked.tried, asked.others, self.most)
        free = [index for index, knobs in enumerate(pool) if key_of(knobs) not in asked.known]
        if count < 2 or not free:
            return
        rows, goal = torch.from_numpy(x), torch.from_numpy(y)[:, None]
        span = torch.cat([features, rows])
        model = DeepKernelGP(_scaled(rows, span), goal, DeepKernelOptions(widths=self.widths), self.seed)
        posterior = model.posterior(_scaled(features[free], span))
        own = goal[:count]
        gain = expected_hypervolume_improvement(posterior.mean, posterior.covariance, own, own.max(0).values + 1)
        variance = posterior.covariance[:, 0, 0]
        order = sorted(range(len(free)), key=lambda at: (-float(gain[at]), -float(variance[at]), at))
        yield from (pool[free[at]] for at in order)


def _scaled(x: torch.Tensor, span: torch.Tensor) -> torch.Tensor:
    """Columns of x in [0, 1] as seen from ``span``; columns that are constant there are 0."""
    low, high = span.min(0).values, span.max(0).values
    return torch.where(high > low, (x - low) / (high - low).clamp_min(1e-12), torch.zeros_like(x))
