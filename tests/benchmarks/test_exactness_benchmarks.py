"""The benchmarks of exactness, coverage and analytic costs in their smallest form."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from rich.console import Console

from lightning_baqe.benchmarks import analytic, coverage, exactness
from lightning_baqe.errors import ConfigError


def test_coverage_knows_every_family() -> None:
    families = {
        "torchvision": {
            torchvision.models.get_model_builder(name).__module__.rpartition(".")[2]
            for name in torchvision.models.list_models(module=torchvision.models)
        },
        "timm": set(timm.list_modules()),
    }
    for library, found in families.items():
        cnns, others = (set(coverage.FAMILIES[library][kind]) for kind in ("cnns", "others"))
        assert not cnns & others
        assert found == cnns | others, f"{library} has other families: sort {sorted(found ^ (cnns | others))} into them"
    for kind in ("cnns", "others"):
        for family, member in coverage.FAMILIES["timm"][kind].items():
            name = member["name"] if isinstance(member, dict) else member
            assert name in timm.list_models(module=family)


def test_coverage_row_and_share(tmp_path: Path) -> None:
    console = Console(record=True, width=200)
    wanted = [("torchvision", "cnns", "squeezenet")]
    rows = coverage.run(wanted, tmp_path, 1, 550.0, console)  # over 170 s on a busy machine
    assert [(row.member, row.reached, row.floats) for row in rows] == [("squeezenet1_1", "match", 0)]
    assert coverage.report(rows, console)
    kept = (tmp_path / "rows.jsonl").read_text()
    assert coverage.run(wanted, tmp_path, 1, 0.0, console) == rows  # nothing is tried again
    assert (tmp_path / "rows.jsonl").read_text() == kept
    failed = dataclasses.replace(rows[0], reached="quantize", error="an error")
    assert not coverage.report([failed], console)
    assert not coverage.report([dataclasses.replace(rows[0], floats=1)], console)
    assert not coverage.report([rows[0]] * 99 + [dataclasses.replace(failed, error="CRASH, exit status -11")], console)


def test_coverage_says_what_took_too_long(tmp_path: Path) -> None:
    (row,) = coverage.run([("timm", "cnns", "vgg")], tmp_path, 1, 0.1, Console(record=True))
    assert (row.reached, row.error) == ("", "took more than 0 s")


def test_exactness_of_a_small_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.json"
    arguments = ["model=shufflenet_v2_x0_5", "size=32", "images=2", "weight=mixed", f"json={out}"]
    assert exactness.main(arguments) == 0
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) > 30
    alone = [row["alone"] for row in rows]
    assert max(row["largest"] for row in alone) <= 1
    assert min(row["equal"] for row in alone) > 0.99
    assert {row["compiled"] for row in rows} == {0}
    assert "top-1 equal" in capsys.readouterr().out


def test_exactness_sees_a_difference() -> None:
    a = torch.tensor([[0, 5, 9]])
    assert exactness.agreement(a, a, 3) == exactness.Agreement(0, 1.0, pytest.approx(1.0))
    other = exactness.agreement(a, torch.tensor([[0, 7, 9]]), 0)
    assert (other.largest, other.equal) == (2, pytest.approx(2 / 3))
    assert other.cosine < 1


def test_exactness_names_a_wrong_key() -> None:
    with pytest.raises(ConfigError, match="did you mean 'weight'"):
        exactness.main(["wieght=4"])


def test_analytic_costs_of_resnet18() -> None:
    rows = analytic.rows("resnet18")
    assert [row.width for row in rows] == list(analytic.WIDTHS)
    assert all(row.fits() == (True, True) for row in rows)
    wrong = dataclasses.replace(rows[0], gbops=rows[0].gbops * 1.05)
    assert wrong.fits() == (True, False)
    # Biases and requantization numbers: 4 bytes of bias, 8 of multiplier and fraction for each channel.
    extra = (rows[1].size_mb - rows[1].weights_mb) * 2**20
    assert 12 * 4800 < extra < 13 * 5800


def test_resnet50_is_v1() -> None:
    module = analytic.paper_network("resnet50")
    assert module.get_submodule("layer2.0.conv1").stride == (2, 2)
    assert module.get_submodule("layer2.0.conv2").stride == (1, 1)
    assert analytic.paper_network("resnet18").get_submodule("layer2.0.conv1").stride == (2, 2)
