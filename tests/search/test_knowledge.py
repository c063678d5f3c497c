"""What is known before trials: sums, best values that follow choices, and a sampler that uses both."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial

from lightning_baqe.errors import ConfigError
from lightning_baqe.search import BaqeSampler, hypervolume
from lightning_baqe.search.informed import InformedGP
from lightning_baqe.search.knowledge import BoundKnowledge, Knowledge, Sum
from lightning_baqe.search.space import SearchSpace

BITS, TILES = (4, 8, 32), ("small", "large", "odd")
LAYERS = ("a", "b", "c", "d", "e")
SPACE = {f"{layer}/bits": CategoricalDistribution(BITS) for layer in LAYERS} | {
    f"{layer}/tile": CategoricalDistribution(TILES) for layer in LAYERS
}
BEST = {4: "odd", 8: "small", 32: "large"}
REFERENCE = (1.0, 1.5, 1.1)


def size(params: dict[str, Any]) -> float:
    return sum(params[f"{layer}/bits"] for layer in LAYERS) / (32 * len(LAYERS))


def latency(params: dict[str, Any]) -> float:
    bits = [params[f"{layer}/bits"] for layer in LAYERS]
    slow = [1.0 if params[f"{layer}/tile"] == BEST[b] else 1.7 for layer, b in zip(LAYERS, bits, strict=True)]
    return 0.05 + 0.9 * sum(s * (1.0 if b == 32 else 0.3) for s, b in zip(slow, bits, strict=True)) / len(LAYERS)


def error(params: dict[str, Any]) -> float:
    return 0.1 + sum(0.04 * index * (params[f"{layer}/bits"] == 4) for index, layer in enumerate(LAYERS))


@pytest.fixture
def knowledge() -> Knowledge:
    bits = [f"{layer}/bits" for layer in LAYERS]
    return Knowledge(
        objectives=[
            Sum({name: {4: index + 0.5, 8: 0.1, 32: 0.0} for index, name in enumerate(bits)}, 0.0, "score", (*bits,)),
            Sum(
                {name: {b: (1.0 if b == 32 else 0.3) / len(bits) for b in BITS} for name in bits},
                groups=(((bits[0], bits[2]), (8,)), ((bits[1],), (4, 8)), (("elsewhere", bits[3]), ())),
                step=0.01,
            ),
            Sum({name: {b: b / 32 / len(bits) for b in BITS} for name in bits}, kind="exact"),
        ],
        best={name: {b: {name.replace("bits", "tile"): BEST[b]} for b in BITS} for name in bits},
    )


def points(space: SearchSpace, n: int, seed: int = 0) -> np.ndarray:
    return space.from_unit(np.random.default_rng(seed).random((n, len(space.names))))


def test_sums_are_those_of_the_choices(knowledge: Knowledge) -> None:
    space = SearchSpace(SPACE)
    rows = points(space, 50)
    found = BoundKnowledge(knowledge, space).estimates(rows)
    assert found.shape == (50, 3)
    for row, estimate in zip(rows, found, strict=True):
        assert estimate[2] == pytest.approx(size(space.external(row)))


def test_counts_are_different_values_beyond_the_first(knowledge: Knowledge) -> None:
    space = SearchSpace(SPACE)
    rows = points(space, 60)
    found = BoundKnowledge(knowledge, space).counts(rows)
    assert found.shape == (60, 3)
    assert not found[:, [0, 2]].any()
    for row, count in zip(rows, found[:, 1].tolist(), strict=True):
        params = space.external(row)
        several = {8, params["a/bits"], params["c/bits"]}
        alone = {4, 8, params["b/bits"]}  # one more for 32; d stands alone, as the space lacks its partner
        assert count == len(several) - 1 + len(alone) - 1
    assert len(set(found[:, 1].tolist())) == 4


def test_groups_want_choices() -> None:
    space = SearchSpace({"a/bits": SPACE["a/bits"], "x": FloatDistribution(0, 1)})
    with pytest.raises(ConfigError, match="group names x"):
        BoundKnowledge(Knowledge([Sum({}, groups=((("a/bits", "x"), ()),))]), space)


def test_improving_sets_what_others_decide_on_and_nothing_else(knowledge: Knowledge) -> None:
    space = SearchSpace(SPACE)
    rows, bound = points(space, 50), BoundKnowledge(knowledge, SearchSpace(SPACE))
    better = bound.improved(rows)
    assert sorted(space.names[index] for index in bound.free) == sorted(f"{layer}/bits" for layer in LAYERS)
    assert (better[:, bound.free] == rows[:, bound.free]).all()
    assert (bound.improved(better) == better).all()
    for before, after in zip(rows, better, strict=True):
        params = space.external(after)
        assert all(params[f"{layer}/tile"] == BEST[params[f"{layer}/bits"]] for layer in LAYERS)
        assert latency(params) <= latency(space.external(before))


def test_uniform_points_are_one_for_each_choice(knowledge: Knowledge) -> None:
    space = SearchSpace(SPACE)
    rows = BoundKnowledge(knowledge, space).uniform()
    found = [{params[f"{layer}/bits"] for layer in LAYERS} for params in map(space.external, rows)]
    assert found == [{4}, {8}, {32}]


def test_what_the_space_lacks_is_a_constant() -> None:
    space = SearchSpace({"a/bits": SPACE["a/bits"], "b/tile": SPACE["b/tile"]})
    bound = BoundKnowledge(
        Knowledge([Sum({"a/bits": {4: 1.0, 8: 2.0}, "b/bits": {8: 5.0}})], {"b/bits": {8: {"b/tile": "odd"}}}), space
    )
    rows = np.array([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]])  # names are sorted: a/bits, b/tile
    torch.testing.assert_close(
        bound.estimates(rows)[:, 0], torch.tensor([6.0, 7.0, torch.nan], dtype=torch.float64), equal_nan=True
    )
    assert (bound.improved(rows)[:, 1] == 2).all()


@pytest.mark.parametrize(
    ("knowledge", "message"),
    [
        (Knowledge([Sum({"z/bits": {4: 1.0, 8: 2.0}})]), "z/bits"),
        (Knowledge([Sum({"a/bits": {5: 1.0}})]), "no choice"),
        (Knowledge([Sum({"x": {1: 1.0}})]), "categorical"),
        (Knowledge([None], {"a/bits": {4: {"a/tile": "huge"}}}), "huge"),
        (Knowledge([None], fixed={"a/bits": 4, "a/tile": "odd", "x": 0.5}), "decided on"),
    ],
)
def test_wrong_knowledge_is_refused(knowledge: Knowledge, message: str) -> None:
    space = SearchSpace({"a/bits": SPACE["a/bits"], "a/tile": SPACE["a/tile"], "x": FloatDistribution(0, 1)})
    with pytest.raises(ConfigError, match=message):
        BoundKnowledge(knowledge, space)


def test_informed_outputs() -> None:
    """An exact output is its estimate; an estimate is corrected by a line; a score is scaled; noise has a spread."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(30, 4, generator=generator, dtype=torch.float64)
    e = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    y = torch.stack([e[:, 0], 0.2 + 0.9 * e[:, 1], 5 * e[:, 2] + x[:, 0], x[:, 1]], dim=1)
    given = e.clone()
    given[:, 3] = torch.nan
    kinds = ("exact", "estimate", "score", None)
    none = torch.zeros_like(y)
    model = InformedGP(x[:20], y[:20], given[:20], kinds, ([], [], [0], [0, 1]), none[:20], [0.0] * 4)
    posterior = model.posterior(x[20:], given[20:], none[20:])
    spread = posterior.covariance.diagonal(dim1=1, dim2=2).sqrt()
    assert (posterior.mean[:, 0] == e[20:, 0]).all()
    assert (spread[:, 0] == 0).all()
    assert (posterior.mean - y[20:]).abs()[:, 1].max() < 0.1
    assert (posterior.mean - y[20:])[:, 2].square().mean() < 0.1 * y[20:, 2].var()
    assert (posterior.mean - y[20:])[:, 3].square().mean() < 0.1 * y[20:, 3].var()
    assert (spread[:, 1:] > 0).all()


def test_what_a_count_adds_is_learned() -> None:
    generator = torch.Generator().manual_seed(0)
    e = torch.randn(30, 1, generator=generator, dtype=torch.float64)
    n = torch.randint(0, 6, (30, 1), generator=generator).double()
    y = 0.2 + 0.9 * e + 0.3 * n
    x = torch.rand(30, 2, generator=generator, dtype=torch.float64)
    model = InformedGP(x[:20], y[:20], e[:20], ("estimate",), ([],), counts=n[:20], steps=[0.0])
    blind = InformedGP(x[:20], y[:20], e[:20], ("estimate",), ([],), counts=0 * n[:20], steps=[0.0])
    assert (model.posterior(x[20:], e[20:], n[20:]).mean - y[20:]).abs().max() < 0.1
    assert (blind.posterior(x[20:], e[20:], 0 * n[20:]).mean - y[20:]).abs().max() > 0.3
    cheap = InformedGP(x[:20], 0.9 * e[:20] - 0.3 * n[:20], e[:20], ("estimate",), ([],), counts=n[:20], steps=[0.0])
    more = cheap.posterior(x[:1], e[:1], n[:1] + 1).mean - cheap.posterior(x[:1], e[:1], n[:1]).mean
    assert float(more) == 0.0  # what costs never costs less
    with pytest.raises(ConfigError, match=r"counts \(3, 1\)"):
        InformedGP(x[:20], y[:20], e[:20], ("estimate",), ([],), counts=n[:3], steps=[0.0])


@pytest.mark.parametrize("step", [0.0, 0.5])
def test_a_step_that_no_trial_tells_of_is_the_given_one(step: float) -> None:
    e = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    same = torch.ones_like(e)
    model = InformedGP(e, e, e, ("estimate",), ([],), counts=same, steps=[step])
    more = model.posterior(e, e, same + 1).mean - model.posterior(e, e, same).mean
    torch.testing.assert_close(more, torch.full_like(more, step))


def search(sampler: BaqeSampler, trials: int) -> tuple[list[FrozenTrial], list[float]]:
    study = optuna.create_study(directions=["minimize"] * 3, sampler=sampler)
    for _ in range(trials):
        trial = study.ask(SPACE)
        study.tell(trial, [error(trial.params), latency(trial.params), size(trial.params)])
    found = study.get_trials()
    values = torch.tensor([trial.values for trial in found])
    return found, [hypervolume(values[: n + 1], REFERENCE) for n in range(trials)]


def test_a_search_that_knows_tries_only_the_best_schedules_and_finds_the_front_sooner(knowledge: Knowledge) -> None:
    options = {"seed": 0, "mode": "beyond", "search_space": SPACE, "reference_point": REFERENCE}
    trials, informed = search(BaqeSampler(**options, knowledge=knowledge), 12)
    for trial in trials:
        assert all(trial.params[f"{layer}/tile"] == BEST[trial.params[f"{layer}/bits"]] for layer in LAYERS)
    assert len({tuple(sorted(trial.params.items())) for trial in trials}) == len(trials)
    again, _ = search(BaqeSampler(**options, knowledge=knowledge), 12)
    assert [trial.params for trial in again] == [trial.params for trial in trials]
    _, blind = search(BaqeSampler(**options), 12)
    assert informed[-1] > blind[-1]
    every = [
        dict(zip(SPACE, [*bits, *(BEST[b] for b in bits)], strict=True)) for bits in itertools.product(BITS, repeat=5)
    ]
    best = hypervolume(torch.tensor([[error(p), latency(p), size(p)] for p in every]), REFERENCE)
    assert informed[-1] > 0.97 * best


def test_directions_are_honoured(knowledge: Knowledge) -> None:
    turned = Knowledge(
        [None, knowledge.objectives[1], Sum({f"{x}/bits": {b: -b / 160 for b in BITS} for x in LAYERS}, kind="exact")],
        knowledge.best,
    )
    sampler = BaqeSampler(seed=0, mode="beyond", search_space=SPACE, knowledge=turned)
    study = optuna.create_study(directions=["minimize", "minimize", "maximize"], sampler=sampler)
    for _ in range(10):
        trial = study.ask(SPACE)
        study.tell(trial, [error(trial.params), latency(trial.params), -size(trial.params)])
    assert max(trial.values[2] for trial in study.get_trials()) == pytest.approx(-4 / 32)


def test_several_proposals_at_once_differ_and_spread(knowledge: Knowledge) -> None:
    sampler = BaqeSampler(seed=0, mode="beyond", search_space=SPACE, knowledge=knowledge, reference_point=REFERENCE)
    study = optuna.create_study(directions=["minimize"] * 3, sampler=sampler)
    for _ in range(5):
        trial = study.ask(SPACE)
        study.tell(trial, [error(trial.params), latency(trial.params), size(trial.params)])
    asked = [study.ask(SPACE) for _ in range(4)]
    assert len({tuple(sorted(trial.params.items())) for trial in asked}) == 4


def test_records_hold_everything(knowledge: Knowledge) -> None:
    again = Knowledge.from_record(json.loads(json.dumps(knowledge.record())))
    assert again == knowledge
    assert again.record() == knowledge.record()


def test_records_from_before_there_were_groups(knowledge: Knowledge) -> None:
    old = json.loads(json.dumps(knowledge.record()))
    for entry in filter(None, old["objectives"]):
        del entry["groups"], entry["step"]
    found = Knowledge.from_record(old)
    assert found.best == knowledge.best
    for entry, known in zip(found.objectives, knowledge.objectives, strict=True):
        assert (entry is None) == (known is None)
        if entry is not None and known is not None:
            assert (entry.terms, entry.groups, entry.step) == (known.terms, (), 0.0)


def test_paper_mode_takes_no_knowledge(knowledge: Knowledge) -> None:
    with pytest.raises(ConfigError, match="beyond"):
        BaqeSampler(mode="paper", knowledge=knowledge)
