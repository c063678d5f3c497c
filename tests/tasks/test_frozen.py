"""Modules and statistics that a fit leaves alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from tiny import TinyData, TinyNet, tiny_net

import lightning_baqe as baqe
from lightning_baqe.errors import ConfigError
from lightning_baqe.quantization.train_modes import is_frozen
from lightning_baqe.tasks import ImageClassifier, pretrain
from lightning_baqe.tasks.frozen import Frozen

QUIET = partial(pl.Trainer, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)


class Modes(pl.Callback):
    """Notes which modules train, and which parameters, at each step."""

    def __init__(self) -> None:
        self.training: set[tuple[str, ...]] = set()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.training.add(tuple(name for name, module in pl_module.net.named_modules() if module.training and name))


def fitted(tmp_path: Path, **options: Any) -> tuple[TinyNet, dict[str, bool], Modes]:
    """Which tensors stayed as they were."""
    net, modes = tiny_net(), Modes()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}

    def trainer(**given: Any) -> pl.Trainer:
        return QUIET(**{**given, "callbacks": [*given["callbacks"], modes]})

    pretrain(ImageClassifier(net, 4), TinyData(), tmp_path / "float.ckpt", epochs=2, trainer=trainer, **options)
    return net, {name: torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items()}, modes


def test_everything_trains_where_nothing_is_frozen(tmp_path: Path) -> None:
    _, same, modes = fitted(tmp_path)
    assert not any(same.values())
    assert all("stem.1" in names for names in modes.training)


def test_frozen_modules_keep_everything(tmp_path: Path) -> None:
    net, same, modes = fitted(tmp_path, frozen=["stem"])
    assert {name for name, stays in same.items() if stays} == {name for name in same if name.startswith("stem.")}
    assert modes.training == {("branch", "branch.0", "branch.1", "relu", "pool", "fc")}
    assert all(parameter.requires_grad for parameter in net.parameters())  # afterwards it learns again


def test_frozen_statistics_let_gains_learn(tmp_path: Path) -> None:
    _, same, modes = fitted(tmp_path, freeze_batch_norm=True)
    kept = {"running_mean", "running_var", "num_batches_tracked"}
    assert {name for name, stays in same.items() if stays} == {n for n in same if n.rpartition(".")[2] in kept}
    assert all("stem.0" in names for names in modes.training)


def test_frozen_statistics_stay_in_what_is_trained_afterwards(tmp_path: Path) -> None:
    """A network that never saw the statistics of batches must not be tuned with them: it would be another network."""
    net, _, _ = fitted(tmp_path, freeze_batch_norm=True)
    data = TinyData()
    model = baqe.calibrate(
        baqe.quantize(net, baqe.BitConfig.uniform(net), data.example_input), data.train_dataloader()
    ).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "running" in name}
    with torch.no_grad():
        out = model(data.x)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    torch.testing.assert_close(model.eval()(data.x), out)
    # Also where the checkpoint was there, and nothing was trained.
    again = tiny_net()
    pretrain(ImageClassifier(again, 4), data, tmp_path / "float.ckpt", epochs=2, freeze_batch_norm=True)
    assert all(is_frozen(module) for module in again.modules() if isinstance(module, torch.nn.BatchNorm2d))


def test_parameters_that_were_frozen_before_stay_so(tmp_path: Path) -> None:
    net = tiny_net()
    net.stem[0].requires_grad_(False)
    still = Frozen(net, ["stem"])
    task = ImageClassifier(net, 4)
    QUIET(max_epochs=1, callbacks=[still], enable_checkpointing=False).fit(task, TinyData())
    assert [name for name, of in net.named_parameters() if not of.requires_grad] == ["stem.0.weight", "stem.0.bias"]


@pytest.mark.parametrize("name", ["", "stam"])
def test_unknown_modules_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"TinyNet has no module '{name}' to be frozen"):
        Frozen(tiny_net(), [name])
