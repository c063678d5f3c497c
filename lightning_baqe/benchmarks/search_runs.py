"""One replay of one sampler on one problem, and what a proposal of one costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.samplers import BaseSampler

from lightning_baqe.benchmarks.synthetic import problem_named
from lightning_baqe.landscapes.problem import Problem
from lightning_baqe.search import (
    AnnealingSampler,
    BaqeSampler,
    NoisyImprovementOptions,
    NoisyImprovementSampler,
    PoolSearch,
    gaussian_process,
    nsga2,
    random_search,
    tpe,
)
from lightning_baqe.search.sampler import Initial, Mode

KEY = ("problem", "sampler", "seed", "trials", "initial", "noisy")  # what tells replays apart: arguments of `replay`
POOL_SIZE = 500  # BAQE III-C
INFORMED = "beyond"  # the sampler that is told what is known before any trial
Pool = Sequence[Mapping[str, Any]]
Maker = Callable[[int, Problem, Pool, int], BaseSampler]  # of seed, problem, pool and number of initial points


def _baqe(mode: Mode, initial: Initial = "ted", informed: bool = False) -> Maker:
    def make(seed: int, of: Problem, pool: Pool, n: int) -> BaseSampler:
        more: dict[str, Any] = {"initial": initial, "knowledge": of.knowledge() if informed else None}
        return BaqeSampler(seed, mode, of.distributions, pool, n, reference_point=of.reference_point, **more)

    return make


# Those of Optuna and random search know no pool.
POOLLESS = ("TPE", "NSGA-II", "Optuna GP")  # these begin with random points of the pool all the same: see `replay`
# With 128 samples and two restarts, its own defaults, a run takes 2.7 times as long.
NEHVI = NoisyImprovementOptions(n_samples=32, restarts=1)
SAMPLERS: dict[str, Maker] = {
    "random": lambda seed, of, pool, n: random_search(seed, of.distributions),
    "random of the pool": lambda seed, of, pool, n: PoolSearch(seed, of.distributions, pool, max(n, 2)),
    "SA+XGBoost": lambda seed, of, pool, n: AnnealingSampler(seed, of.distributions, pool, n),
    "TPE": lambda seed, of, pool, n: tpe(seed, of.distributions, n),
    "NSGA-II": lambda seed, of, pool, n: nsga2(seed, of.distributions, n),
    "Optuna GP": lambda seed, of, pool, n: gaussian_process(seed, of.distributions, n),
    "qLogNEHVI": lambda seed, of, pool, n: NoisyImprovementSampler(
        seed, of.distributions, pool, n, of.reference_point, NEHVI
    ),
    "paper": _baqe("paper"),
    "paper without TED": _baqe("paper", "random"),
    "beyond without knowledge": _baqe("beyond"),
    "beyond without TED": _baqe("beyond", "random", informed=True),
    INFORMED: _baqe("beyond", informed=True),
}


def replay(problem: str, sampler: str, seed: int, trials: int, initial: int, noisy: bool = False) -> dict[str, Any]:
    """Run a sampler on a problem.

    All samplers of a seed are given the same pool. Optuna's, which know none, are given random points of it to begin
    with, as its points span the space better than uniform ones do; "random" alone is uniform.

    Args:
        problem: name, for `problem_named`.
        sampler: name, of `SAMPLERS`.
        seed: of the sampler and of the pool.
        trials: of the study.
        initial: how many of them come before the first model.
        noisy: the study is told what repeated measurements would tell it; what is returned has no noise.

    Returns:
        `{"values": one list of objectives a trial, "propose_s": processor seconds of each proposal, "seconds": what
        each evaluation takes on the device, the first with what preparing took}`.
    """
    of = problem_named(problem)
    told = problem_named(problem, seed) if noisy else None
    pool = of.candidates(POOL_SIZE, np.random.default_rng([seed, 0]))
    made = SAMPLERS[sampler](seed, of, pool, initial)
    first = np.random.default_rng([seed, 1]).permutation(len(pool))[:initial] if sampler in POOLLESS else ()
    return follow(of, made, trials, [pool[index] for index in first], told)


def follow(
    of: Problem, made: BaseSampler, trials: int, first: Pool = (), told: Problem | None = None
) -> dict[str, Any]:
    """Run a study of a problem.

    Args:
        of: gives the values that are returned.
        made: proposes.
        trials: of the study.
        first: points that come before the sampler's.
        told: gives the values that the study is told; None: ``of``.

    Returns:
        what `replay` does.
    """
    study = optuna.create_study(directions=["minimize"] * len(of.objectives), sampler=made)
    for point in first:
        study.enqueue_trial(dict(point))
    values: list[list[float]] = []
    propose_s: list[float] = []
    seconds: list[float] = []
    space = dict(of.distributions)
    for _ in range(trials):
        started = time.process_time()
        trial = study.ask(space)
        propose_s.append(time.process_time() - started)
        values.append([float(value) for value in of.evaluate(trial.params)])
        prepared = of.preparation_s() if not seconds and getattr(made, "knowledge", None) is not None else 0.0
        seconds.append(prepared + float(of.seconds(trial.params)))
        study.tell(trial, values[-1] if told is None else [float(value) for value in told.evaluate(trial.params)])
    return {"values": values, "propose_s": propose_s, "seconds": seconds}


def proposing_seconds(layers: int, knobs: int, observed: int, mode: str, proposals: int) -> list[dict[str, float]]:
    """What a proposal costs with a given number of observed trials, at random points of `Additive`.

    Args:
        layers, knobs: of the space.
        observed: complete trials.
        mode: a name of `SAMPLERS`.
        proposals: how many are timed, each of another study.

    Returns:
        For each `{"cpu_s", "wall_s"}`.
    """
    of = problem_named(f"additive{layers}x{knobs}")
    space, found = dict(of.distributions), []
    for seed in range(proposals):
        pool = of.candidates(POOL_SIZE, np.random.default_rng([seed, 0]))
        sampler = SAMPLERS[mode](seed, of, pool, min(10, observed))
        study = optuna.create_study(directions=["minimize"] * len(of.objectives), sampler=sampler)
        # The sampler's own initial points, which a real search has evaluated by then, and others of the pool.
        for _ in range(min(10, observed)):
            trial = study.ask(space)
            study.tell(trial, of.evaluate(trial.params))
        seen = {tuple(sorted(trial.params.items())) for trial in study.trials}
        rest = [point for point in pool if tuple(sorted(point.items())) not in seen]
        for params in rest[: observed - len(study.trials)]:
            study.add_trial(optuna.create_trial(params=params, distributions=space, values=of.evaluate(params)))
        cpu, wall = time.process_time(), time.perf_counter()
        study.ask(space)
        found.append({"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall})
    return found
