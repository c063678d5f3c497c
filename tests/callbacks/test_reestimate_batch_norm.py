"""Statistics that are taken anew: those of the batches, with the weights as they are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_baqe.callbacks import ReestimateBatchNorm
from lightning_baqe.errors import ConfigError
from lightning_baqe.quantization.batch_norm import freeze_batch_norm

X = torch.randn(24, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 3 + 1


class Foreign(pl.LightningModule):
    """Somebody's; notes what is validated."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.body = net
        self.validated: list[nn.Module] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.body(batch[0]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.validated.append(copy.deepcopy(self.body))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(net: nn.Module, **more: Any) -> Foreign:
    module, loader = Foreign(net), DataLoader(TensorDataset(X), 8)
    trainer = pl.Trainer(
        max_epochs=2, callbacks=[ReestimateBatchNorm("body", **more)], accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, loader, loader)
    return module


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3))


@pytest.mark.parametrize("batches", [2, 50])
def test_they_are_those_of_the_batches(batches: int) -> None:
    for of in fit(net(), batches=batches).validated:
        used = [of[0](x) for x in X.split(8)[:batches]]
        means = torch.stack([x.mean((0, 2, 3)) for x in used]).mean(0)
        variances = torch.stack([x.var((0, 2, 3)) for x in used]).mean(0)
        torch.testing.assert_close(of[1].running_mean, means)
        torch.testing.assert_close(of[1].running_var, variances)
        assert of[1].momentum == 0.1
        assert not of[1].training  # validation's mode


@pytest.mark.filterwarnings("ignore:Found 1 module")
def test_frozen_ones_stay() -> None:
    frozen = net()
    frozen[1].running_mean.fill_(0.7)
    frozen[1].running_var.fill_(2.5)
    last = fit(freeze_batch_norm(frozen)).validated[-1][1]
    assert torch.equal(last.running_mean, torch.full((4,), 0.7))
    assert torch.equal(last.running_var, torch.full((4,), 2.5))


def test_batches_are_wanted() -> None:
    with pytest.raises(ConfigError, match="batches"):
        ReestimateBatchNorm(batches=0)
