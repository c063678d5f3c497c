"""The sampler that runs BAQE's exploration (Algorithm 2) inside any Optuna study.

Rows are points as internal values of the search space, `n x d`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from optuna.study import Study
from optuna.trial import FrozenTrial
from torch.nn.functional import pad

from lightning_baqe.errors import ConfigError
from lightning_baqe.search.acquisition import (
    best_candidate,
    expected_hypervolume_improvement,
    log_expected_improvement,
    nondominated_cells,
    refine,
)
from lightning_baqe.search.informed import InformedGP
from lightning_baqe.search.initial_design import ted
from lightning_baqe.search.knowledge import BoundKnowledge, Knowledge
from lightning_baqe.search.pareto import as_reference_point, default_reference_point, pareto_mask
from lightning_baqe.search.pool import breed, spanning_rows, unseen
from lightning_baqe.search.space import Distributions, Key, Rows, SearchSpace
from lightning_baqe.search.study_sampler import History, StudySampler, repeated_point, signs
from lightning_baqe.search.surrogate import ArdGP, ArdOptions, DeepKernelGP, DeepKernelOptions, Posterior, standardise

Mode = Literal["paper", "beyond"]
Initial = Literal["ted", "random"]
Candidates = Sequence[Mapping[str, Any]] | Callable[[int, np.random.Generator], list[dict[str, Any]]]
Moments = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

_REFILLS = 10


@dataclass(frozen=True)
class SamplerOptions:
    """What is rarely changed.

    Attributes:
        deep_kernel: surrogate of mode "paper".
        ard: surrogate of mode "beyond".
        n_samples: posterior samples for the expected improvement, best a power of two.
        share_concentration: Dirichlet alpha of the generic pool.
        children: candidates bred in each round of mode "beyond".
        rounds: first from the front, then from the best candidates of the rounds before.
        elite: how many best candidates are parents of the next round.
        refined: best candidates that are moved uphill in their continuous parameters, if there are any.
        informed_initial: points of the initial design in mode "beyond" with knowledge, if `n_initial` is more.
    """

    deep_kernel: DeepKernelOptions = field(default_factory=DeepKernelOptions)
    ard: ArdOptions = field(default_factory=ArdOptions)
    n_samples: int = 128
    share_concentration: float = 0.5
    children: int = 500
    rounds: int = 3
    elite: int = 20
    refined: int = 10
    informed_initial: int = 4

    def __post_init__(self) -> None:
        counts = (self.n_samples, self.children, self.rounds, self.elite, self.refined, self.informed_initial)
        if min(counts) < 1 or not self.share_concentration > 0:
            raise ConfigError(f"{self}; wanted all positive")


class BaqeSampler(StudySampler):
    """TED initial design, then Bayesian optimisation of the hypervolume over a pool. BAQE III-C to III-E.

    Phases of a trial, stored in its system attribute `"baqe:phase"` and read by `phase`:
    "random" while the search space is unknown (and for a space whose points were all tried); "ted" until each of the
    first `n_initial` TED picks is in the study, and until two trials are complete (with `initial="random"` these are
    "random", too); "bo" after that.

    The study is the only memory: all randomness comes from (seed, trial number), so the same study gives the same
    proposal, in this process or in the next. Points of trials in any state, failed and running ones too, are not
    proposed again. Workers propose one after the other, also those in several processes that share an SQLite file or a
    PostgreSQL database (:mod:`~lightning_baqe.search.study_lock`), so that no two get the same point.

    Objectives follow the study's directions. Constraints are those of `trial.set_constraint`: infeasible trials train
    the surrogate and are kept off the front. A complete trial with an infinite value is left out of the surrogate.

    Args:
        seed: of everything, at least 0.
        mode: "paper": pool of fixed candidates, deep-kernel multi-task GP. "beyond": new candidates are bred from the
            front for each trial, one ARD GP per objective.
        search_space: name -> distribution. Without it the first trial is random, and from then on the parameters that
            all complete trials share are searched; others (conditional ones) are drawn at random.
        candidates: the pool: parameter dicts, or a function (n, generator) -> dicts that must be deterministic;
            instead of the generic pool. They must hold every searched parameter. Once all were tried, a list is
            followed by generic candidates, a function is called again.
        n_initial: TED picks; fewer where the pool is smaller. 0 where the first points are given by hand.
        pool_size: size of the pool, where it is not a list.
        mu: regularisation of TED.
        reference_point: in the study's units, orientation and order; None derives one from the front at each trial
            (`default_reference_point`).
        options: the rest.
        initial: "ted", or "random": the first points are random ones of the pool instead (BAQE's tables V and VI).
        knowledge: mode "beyond" alone: what needs no trial. Parameters that others decide on are not searched,
            surrogates learn what the estimates leave, and the initial design is short (`informed_initial`).

    Raises:
        ConfigError: an argument is out of range; on a proposal, candidates or the reference point do not fit the study.
    """

    def __init__(
        self,
        seed: int = 0,
        mode: Mode = "beyond",
        search_space: Distributions | None = None,
        candidates: Candidates | None = None,
        n_initial: int = 10,
        pool_size: int = 500,
        mu: float = 0.1,
        reference_point: Sequence[float] | None = None,
        options: SamplerOptions | None = None,
        initial: Initial = "ted",
        knowledge: Knowledge | None = None,
    ) -> None:
        if mode not in get_args(Mode):
            raise ConfigError(f"mode={mode!r}; wanted one of {get_args(Mode)}")
        if initial not in get_args(Initial):
            raise ConfigError(f"initial={initial!r}; wanted one of {get_args(Initial)}")
        super().__init__(seed, search_space)
        if n_initial < 0 or pool_size < max(n_initial, 1) or not mu > 0:
            raise ConfigError(
                f"n_initial={n_initial}, pool_size={pool_size}, mu={mu}; "
                "wanted 0 <= n_initial <= pool_size, pool_size >= 1 and mu > 0"
            )
        if candidates is not None and not callable(candidates) and not candidates:
            raise ConfigError("candidates is an empty list; wanted parameter dicts, or None for the generic pool")
        if knowledge is not None and mode != "beyond":
            raise ConfigError(f"knowledge was given, but mode {mode!r} learns from trials alone; wanted mode='beyond'")
        self.mode: Mode = mode
        self.knowledge = knowledge
        self.candidates = candidates
        self.n_initial = n_initial
        self.pool_size = pool_size
        self.mu = mu
        self.reference_point = None if reference_point is None else tuple(float(v) for v in reference_point)
        self.options = options or SamplerOptions()
        self.initial: Initial = initial
        # A function of the arguments alone, kept to save time: space -> generation -> rows.
        self._pools: dict[tuple[tuple[str, str], ...], dict[int, Rows]] = {}
        self._bound: dict[tuple[tuple[str, str], ...], BoundKnowledge] = {}

    def _propose(self, study: Study, trial: FrozenTrial, space: SearchSpace) -> tuple[Key, str]:
        number = trial.number
        history = History.read(study, space, exclude=number)
        n_initial = self.n_initial if self.knowledge is None else min(self.n_initial, self.options.informed_initial)
        pick = self._initial_pick(space, history, n_initial)
        if pick is None and len(history.rows) < 2:
            # Too little to fit: many trials failed, or all are still running. Follow the initial order further.
            pick = self._initial_pick(space, history, n_initial + len(history.seen) + 1)
        if pick is not None:
            return pick, self.initial
        generations = (unseen(self._pool(space, generation), history.seen) for generation in range(_REFILLS))
        free = next((rows for rows in generations if len(rows)), None)
        if free is None:
            return repeated_point(space, history, self._rng(2, number)), "random"
        if len(history.rows) < 2:
            return tuple(free[0].tolist()), self.initial
        return self._maximise_improvement(study, number, space, history, free), "bo"

    def _known(self, space: SearchSpace) -> BoundKnowledge | None:
        """The knowledge about this space."""
        if self.knowledge is not None and space.signature not in self._bound:
            self._bound[space.signature] = BoundKnowledge(self.knowledge, space)
        return self._bound.get(space.signature)

    def _pool(self, space: SearchSpace, generation: int) -> Rows:
        """Candidates of a generation; 0 is the fixed pool, later ones refill it once all were tried."""
        pools = self._pools.setdefault(space.signature, {})
        if generation not in pools:
            rng, known = self._rng(0, generation), self._known(space)
            if self.candidates is None or (generation and not callable(self.candidates)):
                rows = spanning_rows(space, self.pool_size, rng, self.options.share_concentration)
            else:
                given = self.candidates(self.pool_size, rng) if callable(self.candidates) else self.candidates
                rows = self._checked(given, space)
            if known is not None:
                rows = np.concatenate([known.improved(rows), known.uniform()])
            pools[generation] = unseen(rows, set())
        return pools[generation]

    def _checked(self, given: Sequence[Mapping[str, Any]], space: SearchSpace) -> Rows:
        if not given:
            raise ConfigError(f"candidates(n={self.pool_size}, generator) gave none; wanted parameter dicts")
        if self.search_space is not None:
            unknown = sorted({name for point in given for name in point} - set(self.search_space))
            if unknown:
                raise ConfigError(f"candidates name {unknown[:5]}, which search_space does not; wanted the same names")
        return np.array([space.internal(point) for point in given], dtype=np.float64)

    def _initial_pick(self, space: SearchSpace, history: History, m: int) -> Key | None:
        """The first of the m initial points that no trial holds."""
        pool = self._pool(space, 0)
        m = min(m, len(pool))
        if self.initial == "random":
            order = self._rng(5).permutation(len(pool))[:m]
        else:
            known = self._known(space)
            columns = slice(None) if known is None else space.columns(known.free)
            order = ted(space.encode(pool)[:, columns], m, self.mu).numpy()
        free = unseen(pool[order], history.seen)
        return tuple(free[0].tolist()) if len(free) else None

    def _maximise_improvement(self, study: Study, number: int, space: SearchSpace, history: History, free: Rows) -> Key:
        """Algorithm 2, lines 12 and 13."""
        values, constraints, reference, mean, scale = standard_units(study, history, self.reference_point)
        front = values[history.feasible]
        front = front[pareto_mask(front)]
        outputs = torch.cat([values, constraints], dim=1)
        if self.mode == "paper":
            seed = self._derived(3, number)
            model = DeepKernelGP(space.encode(history.rows), outputs, self.options.deep_kernel, seed)
            posterior = model.posterior(space.encode(free))
            n_constraints, n_samples = constraints.shape[1], self.options.n_samples
            improvement = expected_hypervolume_improvement(
                *posterior, front, reference, n_constraints=n_constraints, n_samples=n_samples, seed=seed
            )
            return tuple(free[best_candidate(improvement, posterior.covariance)].tolist())
        predict, moments = self._surrogate(study, space, history, outputs, mean, scale)
        if len(history.pending):
            # What runs is taken to end as predicted, so that several proposals do not want the same improvement.
            front = torch.cat([front, predict(history.pending).mean[:, : values.shape[1]]])
            front = front[pareto_mask(front)]
        cells = nondominated_cells(front, reference)

        def score(rows: Rows) -> torch.Tensor:
            posterior = predict(rows)
            return log_expected_improvement(posterior.mean, posterior.covariance.diagonal(dim1=1, dim2=2), cells)

        def joined(rows: Rows) -> tuple[Rows, torch.Tensor]:
            """The candidates and their scores, with those of the rows that are new."""
            new = unseen(rows, history.seen | set(map(tuple, free.tolist())))
            return (np.concatenate([free, new]), torch.cat([scores, score(new)])) if len(new) else (free, scores)

        n_pool, scores = len(free), score(free)
        parents, rng = history.best_rows, self._rng(4, number)
        for _ in range(self.options.rounds):
            free, scores = joined(self._children(space, parents, rng))
            elite = scores.argsort(descending=True, stable=True)[: self.options.elite]
            parents = free[elite.numpy()]
        if moments is not None:
            # Half of the starts are of the spread pool, as bred candidates may all lie in one basin.
            pool = scores[:n_pool].argsort(descending=True, stable=True)[: self.options.refined // 2]
            starts = torch.cat([elite[: self.options.refined - len(pool)], pool])
            moved = refine(space, free[starts.numpy()], lambda x: log_expected_improvement(*moments(x), cells))
            free, scores = joined(moved)
        return tuple(free[int(scores.argmax())].tolist())

    def _children(self, space: SearchSpace, parents: Rows, rng: np.random.Generator) -> Rows:
        """Children of parents; with knowledge, of what is free in them, the rest at its best."""
        known, n = self._known(space), self.options.children
        if known is None:
            return breed(space, parents, n, rng)
        rows = np.repeat(parents[:1], n, axis=0)
        rows[:, known.free] = breed(space.subspace(known.free), parents[:, known.free], n, rng)
        return known.improved(rows)

    def _surrogate(
        self,
        study: Study,
        space: SearchSpace,
        history: History,
        outputs: torch.Tensor,
        mean: torch.Tensor,
        scale: torch.Tensor,
    ) -> tuple[Callable[[Rows], Posterior], Moments | None]:
        """Mode "beyond": a model of the standardised outputs, objectives first, fitted to the history.

        Its moments at encoded points, with gradients, where it has them.
        """
        x, known = space.encode(history.rows), self._known(space)
        if known is None:
            model = ArdGP(x, outputs, self.options.ard)
            return lambda rows: model.posterior(space.encode(rows)), model.moments
        constraints = outputs.shape[1] - len(mean)
        entries = [*known.knowledge.objectives, *[None] * constraints]
        if len(entries) != outputs.shape[1]:
            raise ConfigError(f"knowledge is of {len(entries) - constraints} objectives, the study has {len(mean)}")

        def estimates(rows: Rows) -> torch.Tensor:
            return pad((known.estimates(rows) * signs(study) - mean) / scale, (0, constraints), value=torch.nan)

        def counts(rows: Rows) -> torch.Tensor:
            return pad(known.counts(rows) * signs(study), (0, constraints))

        every, names = range(len(space.names)), {name: index for index, name in enumerate(space.names)}
        columns = [
            space.columns(every if entry is None else [names[name] for name in entry.rest if name in names])
            for entry in entries
        ]
        kinds = [None if entry is None else entry.kind for entry in entries]
        # Where a point is not at its best, sums say nothing of it.
        given = estimates(history.rows)
        given[(known.improved(history.rows) != history.rows).any(1)] = torch.nan
        steps = [entry.step / float(scale[i]) if entry else 0.0 for i, entry in enumerate(entries)]
        informed = InformedGP(x, outputs, given, kinds, columns, counts(history.rows), steps, self.options.ard)
        return lambda rows: informed.posterior(space.encode(rows), estimates(rows), counts(rows)), None


def standard_units(
    study: Study, history: History, reference_point: Sequence[float] | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a study has seen, as models take it; without a reference point, that is `default_reference_point`.

    Returns:
        Values, minimised and standardised, `n x m`; constraints, scaled, `n x c`; the reference point in the units of
        the values; and the mean and the scale of each objective, minimised.

    Raises:
        ConfigError: the reference point does not fit the study.
    """
    values, mean, scale = standardise(history.values)
    # Constraints are scaled and not shifted: zero stays the border.
    constraints = history.constraints / standardise(history.constraints)[2]
    if reference_point is None:
        return values, constraints, default_reference_point(values), mean, scale
    given = as_reference_point(reference_point, len(study.directions)) * signs(study)
    return values, constraints, (given - mean) / scale, mean, scale
