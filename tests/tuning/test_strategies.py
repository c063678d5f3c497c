"""What every strategy of the tuner must do, and that those with a model learn."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from small_graphs import Maker

from lightning_baqe.deploy.plan import make_plan
from lightning_baqe.errors import ConfigError
from lightning_baqe.hardware.options import BuildOptions
from lightning_baqe.hardware.target import get_target
from lightning_baqe.tuning.bench import kernel_space
from lightning_baqe.tuning.strategies import (
    DeepKernel,
    KernelSpace,
    Known,
    Random,
    Ranked,
    SimulatedAnnealing,
    Strategy,
    Tried,
    key_of,
    observations,
)

Make = Callable[[int], Strategy]
ALL: dict[str, Make] = {
    "ranked": Ranked,
    "random": Random,
    "sa_xgb": SimulatedAnnealing,
    "dkl_gp": DeepKernel,
}
TILES = [f"{a}x{b}x{c}" for a in (1, 2, 3, 4, 6, 8) for b in (1, 2, 4) for c in (1, 2, 3, 4, 5, 6, 7, 10, 14)]
VALUES: dict[str, list[Any]] = {"tile": TILES, "order": ["channels", "pixels"], "unroll": [1, 2, 4]}


def made_up(name: str = "kernel", values: Mapping[str, Sequence[Any]] = VALUES, context: float = 1.0) -> KernelSpace:
    """A space in which ``pixels`` cannot be unrolled by 4: the canonical form says 2."""

    def check(knobs: Mapping[str, Any]) -> dict[str, Any]:
        for knob, value in knobs.items():
            if value not in values[knob]:
                raise ConfigError(f"{knob}={value!r}")
        unroll = 2 if (knobs["order"], knobs["unroll"]) == ("pixels", 4) else knobs["unroll"]
        return {**knobs, "unroll": unroll}

    default = {knob: choices[0] for knob, choices in values.items()}
    return KernelSpace(name, values, default, check, cost=lambda knobs: 1.0, context=(context,))


def additive(knobs: Mapping[str, Any]) -> float:
    """A latency that no estimate knows of; lowest at 4x2x5, pixels, 2."""
    wanted = (math.log2(4), math.log2(2), math.log2(5))
    off = sum(abs(math.log2(int(e)) - w) for e, w in zip(knobs["tile"].split("x"), wanted, strict=True))
    return 100.0 * math.exp(0.3 * off + 0.2 * (knobs["order"] == "channels") + 0.1 * abs(knobs["unroll"] - 2))


def run(
    strategy: Strategy,
    space: KernelSpace,
    total: int,
    count: int = 4,
    latency: Callable[[Mapping[str, Any]], float | None] = additive,
    others: Sequence[Known] = (),
) -> list[Tried]:
    tried: list[Tried] = []
    while len(tried) < total:
        proposed = strategy.propose(space, tried, min(count, total - len(tried)), others)
        if not proposed:
            break
        tried += [Tried(knobs, latency(knobs)) for knobs in proposed]
    return tried


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
class TestConformance:
    def test_valid_and_never_known(self, make: Make) -> None:
        space = made_up()
        tried = run(make(0), space, 40)
        assert len(tried) == 40
        assert len({key_of(one.knobs) for one in tried}) == 40
        assert all(space.check(one.knobs) == one.knobs for one in tried)

    def test_the_default_comes_first(self, make: Make) -> None:
        space = made_up()
        assert make(0).propose(space, [], 3)[0] == space.default

    def test_ends_when_there_is_nothing_left(self, make: Make) -> None:
        space = made_up(values={"tile": ["1x1x1", "1x2x2"], "order": ["channels", "pixels"], "unroll": [1, 2, 4]})
        tried = run(make(0), space, 1000)
        assert len(tried) == 2 * 5  # of 6 other knobs, two have the same form
        assert make(0).propose(space, tried, 4) == []

    def test_a_space_of_one_point(self, make: Make) -> None:
        space = made_up(values={"tile": ["1x1x1"], "order": ["channels"], "unroll": [1]})
        assert run(make(0), space, 5) == [Tried(space.default, additive(space.default))]

    def test_deterministic_for_a_seed(self, make: Make) -> None:
        assert run(make(3), made_up(), 24) == run(make(3), made_up(), 24)

    def test_seeds_and_kernels_differ(self, make: Make) -> None:
        runs = [run(make(seed), made_up(name), 40) for seed, name in ((0, "a"), (1, "a"), (0, "b"))]
        assert runs[0] != runs[1]
        assert runs[0] != runs[2]

    def test_goes_on_as_if_it_had_not_been_interrupted(self, make: Make) -> None:
        tried = run(make(0), made_up(), 20)
        shuffled = sorted(tried, key=lambda one: one.latency_us or 0)  # as the records give them
        assert make(0).propose(made_up(), shuffled, 4) == make(0).propose(made_up(), tried, 4)

    def test_failures_are_survived(self, make: Make) -> None:
        def fails(knobs: Mapping[str, Any]) -> float | None:
            return None if knobs["order"] == "channels" else additive(knobs)

        assert len(run(make(0), made_up(), 30, latency=fails)) == 30
        assert len(run(make(0), made_up(), 30, latency=lambda knobs: None)) == 30

    def test_other_kernels_of_any_kind(self, make: Make) -> None:
        like, unlike = made_up("like", context=2.0), made_up("unlike", values={**VALUES, "unroll": [1, 2]})
        strange = KernelSpace("strange", {"width": [1, 2]}, {"width": 1}, lambda knobs: dict(knobs), lambda knobs: 2.0)
        others = [(like, run(Random(), like, 12)), (unlike, run(Random(), unlike, 12)), (strange, [])]
        assert len(run(make(0), made_up(), 12, others=others)) == 12

    def test_real_kernels(self, make: Make) -> None:
        maker = Maker(16, 10)
        maker.conv(out=32, padding=1, weight_bits=3, limits=None)
        (space,) = map(kernel_space, make_plan(maker.graph(), BuildOptions(get_target("vnni512"))).tunable().values())
        tried = run(make(0), space, 16, latency=lambda knobs: space.cost(knobs))
        assert len(tried) == 16
        assert all(space.check(one.knobs) == one.knobs for one in tried)


def best(tried: Sequence[Tried]) -> float:
    return min(one.latency_us for one in tried if one.latency_us is not None)


@pytest.mark.parametrize("name", ["sa_xgb", "dkl_gp"])
def test_models_learn(name: str) -> None:
    """At 28 of 972 points, the median over seeds of the best latency beats that of random knobs."""
    found = [best(run(ALL[name](seed), made_up(), 28)) for seed in range(7)]
    at_random = [best(run(Random(seed), made_up(), 28)) for seed in range(7)]
    assert statistics.median(found) < statistics.median(at_random)


@pytest.mark.parametrize("name", ["sa_xgb", "dkl_gp"])
def test_models_learn_from_other_kernels(name: str) -> None:
    others = [(space, run(Random(1), space, 60)) for space in [made_up("other", context=2.0)]]
    few = 13  # hardly more than what comes before the first model
    found = [best(run(ALL[name](seed), made_up(), few, others=others)) for seed in range(7)]
    at_random = [best(run(Random(seed), made_up(), few)) for seed in range(7)]
    assert statistics.median(found) < statistics.median(at_random)


def test_ranked_begins_with_the_first_values() -> None:
    proposed = Ranked(0).propose(made_up(), [], 9)
    first = [{**made_up().default, "tile": tile} for tile in TILES[:6]]
    assert sum(knobs in first for knobs in proposed) >= 5


def test_ranked_draws_promising_values() -> None:
    tried = run(Ranked(0, promising=5), made_up(), 20)
    assert {one.knobs["tile"] for one in tried} <= set(TILES[:5])


def test_observations() -> None:
    space, other = made_up(), made_up("other", context=2.0)
    points = Random(0).propose(space, [], 4)
    tried = [Tried(knobs, latency) for knobs, latency in zip(points, (10.0, 20.0, None, 5.0), strict=True)]
    x, y, own = observations(space, tried, [(other, tried[:2])], most=10)
    assert (own, x.shape[0]) == (4, 6)
    assert y.tolist() == pytest.approx([0, math.log(2), math.log(4), -math.log(2), 0, math.log(2)])
    assert {row[-1] for row in x[:4]} == {1.0}
    assert {row[-1] for row in x[4:]} == {2.0}
    assert len(observations(space, tried, [(other, tried)], most=3)[1]) == 7
    _, without_default, _ = observations(space, tried[1:], [], most=0)
    assert without_default.tolist() == pytest.approx([math.log(1.6), math.log(3.2), math.log(0.4)])
    assert observations(space, [Tried(points[0], None)], [], most=0)[2] == 0


def test_features_are_numbers_of_extents() -> None:
    space = made_up()
    knobs = {"tile": "4x2x5", "order": "pixels", "unroll": 2}
    order, *tile, unroll, cost, relative, context = space.features(knobs)
    assert order == 1.0
    assert tile == pytest.approx([math.log2(5), math.log2(3), math.log2(6), math.log2(41)])
    assert (unroll, cost, relative, context) == (math.log2(3), 0.0, 0.0, 1.0)
