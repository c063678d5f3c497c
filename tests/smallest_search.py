"""Searches in their smallest form, on real digits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from fake_device import FakeDevice
from foreign_module import ForeignModule
from torch.nn import functional

from lightning_baqe.callbacks import BayesianSearch
from lightning_baqe.data import DigitsDataModule
from lightning_baqe.runs.evaluation import MeasureOptions


@pytest.fixture(scope="session")
def digits() -> DigitsDataModule:
    data = DigitsDataModule(batch_size=32)
    data.setup("fit")
    return data


@pytest.fixture(scope="session")
def float_state(digits: DigitsDataModule) -> dict[str, torch.Tensor]:
    """Weights of a briefly trained float network."""
    torch.manual_seed(0)
    module = ForeignModule()
    optimizer = torch.optim.Adam(module.parameters(), 5e-3)
    for _ in range(3):
        for x, y in digits.train_dataloader():
            optimizer.zero_grad()
            functional.cross_entropy(module.body.classifier(x), y).backward()
            optimizer.step()
    return {name: value.clone() for name, value in module.body.classifier.state_dict().items()}


@pytest.fixture
def foreign(float_state: dict[str, torch.Tensor]) -> Callable[..., ForeignModule]:
    def make(**options: Any) -> ForeignModule:
        module = ForeignModule(**options)
        module.body.classifier.load_state_dict(float_state)
        return module

    return make


@pytest.fixture
def search(tmp_path: Path) -> Callable[..., BayesianSearch]:
    """A search in its smallest form."""

    def make(**options: Any) -> BayesianSearch:
        smallest = {
            "network": "body.classifier", "mode": "paper", "trials": 3, "n_initial": 2, "pool_size": 20,
            "steps_per_trial": 2,
            "baselines": (8,), "run_dir": tmp_path / "run", "measurement": MeasureOptions(repeats=5, warmup=1),
            "calibration_batches": 1, "tune_s": 0.0, "records": tmp_path / "records.db", "progress": False,
        }  # fmt: skip
        if "measure_on" in options:
            del smallest["records"]
        return BayesianSearch(**{**smallest, **options})

    return make


@pytest.fixture
def made_up_device(tmp_path: Path) -> FakeDevice:
    """For ``measure_on``: figures without compiling; sizes are real, latencies follow them."""
    return FakeDevice(tmp_path / "records.db")


@pytest.fixture
def fit() -> Callable[..., pl.Trainer]:
    """Run a plain Trainer."""

    def run(module: pl.LightningModule, callback: BayesianSearch, data: Any, **options: Any) -> pl.Trainer:
        plain = {"max_epochs": -1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
                 "enable_model_summary": False, "num_sanity_val_steps": 0, "accelerator": "cpu"}  # fmt: skip
        trainer = pl.Trainer(**{**plain, **options}, callbacks=[callback])
        trainer.fit(module, data) if isinstance(data, pl.LightningDataModule) else trainer.fit(module, *data)
        return trainer

    return run
