"""The integer program that spends budgets on bits (HAWQ-V3, section III-E, equations 11 to 14), solved by HiGHS."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import highspy
import numpy as np
from scipy import sparse

from lightning_baqe.allocation.choices import Allocation, Choices, Pairs, Values, total
from lightning_baqe.errors import BaqeError, ConfigError, InfeasibleError
from lightning_baqe.quantization.config import near

_SAME = 1e-12  # of a budget, by which a sum may be above it
_SCALE = 1e4  # of the objective: the solver's absolute gap is then 1e-13 of the largest possible sum
_TOLERANCE = 1e-9


def allocate_bits(
    sensitivity: Values,
    costs: Mapping[str, Values],
    budgets: Mapping[str, float],
    tied: Iterable[Iterable[str]] = (),
    fixed: Mapping[str, int] | None = None,
    pairs: Pairs | None = None,
    time_limit_s: float = 60.0,
) -> Allocation:
    """Bits for each layer that keep every budget with the smallest sum of sensitivities.

    Without ``pairs`` the sum is the smallest possible. With them the program is quadratic; each product of two choices
    becomes a variable, bound to both by sums that make the relaxation tight (Adams and Sherali, 1986), and what the
    time limit leaves open is the allocation's ``gap``.

    Args:
        sensitivity: ``{layer: {bits: value}}``; negative values are taken as they are.
        costs: ``{cost: {layer: {bits: value}}}``, each the sum over layers; a layer may have values for more bits.
        budgets: ``{cost: limit}``, of any of the costs.
        tied: groups of layers that must have the same bits.
        fixed: ``{layer: its bits}``, of those that have no choice.
        pairs: what two layers add together: ``{(layer, layer): {(bits, bits): value}}``; 0 where nothing is given.
        time_limit_s: of the solver, seconds.

    Raises:
        ConfigError: values that are missing or no finite numbers, unknown names, ties without a common choice.
        InfeasibleError: no allocation keeps the budgets; names them, and the smallest that each could be.
        BaqeError: the time limit came before any allocation was found.
    """
    choices = Choices.of(sensitivity, costs, tied, fixed)
    for name, limit in budgets.items():
        if name not in costs:
            raise ConfigError(
                f"budgets names {name!r}, but costs has {', '.join(costs) or 'none'}{near(name, tuple(costs))}"
            )
        if not math.isfinite(limit):
            raise ConfigError(f"budgets[{name!r}]={limit}: a finite number is wanted, or leave it out")
    if not time_limit_s > 0:
        raise ConfigError(f"time_limit_s={time_limit_s!r}, but seconds above 0 are wanted")
    for name, limit in budgets.items():
        least = math.fsum(float(of_group.min()) for of_group in choices.costs[name])
        if not _keeps(least, limit):
            raise InfeasibleError(
                f"budget {name}={limit:.12g} is too small: the smallest that these bits can reach is {least:.12g}"
            )
    program = _Program(choices, choices.sensitivity, dict(budgets), _by_group(choices, pairs or {}), time_limit_s)
    found = program.solve()
    if found is None:
        raise InfeasibleError(_tightest(choices, dict(budgets), time_limit_s))
    chosen, gap = found
    return choices.allocation(chosen, program.pairs_of(chosen), gap)


def _keeps(cost: float, limit: float) -> bool:
    return cost <= limit + _SAME * abs(limit)


def _tightest(choices: Choices, budgets: Mapping[str, float], time_limit_s: float) -> str:
    """Why budgets cannot be kept together: the smallest that each could be beside the others."""
    parts = []
    for name in budgets:
        others = {other: limit for other, limit in budgets.items() if other != name}
        found = _Program(choices, choices.costs[name], others, {}, time_limit_s).solve()
        if found is not None:
            parts.append(f"{name} at least {total(choices.costs[name], found[0]):.12g}")
    given = ", ".join(f"{name}={limit:.12g}" for name, limit in budgets.items())
    needs = f"; with the others as they are, {' or '.join(parts)} would do" if parts else ""
    return f"the budgets {given} cannot be kept together{needs}: give more for one of them"


def _budget_row(costs: Sequence[np.ndarray], limit: float) -> tuple[np.ndarray, float]:
    """Coefficients of all options and the largest sum, scaled so that sums are at most 1.

    Sums of whole numbers lie on a grid: the largest within the limit, and half a step, is no other bound, and one that
    the solver can tell. Others get its tolerance; what it finds is checked.
    """
    above = [of_group - of_group.min() for of_group in costs]
    left = limit + _SAME * abs(limit) - math.fsum(float(of_group.min()) for of_group in costs)
    scale = sum(float(of_group.max()) for of_group in above) or 1.0
    flat, most = np.concatenate(above), left / scale + _TOLERANCE
    if (flat == np.round(flat)).all() and scale < 2.0**53:
        step = math.gcd(*(int(value) for value in flat)) or 1
        if step / scale > 4 * _TOLERANCE:
            most = (math.floor(left / step) + 0.5) * step / scale
    return flat / scale, most


_Row = tuple[np.ndarray, np.ndarray, float, float]  # columns, their values, the least and the most of the sum
_PairValues = Mapping[tuple[int, int], np.ndarray]  # {(group, later group): (options, options)}


def _by_group(choices: Choices, pairs: Pairs) -> dict[tuple[int, int], np.ndarray]:
    """The values of pairs, by pairs of groups; within one group only equal bits meet."""
    group_of = {name: g for g, group in enumerate(choices.groups) for name in group}
    found: dict[tuple[int, int], np.ndarray] = {}
    for (one, other), values in pairs.items():
        for name in (one, other):
            if name not in group_of:
                raise ConfigError(f"pairs names layer {name!r}, which sensitivity has not{near(name, choices.layers)}")
        if one == other:
            raise ConfigError(f"pairs has {one!r} with itself: what one layer adds is its sensitivity")
        g, h = group_of[one], group_of[other]
        matrix = np.array([[_pair(values, a, b, one, other) for b in choices.options[h]] for a in choices.options[g]])
        key, matrix = ((g, h), matrix) if g <= h else ((h, g), matrix.T)
        found[key] = found.get(key, 0.0) + (np.diag(np.diag(matrix)) if g == h else matrix)
    return found


def _pair(values: Mapping[tuple[int, int], float], a: int, b: int, one: str, other: str) -> float:
    value = float(values.get((a, b), 0.0))
    if not math.isfinite(value):
        raise ConfigError(f"pairs of {one!r} and {other!r} at {a} and {b} bits is {value}: a finite number is wanted")
    return value


@dataclass
class _Program:
    """Minimise the sum of one value by group, and of pairs, within budgets.

    | variable | meaning | shape |
    | --- | --- | --- |
    | x | 1 for the option that a group has | (groups, its options) |
    | y | 1 for the options that two groups have | (pairs of groups, options, options) |
    """

    choices: Choices
    values: Sequence[np.ndarray]
    budgets: Mapping[str, float]
    pairs: _PairValues
    time_limit_s: float
    _rows: list[_Row] = field(default_factory=list)
    _scale: float = 1.0  # of the objective

    def pairs_of(self, chosen: Sequence[int]) -> float:
        """What pairs add."""
        return math.fsum(float(matrix[chosen[g], chosen[h]]) for (g, h), matrix in self.pairs.items())

    def solve(self) -> tuple[list[int], float] | None:
        """The options by group, and the gap; None: infeasible.

        Raises:
            BaqeError: nothing was found in time, or the solver failed.
        """
        starts = np.concatenate([[0], np.cumsum([len(v) for v in self.values])])
        objective, integral = self._objective(), int(starts[-1])
        for first, last in itertools.pairwise(starts):
            columns = np.arange(first, last)
            self._rows.append((columns, np.ones(len(columns)), 1.0, 1.0))
        for name, limit in self.budgets.items():
            values, most = _budget_row(self.choices.costs[name], limit)
            self._rows.append((np.arange(integral), values, -np.inf, most))
        self._bind_pairs(starts)
        deadline = time.monotonic() + self.time_limit_s
        while True:
            solved = self._run(objective, integral, max(deadline - time.monotonic(), 0.0))
            if solved is None:
                return None
            x, gap = solved
            chosen = [int(x[first:last].argmax()) for first, last in itertools.pairwise(starts)]
            if all(_keeps(total(self.choices.costs[name], chosen), limit) for name, limit in self.budgets.items()):
                return chosen, gap / self._scale
            # Above a budget by less than the solver can tell: never this one again.
            columns = starts[:-1] + np.array(chosen)
            self._rows.append((columns, np.ones(len(columns)), -np.inf, len(columns) - 1.0))

    def _objective(self) -> np.ndarray:
        # One option is chosen in each group, so that its smallest value may be taken off.
        parts = [v - v.min() for v in self.values] + [matrix.ravel() for matrix in self.pairs.values()]
        flat = np.concatenate(parts)
        largest = sum(np.abs(part).max() for part in parts)
        self._scale = _SCALE / largest if largest > 0 else 1.0
        return flat * self._scale

    def _bind_pairs(self, starts: np.ndarray) -> None:
        place = int(starts[-1])
        for (g, h), matrix in self.pairs.items():
            y = np.arange(place, place + matrix.size).reshape(matrix.shape)
            place += matrix.size
            for group, of_option in ((g, y), (h, y.T)):
                for k, columns in enumerate(of_option):
                    row = np.concatenate([columns, [starts[group] + k]])
                    self._rows.append((row, np.concatenate([np.ones(len(columns)), [-1.0]]), 0.0, 0.0))

    def _run(self, objective: np.ndarray, integral: int, seconds: float) -> tuple[np.ndarray, float] | None:
        count = len(objective)
        ends = np.cumsum([0, *(len(columns) for columns, *_ in self._rows)])
        matrix = sparse.csr_matrix(
            (np.concatenate([v for _, v, _, _ in self._rows]), np.concatenate([c for c, *_ in self._rows]), ends),
            shape=(len(self._rows), count),
        )
        model = highspy.HighsLp()
        model.num_col_, model.num_row_ = count, len(self._rows)
        model.col_cost_, model.col_lower_, model.col_upper_ = objective, np.zeros(count), np.ones(count)
        model.row_lower_ = np.array([least for _, _, least, _ in self._rows])
        model.row_upper_ = np.array([most for _, _, _, most in self._rows])
        model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        model.a_matrix_.start_, model.a_matrix_.index_ = matrix.indptr, matrix.indices
        model.a_matrix_.value_ = matrix.data
        kinds = highspy.HighsVarType
        model.integrality_ = [kinds.kInteger] * integral + [kinds.kContinuous] * (count - integral)
        solver = highspy.Highs()
        options = {"output_flag": False, "threads": 1, "random_seed": 0, "time_limit": seconds,
                   "mip_rel_gap": 0.0, "mip_abs_gap": _TOLERANCE, "mip_feasibility_tolerance": _TOLERANCE,
                   "primal_feasibility_tolerance": _TOLERANCE, "dual_feasibility_tolerance": 1e-10}  # fmt: skip
        for name, value in options.items():
            solver.setOptionValue(name, value)
        solver.passModel(model)
        solver.run()
        status, info = solver.getModelStatus(), solver.getInfo()
        if status == highspy.HighsModelStatus.kInfeasible:
            return None
        if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
            reason = solver.modelStatusToString(status)
            raise BaqeError(
                f"HiGHS found no allocation in time_limit_s={self.time_limit_s:g} ({reason}): give more seconds"
            )
        is_optimal = status == highspy.HighsModelStatus.kOptimal
        gap = 0.0 if is_optimal else info.objective_function_value - info.mip_dual_bound
        return np.array(solver.getSolution().col_value), gap
