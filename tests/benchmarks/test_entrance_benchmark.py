"""``python -m lightning_baqe.benchmarks.entrance``."""

from __future__ import annotations

import re

import pytest

from lightning_baqe.benchmarks import entrance

REASONS = {
    "dict output": "InDict returns a dict.*output=",
    "pruning": r"'conv1' \(Conv2d\).*prune\.remove",
    "old weight norm": r"'conv1' \(Conv2d\).*remove_weight_norm",
    "old spectral norm": r"'conv1' \(Conv2d\).*remove_spectral_norm",
    "new weight norm": r"'conv1'.*remove_parametrizations",
    "lazy": r"'fc\.weight' is not initialised",
    "float64": r"float64.*\.float\(\)",
    "float16": r"float16.*\.float\(\)",
    "bfloat16": r"bfloat16.*\.float\(\)",
}


@pytest.mark.filterwarnings("ignore")  # of what is deprecated, and of loaders without processes
@pytest.mark.parametrize("way", entrance.WAYS)
def test_refusals_name_the_module_whichever_way_a_network_comes_in(way: str) -> None:
    for name, reason in REASONS.items():
        _, said = entrance.timed(name, way)
        assert re.search(reason, said), (name, said)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", entrance.WAYS)
def test_names_of_any_kind_and_wrappers_are_let_in(way: str, capsys: pytest.CaptureFixture[str]) -> None:
    entrance.main(["--networks", "names", "DataParallel", "--ways", way])
    found = re.findall(way + r"\s*│\s+\d+\.\d │(.*)│(.*)│", capsys.readouterr().out)
    assert [(state.strip(), why.strip()) for state, why in found] == [("", "")] * 2
