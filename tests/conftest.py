"""Fixtures that several folders of tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sample_run import make_summary, write_run
from small_graphs import lowered

import lightning_baqe as baqe
from lightning_baqe.deploy.artifact import Artifact
from lightning_baqe.hardware.target import can_run
from lightning_baqe.integer.graph import IntegerGraph


def pytest_report_header() -> str:
    """Which of the two the tests of kernels on tiles run."""
    return "AMX: kernels run on its tiles" if can_run("amx") else "AMX: none here, kernels run on what stands for tiles"


@pytest.fixture(autouse=True, scope="session")
def own_records(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test reads or writes the user's records."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_BAQE_CACHE", str(folder))
        yield folder


@pytest.fixture
def sample_summary() -> dict[str, Any]:
    """The summary of a made-up run: 40 trials, of which two failed and one still runs, and three baselines."""
    return make_summary()


@pytest.fixture
def sample_run_dir(tmp_path: Path, sample_summary: dict[str, Any]) -> Path:
    """The run folder of `sample_summary`, with empty artifact folders."""
    return write_run(tmp_path / "run", sample_summary)


@pytest.fixture(scope="session")
def resnet() -> tuple[IntegerGraph, torch.Tensor]:
    """ResNet-18 with random bits at 32x32."""
    return lowered("resnet18", 32, seed=0)


@pytest.fixture(scope="session")
def resnet_artifact(resnet: tuple[IntegerGraph, torch.Tensor]) -> Artifact:
    """Its artifact with default schedules."""
    return baqe.build(resnet[0], schedules="default")


@pytest.fixture(scope="session")
def saved_resnet(resnet_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its artifact's folder: copy it before you change it."""
    return resnet_artifact.save(tmp_path_factory.mktemp("artifacts") / "resnet")
