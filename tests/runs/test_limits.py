"""Limits: what is feasible, and what no point can meet."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from lightning_baqe.errors import ConfigError, InfeasibleError
from lightning_baqe.runs.front import read_limits
from lightning_baqe.runs.limits import Reach, feasible, violations
from lightning_baqe.runs.summary import Trial

REACH = Reach((1000, 2000, 8000), (100.0, 150.0, 600.0), 9, 10, 0.95)
ENTRY = Trial(number=0, accuracy=0.9, latency_us=120.0, size_bytes=1500)


@given(
    st.dictionaries(st.sampled_from(["latency_us", "size_bytes"]), st.floats(1, 1e4)),
    st.none() | st.floats(0, 1),
)
def test_feasible_is_what_meets_every_limit(costs: dict[str, float], accuracy: float | None) -> None:
    limits = read_limits({**costs, "accuracy": accuracy})
    wanted = all(getattr(ENTRY, name) <= limit for name, limit in costs.items())
    wanted = wanted and (accuracy is None or ENTRY.triple[0] >= accuracy)
    assert feasible(ENTRY, limits) == wanted == all(value <= 0 for value in violations(ENTRY, limits).values())
    assert not feasible(ENTRY.model_copy(update={"state": "failed"}), limits)


def test_limits_that_make_no_sense() -> None:
    assert read_limits(None) == read_limits({"accuracy": None}) == {}
    for limits, match in (
        ({"latency": 3.0}, r"name \['latency'\], but wanted are some of \['latency_us', 'size_bytes', 'accuracy'\]"),
        ({"latency_us": -1.0}, "wanted is a number above 0"),
        ({"accuracy": 95.0}, r"For 95 percent give accuracy=0\.95"),
    ):
        with pytest.raises(ConfigError, match=match):
            read_limits(limits)


@pytest.mark.parametrize(
    ("limits", "match"),
    [
        ({"size_bytes": 999.0}, r"size_bytes <= 999 cannot be met: the nearest that can be reached is 1,000 \(all"),
        ({"latency_us": 80.0}, r"latency_us <= 80 cannot be met: the nearest .* is 100 \(the sum .* 9 of 10 kernels"),
        ({"latency_us": 8.0, "size_bytes": 9.0}, r"latency_us.*|size_bytes.*"),
    ],
)
def test_what_cannot_be_met_is_refused(limits: dict[str, float], match: str) -> None:
    with pytest.raises(InfeasibleError, match=match):
        REACH.check(limits)


@pytest.mark.parametrize(
    ("limits", "measured"),
    [
        ({"size_bytes": 1000.0, "latency_us": 100.0, "accuracy": 0.99}, []),
        ({"latency_us": 95.0}, []),  # within what an estimate may be wrong by
        ({"latency_us": 50.0}, [ENTRY.model_copy(update={"latency_us": 49.0})]),
        ({}, []),
    ],
)
def test_what_may_be_met_is_searched(limits: dict[str, float], measured: list[Trial]) -> None:
    REACH.check(limits, measured)


def test_unknown_latency_refuses_nothing() -> None:
    reach = Reach((1000, 2000, 8000), None, 0, 10, 0.95)
    reach.check({"latency_us": 0.001})
    assert "not measured" in shown(reach, {})


def shown(reach: Reach, limits: dict[str, float]) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(reach.table(limits))
    text = console.export_text()
    console.file.close()
    return text


def test_the_table_has_every_cost() -> None:
    text = shown(REACH, {"latency_us": 900.0})
    for part in ("1,000", "2,000", "8,000", "100", "150", "600", "<= 900", "9 of 10 kernels", "float: 0.9500"):
        assert part in text
