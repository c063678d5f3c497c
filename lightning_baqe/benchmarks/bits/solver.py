"""The integer program and the whole curve: right, and how fast.

    python -m lightning_baqe.benchmarks.bits.solver

Small random problems, with ties and up to three budgets, against brute force; ResNet-101's size of problem with five
choices a layer and three budgets; all efficient allocations of ResNet-50 at 2 to 8 bits. Sensitivities and costs are
made up as networks have them; times are medians over seeds.
"""

from __future__ import annotations

import statistics
import sys
import time

import torchvision

from lightning_baqe.allocation.curve import allocate_front
from lightning_baqe.allocation.program import allocate_bits
from lightning_baqe.benchmarks.bits.instances import big, instance, smallest, sum_of
from lightning_baqe.benchmarks.setups import check_positive, console_of, parser_of, table_of
from lightning_baqe.errors import InfeasibleError
from lightning_baqe.hardware.target import cpu_name

MOST_S = {"ResNet-101, 5 choices, 3 budgets": 1.0, "front of ResNet-50, 2 to 8 bits": 10.0}


def is_right(seed: int) -> bool | None:
    """Whether the program finds what brute force does; None: it is infeasible, and both say so."""
    problem = instance(seed)
    wanted = smallest(problem)
    try:
        found = allocate_bits(**problem)
    except InfeasibleError:
        return None if wanted is None else False
    within = all(sum_of(problem["costs"][name], found) <= limit + 1e-12 for name, limit in problem["budgets"].items())
    sums_up = wanted is not None and abs(sum_of(problem["sensitivity"], found) - wanted) < 1e-11
    return sums_up and within


def program_s(seed: int) -> float:
    """Seconds of ResNet-101's size of problem; 1.0 gap would be an error."""
    sensitivity, costs = big(torchvision.models.resnet101(), (2, 3, 4, 6, 8), seed)
    budgets = {}
    for name, values in costs.items():
        low, high = (sum(f(of.values()) for of in values.values()) for f in (min, max))
        budgets[name] = low + (0.25 + 0.1 * (seed % 6)) * (high - low)
    start = time.perf_counter()
    found = allocate_bits(sensitivity, costs, budgets)
    seconds = time.perf_counter() - start
    if found.gap > 0:
        raise AssertionError(f"seed {seed}: the solver stopped {found.gap} above the bound")
    return seconds


def front_s(seed: int) -> tuple[float, int]:
    """Seconds of ResNet-50's front of latency, and its points."""
    sensitivity, costs = big(torchvision.models.resnet50(), tuple(range(2, 9)), seed)
    start = time.perf_counter()
    front = allocate_front(sensitivity, costs, "latency_us" if seed % 2 else "size_bytes")
    return time.perf_counter() - start, len(front)


def main(arguments: list[str] | None = None) -> int:
    """The command line.

    Returns:
        0 if every answer is right and no time is above :data:`MOST_S`, else 1.
    """
    parser = parser_of(__doc__)
    parser.add_argument("--instances", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=12, help="of the large problems")
    options = parser.parse_args(arguments)
    check_positive(parser, options, "instances", "seeds")
    console = console_of(120)
    answers = [is_right(seed) for seed in range(options.instances)]
    wrong = answers.count(False)
    console.print(
        f"{options.instances} random problems: {answers.count(True)} optima as by brute force, {answers.count(None)} "
        f"infeasible, {wrong} wrong"
    )
    fronts = [front_s(seed) for seed in range(options.seeds)]
    times = dict(zip(MOST_S, ([program_s(seed) for seed in range(options.seeds)], [s for s, _ in fronts]), strict=True))
    rows = (
        [name, f"{statistics.median(found):.2f}", f"{min(found):.2f}", f"{max(found):.2f}", MOST_S[name]]
        for name, found in times.items()
    )
    title = f"seconds, {options.seeds} seeds, one thread of {cpu_name()}"
    console.print(table_of(title, ("problem", "median", "least", "most", "wanted"), ("problem",), rows))
    console.print(f"The fronts have {min(n for _, n in fronts)} to {max(n for _, n in fronts)} points.")
    slow = [name for name, found in times.items() if statistics.median(found) > MOST_S[name]]
    return int(bool(wrong or slow))


if __name__ == "__main__":
    sys.exit(main())
