"""Freezing and folding batch norms in plain Trainers, somebody else's module, and across checkpoints."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from quantization.small_networks import Residual, settled
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

import lightning_baqe as baqe
from lightning_baqe.callbacks import BayesianSearch, FreezeBatchNorm
from lightning_baqe.errors import ConfigError
from lightning_baqe.quantization.batch_norm import fold_batch_norm, foldable, is_folded
from lightning_baqe.tasks import ImageClassifier
from lightning_baqe.tasks.classifier import CHECKPOINT_KEY

X = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(32) % 5
STEPS = 4  # in an epoch


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y), batch_size=8)


def network(seed: int = 0) -> nn.Module:
    return settled("residual", seed).train()


def quantized(bits: int = 4, seed: int = 0, **options: str) -> baqe.QuantizedModel:
    model = network(seed)
    return baqe.calibrate(baqe.quantize(model, baqe.BitConfig.uniform(model, bits, bits), X, **options), [X])


class Foreign(pl.LightningModule):
    """Somebody's module: it sets all of itself to training mode whenever an epoch begins."""

    def __init__(self, net: nn.Module, optimizer: str = "sgd", scheduler: str = "none") -> None:
        super().__init__()
        self.body = nn.ModuleDict({"classifier": net})
        self.optimizer, self.scheduler = optimizer, scheduler
        self.losses: list[float] = []
        self.rates: list[list[float]] = []
        self.means: list[Tensor] = []

    def on_train_epoch_start(self) -> None:
        self.train()

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = functional.cross_entropy(self.body["classifier"](batch[0]), batch[1])
        self.losses.append(float(loss.detach()))
        self.rates.append([group["lr"] for group in self.trainer.optimizers[0].param_groups])
        return loss

    def on_train_epoch_end(self) -> None:
        norms = [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]
        self.means.append(torch.cat([norm.running_mean.clone() for norm in norms]) if norms else torch.zeros(0))

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val/loss", functional.cross_entropy(self.body["classifier"](batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.parameters() if p.requires_grad]
        # Two groups: the second one learns at half the rate.
        groups = [
            {"params": [p for p in parameters if p.ndim > 1]},
            {"params": [p for p in parameters if p.ndim <= 1], "lr": 0.005},
        ]
        made: torch.optim.Optimizer = (
            torch.optim.Adam(groups, 0.01) if self.optimizer == "adam" else torch.optim.SGD(groups, 0.01, momentum=0.9)
        )
        steps = int(self.trainer.estimated_stepping_batches)
        schedulers: dict[str, Callable[[], Any]] = {
            "cosine": lambda: lr_scheduler.CosineAnnealingLR(made, steps),
            "onecycle": lambda: lr_scheduler.OneCycleLR(made, [0.01, 0.005], steps),
            "lambda": lambda: lr_scheduler.LambdaLR(made, lambda step: 1 / (1 + step)),
            "multistep": lambda: lr_scheduler.MultiStepLR(made, [2, 5, 7], 0.5),
        }
        if self.scheduler == "none":
            return made
        return {"optimizer": made, "lr_scheduler": {"scheduler": schedulers[self.scheduler](), "interval": "step"}}


def fit(module: pl.LightningModule, *callbacks: pl.Callback, epochs: int = 3, **options: Any) -> pl.Trainer:
    path = options.pop("ckpt_path", None)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu",
             "enable_model_summary": False, "num_sanity_val_steps": 0, "max_epochs": epochs}  # fmt: skip
    trainer = pl.Trainer(**{**quiet, **options}, callbacks=list(callbacks))
    trainer.fit(module, loader(), loader(), ckpt_path=path)
    return trainer


def freeze(after: int = 1, fold: bool = False) -> FreezeBatchNorm:
    return FreezeBatchNorm("body.classifier", after_epochs=after, fold=fold)


def logits(net: nn.Module) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(net).eval()(X)


def frozen(means: list[Tensor]) -> list[bool]:
    """Of each epoch but the first, whether it left the running means as they were."""
    return [torch.equal(one, other) for one, other in pairwise(means)]


# -- freezing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", [network, quantized], ids=["float", "quantized"])
@pytest.mark.parametrize(("after", "wanted"), [(0, [True] * 3), (1, [True] * 3), (3, [False, False, True])])
def test_statistics_stay_after_so_many_epochs(net: Callable[[], nn.Module], after: int, wanted: list[bool]) -> None:
    module = Foreign(net())
    fit(module, freeze(after), epochs=4)
    assert frozen(module.means) == wanted
    begin = torch.cat([m.running_mean for m in net().modules() if isinstance(m, nn.BatchNorm2d)])
    assert torch.equal(begin, module.means[0]) == (after == 0)


def test_gains_and_shifts_go_on_learning() -> None:
    module = Foreign(quantized())
    before = {name: value.clone() for name, value in module.body["classifier"].named_parameters()}
    fit(module, freeze(0), epochs=1)
    learned = {name: value for name, value in module.body["classifier"].named_parameters() if "quant" not in name}
    after = {name: value for name, value in learned.items() if "bn" in name}
    assert len(after) == 10
    assert [name for name, value in after.items() if torch.equal(value, before[name])] == []


def checkpoints(folder: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{epoch}-{step}", save_top_k=-1, **options)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_resumed_fit_is_frozen_from_the_start(tmp_path: Path) -> None:
    module, keep = Foreign(quantized()), checkpoints(tmp_path, every_n_train_steps=3)
    fit(module, freeze(1), keep, enable_checkpointing=True)
    for name, later in (("epoch=1-step=6.ckpt", 9), ("epoch=2-step=9.ckpt", 9)):
        again = Foreign(quantized(seed=3))
        fit(again, freeze(later), ckpt_path=str(tmp_path / name))
        assert torch.equal(again.means[-1], module.means[-1])
    early = Foreign(quantized(seed=3))
    fit(early, freeze(9), ckpt_path=str(tmp_path / "epoch=0-step=3.ckpt"))
    assert not torch.equal(early.means[-1], module.means[-1])  # the checkpoint was not frozen yet


def test_two_networks_keep_their_own_state() -> None:
    assert FreezeBatchNorm("student").state_key != FreezeBatchNorm("teacher").state_key


# -- folding ----------------------------------------------------------------------------------------------------------


def test_folding_does_not_change_the_function_and_training_goes_on() -> None:
    plain, folded = Foreign(quantized()), Foreign(quantized())
    fit(plain, freeze(1))
    fit(folded, freeze(1, fold=True))
    net = folded.body["classifier"]
    assert isinstance(net, baqe.QuantizedModel)
    assert is_folded(net)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in net.modules())
    assert folded.losses[:STEPS] == plain.losses[:STEPS]
    assert folded.losses[STEPS] == pytest.approx(plain.losses[STEPS], rel=1e-3)
    assert folded.losses[-1] != plain.losses[-1]  # weights learn in other units
    assert folded.losses[-1] < folded.losses[0]
    assert baqe.lower(net.eval()).is_integer_only


@pytest.mark.parametrize("scheduler", ["none", "cosine", "onecycle", "lambda", "multistep"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_where_only_shifts_learn_folding_changes_nothing(optimizer: str, scheduler: str) -> None:
    # A folded bias is the shift and a constant: the same gradients, so that with the same momentum, second moments and
    # learning rates both networks remain the same function. Float layers, so that no rounding tips over.
    ends: list[Tensor] = []
    rates = []
    for fold in (False, True):
        module = Foreign(quantized(32), optimizer, scheduler)
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        for pair in foldable(module.body["classifier"]):  # type: ignore[arg-type]
            pair.norm.bias.requires_grad_()
        begin = logits(module.body["classifier"])
        fit(module, freeze(1, fold))
        ends.append(logits(module.body["classifier"]))
        rates.append(module.rates)
    assert (ends[0] - begin).abs().max() > 0.02
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-5)
    assert rates[1] == [pytest.approx(row) for row in rates[0]]
    assert (len({row[0] for row in rates[0]}) > 1) == (scheduler != "none")


class Spy(pl.Callback):
    """Keeps the optimizer of a moment, and names of parameters."""

    def __init__(self, epoch: int = 1) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            self.optimizer = trainer.optimizers[0]
            self.names = {id(p): name for name, p in pl_module.body["classifier"].named_parameters()}
            self.state = {self.names[id(p)]: dict(state) for p, state in self.optimizer.state.items()}


def test_the_optimizer_keeps_what_is_still_true() -> None:
    module, before, after = Foreign(quantized(), "adam"), Spy(), Spy()
    fit(module, before, freeze(1, fold=True), after)
    parameters = {id(p) for p in module.parameters() if p.requires_grad}
    assert {id(p) for group in after.optimizer.param_groups for p in group["params"]} == parameters
    kept = {name for name in before.names.values() if name.startswith(("fc.", "activation_quantizers"))}
    biases = {"stem.bias": "bn.bias"} | {
        f"block{i}.conv{j}.bias": f"block{i}.bn{j}.bias" for i in (1, 2) for j in (1, 2)
    }
    assert after.state.keys() == kept | biases.keys()
    assert len(kept) > 5
    for name, state in after.state.items():
        known = before.state[biases.get(name, name)]
        assert known["exp_avg"].abs().max() > 0
        assert all(torch.equal(state[key], value) for key, value in known.items())


def classifier(net: nn.Module | None = None, **options: Any) -> ImageClassifier:
    """A classifier, its network quantized and calibrated."""
    task = ImageClassifier(net or network(), 5, learning_rate=1e-2, **options)
    model = task.quantize(baqe.BitConfig.uniform(task.net, 4, 4), X[:1])
    baqe.calibrate(model, [X])
    return task


def test_rates_that_follow_the_scales_follow_the_folded_ones() -> None:
    task, rates, before, after = classifier(scheduler="cosine"), [], [], []

    class Rates(pl.Callback):
        def __init__(self, groups: list[dict[str, Any]]) -> None:
            self.groups = groups

        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch == 1:
                self.groups.extend(map(dict, trainer.optimizers[0].param_groups))
                rates.append(trainer.lr_scheduler_configs[0].scheduler.get_last_lr())

    fit(task, Rates(before), FreezeBatchNorm(fold=True), Rates(after))
    assert [group["name"] for group in after] == [group["name"] for group in before]
    progress = before[0]["lr"] / 1e-2
    assert 0.5 < progress < 0.9
    assert after[0]["lr"] == pytest.approx(1e-2 * progress)
    for group in after:
        assert group["lr"] == pytest.approx(group["initial_lr"] * progress)
    changed = {old["name"] for old, new in zip(before, after, strict=True) if old["initial_lr"] != new["initial_lr"]}
    assert {"weight_scale_4bit", "weight_scale_8bit"} <= changed
    assert rates[1] == [group["lr"] for group in after]
    assert rates[1] != rates[0]


MODULES: dict[str, tuple[str, Callable[[], pl.LightningModule], Callable[[], pl.LightningModule]]] = {
    "foreign": ("body.classifier", lambda: Foreign(quantized(), "adam", "onecycle"),
                lambda: Foreign(quantized(seed=3), "adam", "onecycle")),
    "adamw": ("net", lambda: classifier(scheduler="cosine"), lambda: classifier(network(3), scheduler="cosine")),
    "onecycle": ("net", lambda: classifier(scheduler="onecycle"),
                 lambda: ImageClassifier(network(3), 5, learning_rate=1e-2, scheduler="onecycle")),
    "sgd": ("net", lambda: classifier(optimizer="sgd"),
            lambda: ImageClassifier(network(3), 5, learning_rate=1e-2, optimizer="sgd")),
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_a_resumed_fit_ends_as_an_uninterrupted_one(name: str, tmp_path: Path) -> None:
    attribute, make, remake = MODULES[name]
    whole = make()
    uninterrupted = fit(
        whole, FreezeBatchNorm(attribute, 1, True), checkpoints(tmp_path), enable_checkpointing=True, epochs=3
    )
    for epoch in (0, 1):  # before and after the folding
        module = remake()
        path = tmp_path / f"epoch={epoch}-step={STEPS * (epoch + 1)}.ckpt"
        resumed = fit(module, FreezeBatchNorm(attribute, 1, True), ckpt_path=str(path))
        first, second = whole.state_dict(), module.state_dict()
        assert first.keys() == second.keys()
        assert [key for key in first if not torch.equal(first[key], second[key])] == []
        mine, theirs = resumed.optimizers[0].state_dict(), uninterrupted.optimizers[0].state_dict()
        assert mine["param_groups"] == theirs["param_groups"]
        assert mine["state"].keys() == theirs["state"].keys()


@pytest.fixture(scope="module")
def folded_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageClassifier, Path, Path]:
    """A classifier that was folded after one epoch of two, and the checkpoints of both epochs."""
    folder = tmp_path_factory.mktemp("folded")
    task = classifier()
    fit(task, FreezeBatchNorm(fold=True), checkpoints(folder), epochs=2, enable_checkpointing=True)
    return task, folder / f"epoch=0-step={STEPS}.ckpt", folder / f"epoch=1-step={2 * STEPS}.ckpt"


def test_checkpoints_restore_the_folded_structure(folded_checkpoint: tuple[ImageClassifier, Path, Path]) -> None:
    task, before, after = folded_checkpoint
    loaded = ImageClassifier.load_from_checkpoint(after, net=network(3))
    assert loaded.structure == task.structure
    assert loaded.structure["folded"] is True
    assert torch.equal(logits(loaded.net), logits(task.net))
    unfolded = ImageClassifier.load_from_checkpoint(before, net=network(3))
    assert unfolded.structure == task.structure | {"folded": False}
    wanted = functional.cross_entropy(logits(task.net), Y)
    # Whatever the structure of the module that reads it; one that was given quantized is folded as it is.
    given = baqe.quantize(network(3), baqe.BitConfig.uniform(network(), 4, 4), X[:1])
    for module in (classifier(), unfolded, loaded, ImageClassifier(given, 5)):
        trainer = pl.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu", enable_checkpointing=False)
        found = trainer.validate(module, loader(), ckpt_path=str(after), verbose=False)[0]["val/loss"]
        assert found == pytest.approx(float(wanted))
        assert is_folded(module.net)


def test_a_folded_classifier_reads_checkpoints_from_before(
    folded_checkpoint: tuple[ImageClassifier, Path, Path],
) -> None:
    _, before, after = folded_checkpoint
    task = classifier()
    content = torch.load(after, weights_only=True)
    task.on_load_checkpoint(content)
    assert is_folded(task.net)
    content = torch.load(before, weights_only=True)
    task.on_load_checkpoint(content)
    task.load_state_dict(content["state_dict"])
    assert not is_folded(task.net)
    given = classifier().net
    fold_batch_norm(given)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="another structure than net"):
        ImageClassifier(given, 5).on_load_checkpoint(content)


def test_checkpoints_of_earlier_versions_are_of_unfolded_networks() -> None:
    task = classifier()
    old = {key: value for key, value in task.structure.items() if key != "folded"}
    net = task.net
    task.on_load_checkpoint({CHECKPOINT_KEY: old})
    assert task.net is net


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [-1, True, 1.5, None])
def test_epochs_are_checked(after: Any) -> None:
    with pytest.raises(ConfigError, match="after_epochs="):
        FreezeBatchNorm(after_epochs=after)


def test_there_must_be_such_a_network() -> None:
    with pytest.raises(ConfigError, match=r"Foreign has no 'net'.*it has \['body'\]"):
        fit(Foreign(quantized()), FreezeBatchNorm())


def test_only_what_is_quantized_is_folded() -> None:
    with pytest.raises(ConfigError, match=r"body\.classifier is a Residual: quantize it first"):
        fit(Foreign(Residual()), freeze(1, fold=True))


def test_not_beside_a_search() -> None:
    with pytest.raises(ConfigError, match="leave one of the two"):
        fit(Foreign(Residual()), freeze(), BayesianSearch("body.classifier"))


def test_strategies_that_shard_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_baqe.callbacks.freeze_batch_norm.SingleDeviceStrategy", pl.strategies.FSDPStrategy)
    with pytest.raises(ConfigError, match="SingleDeviceStrategy does not allow"):
        fit(Foreign(quantized()), freeze(1, fold=True))
    fit(Foreign(quantized()), freeze(1), epochs=1)


class Collected(Foreign):
    """Collects its parameters when it is made."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.collected = list(self.parameters())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.collected, 0.01)


class Uneven(Foreign):
    """One group of parameters for batch norms, where there are any."""

    def configure_optimizers(self) -> Any:
        norms = [p for m in self.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
        theirs = {id(p) for p in norms}
        others = [p for p in self.parameters() if id(p) not in theirs]
        return torch.optim.SGD([{"params": others}, *([{"params": norms, "lr": 0.1}] if norms else [])], 0.01)


@pytest.mark.parametrize(
    ("kind", "wanted"), [(Collected, r"leaves out the bias.*'block1\.bn1' \(4 in all\)"), (Uneven, r"\[2\].*\[1\]")]
)
def test_optimizers_that_cannot_follow(kind: type[Foreign], wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        fit(kind(quantized()), freeze(1, fold=True))


def test_the_module_is_left_without_hooks_of_the_callback() -> None:
    module = Foreign(quantized())
    fit(module, freeze(1, fold=True), epochs=1)
    assert not module._load_state_dict_pre_hooks


# -- several processes ------------------------------------------------------------------------------------------------

SCRIPT = """
import pathlib, sys, torch, pytorch_lightning as pl
from test_freeze_batch_norm import Foreign, freeze, loader, quantized
torch.set_num_threads(1)
module = Foreign(quantized())
trainer = pl.Trainer(max_epochs=3, callbacks=[freeze(1, fold=True)], logger=False, enable_checkpointing=False,
    enable_progress_bar=False, num_sanity_val_steps=0, accelerator="cpu", devices=2, strategy="ddp")
trainer.fit(module, loader())
net = module.body["classifier"]
total = sum(float(value.double().abs().sum()) for value in net.state_dict().values())
trained = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
assert trained == {id(p) for p in module.parameters() if p.requires_grad}
pathlib.Path(sys.argv[1], f"rank{trainer.global_rank}").write_text(repr(total))
"""


@pytest.mark.slow
def test_two_ranks_fold_alike(tmp_path: Path) -> None:
    script = tmp_path / "fit.py"  # a file, since Lightning starts it again for the second rank
    script.write_text(SCRIPT)
    here = Path(__file__).parent
    folders = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": folders, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(script), str(tmp_path)], env=environment, check=True, timeout=300)
    held = [path.read_text() for path in tmp_path.glob("rank*")]
    assert len(held) == 2
    assert len(set(held)) == 1
