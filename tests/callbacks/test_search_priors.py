"""What a search orders bits by before its first trial."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from fake_device import FakeDevice

from lightning_baqe.errors import ConfigError
from lightning_baqe.runs.search_arguments import PRIORS
from lightning_baqe.runs.study import KNOWLEDGE
from lightning_baqe.search.knowledge import Knowledge

Make = Callable[..., Any]
pytestmark = pytest.mark.filterwarnings("ignore:Hessian traces of .* below their standard errors")


@pytest.mark.parametrize("prior", PRIORS)
def test_a_search_begins_with_it(
    prior: str, tmp_path: Path, foreign: Make, search: Make, fit: Make, digits: Any, made_up_device: FakeDevice
) -> None:
    options = {"mode": "beyond", "bit_choices": (2, 4, 8), "trials": 2, "measure_on": made_up_device, "baselines": ()}
    fit(foreign(), search(prior=prior, **options), digits)
    study = optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path / 'run' / 'study.db'}")
    assert study.user_attrs["conditions"]["prior"] == (None if prior == "divergence" else prior)
    known = Knowledge.from_record(study.user_attrs[KNOWLEDGE])
    error = known.objectives[0]
    assert error.terms.keys() == {"block.conv1/bits", "block.conv2/bits"}
    for by_bits in error.terms.values():
        assert by_bits.keys() == {2, 4, 8}
        assert by_bits[2] > by_bits[8] >= 0
    with pytest.raises(ConfigError, match="prior"):  # a study goes on with what it began with
        fit(foreign(), search(prior="fisher" if prior != "fisher" else "scales", **options), digits)


def test_an_unknown_one(search: Make) -> None:
    with pytest.raises(
        ConfigError, match="prior='trace', wanted is one of 'divergence', 'hessian', 'fisher', 'scales'"
    ):
        search(prior="trace")


def test_where_it_would_be_ignored_or_wrong(search: Make) -> None:
    with pytest.raises(ConfigError, match="prior='fisher' with mode='paper'"):
        search(prior="fisher", mode="paper")
