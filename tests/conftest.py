"""Fixtures that several folders of tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sample_run import make_summary, write_run


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
