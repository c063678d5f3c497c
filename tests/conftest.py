"""Fixtures that several folders of tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sample_run import make_summary, write_run


@pytest.fixture
def sample_summary() -> dict[str, Any]:
    """The summary of a made-up run: 40 trials, of which two failed and one still runs, and three baselines."""
    return make_summary()


@pytest.fixture
def sample_run_dir(tmp_path: Path, sample_summary: dict[str, Any]) -> Path:
    """The run folder of `sample_summary`, with empty artifact folders."""
    return write_run(tmp_path / "run", sample_summary)
