"""The classifier's checkpoints restore structure, weights and optimizer, whatever the module that loads them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from sklearn.metrics import f1_score
from tiny import TinyData, TinyNet, tiny_net
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError
from torchmetrics.classification import MulticlassF1Score

import lightning_baqe as baqe
from lightning_baqe.errors import CalibrationError, ConfigError
from lightning_baqe.tasks import ImageClassifier
from lightning_baqe.tasks.classifier import CHECKPOINT_KEY, loss_of

WIDTHS = [None, 8, 4]  # None: float


def trainer(epochs: int = 1, **options: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "max_epochs": epochs,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(**(defaults | options))


def make_task(width: int | None = None, calibrated: bool = True, **options: Any) -> ImageClassifier:
    """A classifier over the tiny network, quantized to `width` bits, calibrated on the tiny data."""
    task = ImageClassifier(tiny_net(), 4, **options)
    if width is not None:
        data = TinyData()
        net = task.quantize(baqe.BitConfig.uniform(task.net, width, width), data.example_input)
        if calibrated:
            baqe.calibrate(net, data.train_dataloader())
    return task


def outputs(task: ImageClassifier) -> Tensor:
    task.eval()
    with torch.no_grad():
        return task(TinyData().x)


def states_equal(one: ImageClassifier, other: ImageClassifier) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture
def trained(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[ImageClassifier, Path]:
    """A classifier after one epoch and its checkpoint; the parameter is its width."""
    task = make_task(request.param)
    fitted = trainer()
    fitted.fit(task, TinyData())
    path = tmp_path / "trained.ckpt"
    fitted.save_checkpoint(path)
    return task, path


class DictData(TinyData):
    """Batches as Hugging Face's loaders give them; to predict on, images alone."""

    def train_dataloader(self) -> Any:
        rows = [{"pixel_values": x, "labels": y} for x, y in zip(self.x, self.y, strict=True)]
        return DataLoader(rows, batch_size=8)

    val_dataloader = test_dataloader = train_dataloader

    def predict_dataloader(self) -> Any:
        return DataLoader(self.x, batch_size=8)


def test_batches_may_be_dicts_or_images_alone() -> None:
    task, other = make_task(), make_task()
    trainer().fit(task, DictData())
    trainer().fit(other, TinyData())
    predictions = torch.cat(trainer().predict(task, DictData()))
    assert torch.equal(predictions, torch.cat(trainer().predict(other, TinyData())))


@pytest.mark.parametrize("trained", WIDTHS, indirect=True)
def test_load_from_checkpoint(trained: tuple[ImageClassifier, Path]) -> None:
    task, path = trained
    loaded = ImageClassifier.load_from_checkpoint(path, net=tiny_net(seed=1))
    assert loaded.structure == task.structure
    assert states_equal(loaded, task)
    assert torch.equal(outputs(loaded), outputs(task))


@pytest.mark.parametrize("other", WIDTHS)
@pytest.mark.parametrize("trained", WIDTHS, indirect=True)
def test_validate_test_and_predict_restore_any_structure(
    trained: tuple[ImageClassifier, Path], other: int | None
) -> None:
    task, path = trained
    wanted = trainer().validate(task, TinyData(), verbose=False)[0]["val/loss"]
    module = make_task(other, calibrated=False)
    found = trainer().validate(module, TinyData(), ckpt_path=str(path), verbose=False)[0]["val/loss"]
    assert found == wanted
    module = make_task(other, calibrated=False)
    found = trainer().test(module, TinyData(), ckpt_path=str(path), verbose=False)[0]["test/loss"]
    assert found == wanted
    module = make_task(other, calibrated=False)
    predictions = trainer().predict(module, TinyData(), ckpt_path=str(path))
    assert torch.equal(torch.cat(predictions), outputs(task))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("scheduler", ["none", "cosine", "onecycle"])
@pytest.mark.parametrize("width", WIDTHS)
def test_fit_continues_where_the_checkpoint_was_written(
    width: int | None, optimizer: str, scheduler: str, tmp_path: Path
) -> None:
    options = {"optimizer": optimizer, "scheduler": scheduler, "learning_rate": 1e-2}
    whole = make_task(width, **options)
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    uninterrupted = trainer(2, callbacks=[keep], enable_checkpointing=True)
    uninterrupted.fit(whole, TinyData())

    module = ImageClassifier(tiny_net(seed=5), 4, **options)
    resumed = trainer(2)
    resumed.fit(module, TinyData(), ckpt_path=str(tmp_path / "epoch=0.ckpt"))
    assert resumed.global_step == uninterrupted.global_step == 8
    assert states_equal(module, whole)
    mine, theirs = resumed.optimizers[0].state_dict(), uninterrupted.optimizers[0].state_dict()
    assert mine["param_groups"] == theirs["param_groups"]
    assert mine["state"].keys() == theirs["state"].keys()
    for key, state in theirs["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(mine["state"][key][name]), torch.as_tensor(value))


@pytest.mark.parametrize("trained", [8], indirect=True)
def test_checkpoints_hold_plain_values(trained: tuple[ImageClassifier, Path]) -> None:
    content = torch.load(trained[1], weights_only=True)
    assert content[CHECKPOINT_KEY]["example_shape"] == [3, 8, 8]
    assert content[CHECKPOINT_KEY]["options"] == {"activation_quantizer": "lsq+", "activation_range": "mse"}
    assert "net" not in content["hyper_parameters"]


@pytest.mark.parametrize(
    "options",
    [
        {"activation_quantizer": "lsq", "activation_range": "minmax"},
        {"activation_quantizer": "static", "activation_range": "ema"},
        {"activation_quantizer": "lsq+", "activation_range": "percentile:99.5"},
    ],
)
def test_options_of_quantize_are_restored(options: dict[str, str], tmp_path: Path) -> None:
    task = ImageClassifier(tiny_net(), 4)
    data = TinyData()
    baqe.calibrate(task.quantize(baqe.BitConfig.uniform(task.net, 4, 4), data.example_input, **options), [data.x])
    fitted = trainer()
    fitted.fit(task, data)
    fitted.save_checkpoint(tmp_path / "lsq.ckpt")
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "lsq.ckpt", net=tiny_net(seed=1))
    assert loaded.structure["options"] == options
    assert torch.equal(outputs(loaded), outputs(task))


def test_a_network_that_a_callback_swapped_is_saved_as_it_is(tmp_path: Path) -> None:
    task, data = ImageClassifier(tiny_net(), 4), TinyData()
    task.net = baqe.quantize(task.net, baqe.BitConfig.uniform(task.net, 4, 8), example_input=data.example_input)
    baqe.calibrate(task.net, [data.x])
    fitted = trainer()
    fitted.fit(task, data)
    fitted.save_checkpoint(tmp_path / "swapped.ckpt")
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "swapped.ckpt", net=tiny_net(seed=1))
    assert torch.equal(outputs(loaded), outputs(task))


def test_a_copy_restores_on_its_own(tmp_path: Path) -> None:
    task = make_task(8)
    twin = copy.deepcopy(task)
    twin.on_load_checkpoint({CHECKPOINT_KEY: make_task(4).structure})
    assert task.structure["bits"] != twin.structure["bits"] == make_task(4).structure["bits"]


@pytest.mark.parametrize("trained", [8], indirect=True)
def test_a_net_given_quantized_loads_its_own_structure_alone(trained: tuple[ImageClassifier, Path]) -> None:
    task, path = trained
    loaded = ImageClassifier.load_from_checkpoint(path, net=make_task(8).net)
    assert torch.equal(outputs(loaded), outputs(task))
    with pytest.raises(ConfigError, match="give the float network"):
        ImageClassifier.load_from_checkpoint(path, net=make_task(4).net)


@pytest.mark.parametrize("trained", [8], indirect=True)
def test_strategies_that_read_checkpoints_late_are_refused(
    trained: tuple[ImageClassifier, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    late = property(lambda self: True)
    monkeypatch.setattr(pl.strategies.SingleDeviceStrategy, "restore_checkpoint_after_setup", late)
    with pytest.raises(ConfigError, match="load_from_checkpoint"):
        trainer(2).fit(ImageClassifier(tiny_net(), 4), TinyData(), ckpt_path=str(trained[1]))


def test_quantize_twice_is_an_error() -> None:
    task = make_task(8)
    with pytest.raises(ConfigError, match="quantized already"):
        task.quantize(baqe.BitConfig.uniform(tiny_net(), 4, 4), TinyData.example_input)


def test_metrics_are_logged() -> None:
    module, data = ImageClassifier(tiny_net(), 4, learning_rate=3e-2, label_smoothing=0.1), TinyData()
    fitted = trainer(8)
    fitted.fit(module, data)
    assert {"train/loss", "train/acc", "val/loss", "val/acc"} <= fitted.callback_metrics.keys()
    right = (outputs(module).argmax(1) == data.y).float().mean()
    assert float(right) > 0.5
    logged = fitted.test(module, data, verbose=False)[0]
    assert logged["test/acc"] == pytest.approx(float(right))
    assert logged["test/loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(outputs(module), data.y)))


class Targets(TinyData):
    """The tiny images with other targets."""

    def __init__(self, targets: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.targets = targets(self.y)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(self.x, self.targets), batch_size=8)

    val_dataloader = test_dataloader = train_dataloader


def headed(outputs: int) -> nn.Module:
    net = tiny_net()
    net.fc = nn.Linear(8, outputs)
    return net


def per_pixel() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1))


@pytest.mark.parametrize(
    ("net", "outputs", "targets", "right"),
    [
        (headed(1), 1, lambda y: y // 2, lambda o, y: (o[:, 0] > 0) == y),
        (headed(1), 1, lambda y: (y // 2)[:, None].float(), lambda o, y: (o > 0) == y),
        (headed(3), 3, lambda y: torch.stack([y > 0, y > 1, y > 2], 1).float(), lambda o, y: (o > 0) == y),
        (per_pixel(), 4, lambda y: y.view(-1, 1, 1).expand(-1, 8, 8).clone(), lambda o, y: o.argmax(1) == y),
    ],
    ids=["one logit", "float targets", "labels", "pixels"],
)
def test_loss_and_accuracy_follow_the_shapes(
    net: nn.Module,
    outputs: int,
    targets: Callable[[Tensor], Tensor],
    right: Callable[[Tensor, Tensor], Tensor],
) -> None:
    module, data = ImageClassifier(net, outputs, learning_rate=3e-2), Targets(targets)
    fitted = trainer(10)
    fitted.fit(module, data)
    with torch.no_grad():
        logits = module.eval()(data.x)
    counted = float(right(logits, data.targets).double().mean())
    assert counted > 0.7
    logged = fitted.test(module, data, verbose=False)[0]
    assert logged["test/acc"] == pytest.approx(counted)
    assert logged["test/loss"] == pytest.approx(float(loss_of(logits, data.targets)), rel=1e-4)


def test_losses() -> None:
    logits, indices = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    wanted = functional.cross_entropy(logits, indices, label_smoothing=0.2)
    assert torch.equal(loss_of(logits, indices, 0.2), wanted)
    binary = (indices > 0).float()
    assert torch.allclose(loss_of(logits[:, :1], binary), functional.soft_margin_loss(logits[:, 0], 2 * binary - 1))
    # Smoothing one logit is smoothing two classes of which one has the logit 0.
    two = functional.pad(logits[:, :1], (1, 0))
    smooth = functional.cross_entropy(two, binary.long(), label_smoothing=0.2)
    assert torch.allclose(loss_of(logits[:, :1], binary, 0.2), smooth)
    with pytest.raises(ConfigError, match=r"no loss for outputs \(6, 3\) and targets torch.float32 \(6,\)"):
        loss_of(logits, torch.randn(6))


def test_a_metric_of_the_users(tmp_path: Path) -> None:
    metric = MulticlassF1Score(num_classes=4)
    module, data = ImageClassifier(tiny_net(), 4, learning_rate=3e-2, metric=metric), TinyData()
    fitted = trainer(3)
    fitted.fit(module, data)
    logged = fitted.test(module, data, verbose=False)[0]
    assert logged["test/acc"] == pytest.approx(f1_score(data.y, outputs(module).argmax(1), average="macro"))
    assert metric.update_count == 0
    assert module.metric is metric
    fitted.save_checkpoint(tmp_path / "f1.ckpt")
    assert set(torch.load(tmp_path / "f1.ckpt", weights_only=True)["hyper_parameters"]) & {"net", "metric"} == set()
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "f1.ckpt", net=tiny_net(seed=1))
    assert torch.equal(outputs(loaded), outputs(module))
    with pytest.raises(ConfigError, match="MeanSquaredError"):
        ImageClassifier(tiny_net(), 4, metric=MeanSquaredError())


def test_log_prefix() -> None:
    fitted = trainer()
    fitted.fit(ImageClassifier(tiny_net(), 4, log_prefix="float/"), TinyData())
    assert "float/val/acc" in fitted.callback_metrics


def test_adamw_moves_scales_relative_to_their_size() -> None:
    task = make_task(8, learning_rate=1e-2)
    before = {name: value.detach().clone() for name, value in task.named_parameters() if name.endswith(".scale")}
    trainer().fit(task, TinyData())
    after = dict(task.named_parameters())
    changes = {name: float(((after[name].detach() - value) / value).abs().max()) for name, value in before.items()}
    assert 0 < max(changes.values()) < 0.5, changes


def test_weight_decay_spares_vectors_and_quantizers() -> None:
    task = make_task(8, weight_decay=0.1)
    groups = {group["name"]: group for group in task.configure_optimizers().param_groups}
    assert {name for name, group in groups.items() if group["weight_decay"] > 0} == {"weights"}
    assert all(parameter.ndim > 1 for parameter in groups["weights"]["params"])
    grouped = [id(parameter) for group in groups.values() for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in task.net.parameters())


def test_training_without_calibration_is_an_error() -> None:
    with pytest.raises(CalibrationError, match="calibrate"):
        trainer().fit(make_task(8, calibrated=False), TinyData())


def test_a_scheduler_needs_an_end() -> None:
    with pytest.raises(ConfigError, match="max_epochs"):
        trainer(-1).fit(ImageClassifier(tiny_net(), 4, scheduler="onecycle"), TinyData())


@pytest.mark.parametrize(
    "option",
    [
        {"num_classes": 0},
        {"num_classes": True},
        {"learning_rate": 0.0},
        {"weight_decay": -1.0},
        {"optimizer": "adam"},
        {"scheduler": "step"},
        {"label_smoothing": 1.0},
    ],
)
def test_arguments_are_checked(option: dict[str, Any]) -> None:
    (name,) = option
    with pytest.raises(ConfigError, match=name):
        ImageClassifier(TinyNet(), **({"num_classes": 4} | option))
