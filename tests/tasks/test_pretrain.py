"""Training to a checkpoint: once, resumable, and the best epoch's weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from tiny import TinyData, tiny_net
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_baqe.data.base import ImageDataModule, ImageTensorDataset, Split
from lightning_baqe.errors import ConfigError, DataError
from lightning_baqe.tasks import ImageClassifier, fit_to_checkpoint, pretrain
from lightning_baqe.tasks.checkpoint import CheckpointBeside, read_checkpoint

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Interrupt(pl.Callback):
    """Raises after so many epochs."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == self.epochs:
            raise RuntimeError("killed")


class Count(pl.Callback):
    """Counts training batches."""

    batches = 0

    def on_train_batch_end(self, *args: Any) -> None:
        self.batches += 1


def make_trainer(extra: pl.Callback, **options: Any) -> pl.Trainer:
    return pl.Trainer(**QUIET, **(options | {"callbacks": [*options["callbacks"], extra]}))


def weights(task: ImageClassifier) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in task.net.state_dict().items()}


def test_trains_once(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "float.ckpt"
    task, count = ImageClassifier(tiny_net(), 4), Count()
    assert pretrain(task, TinyData(), checkpoint, epochs=2, trainer=partial(make_trainer, count)) is task
    assert count.batches == 8
    assert [path.name for path in checkpoint.parent.iterdir()] == ["float.ckpt"]

    again = ImageClassifier(tiny_net(seed=1), 4)
    pretrain(again, TinyData(), checkpoint, epochs=2, trainer=partial(make_trainer, count))
    assert count.batches == 8
    loaded = ImageClassifier.load_from_checkpoint(checkpoint, net=tiny_net(seed=2))
    for name, value in weights(task).items():
        assert torch.equal(value, weights(again)[name])
        assert torch.equal(value, weights(loaded)[name])


def test_resumes_after_a_kill(tmp_path: Path) -> None:
    whole = ImageClassifier(tiny_net(), 4)
    pretrain(whole, TinyData(), tmp_path / "whole.ckpt", epochs=3, trainer=partial(pl.Trainer, **QUIET))

    checkpoint = tmp_path / "float.ckpt"
    with pytest.raises(RuntimeError, match="killed"):
        pretrain(
            ImageClassifier(tiny_net(), 4),
            TinyData(),
            checkpoint,
            epochs=3,
            trainer=partial(make_trainer, Interrupt(2)),
        )
    assert not checkpoint.exists()
    task, count = ImageClassifier(tiny_net(seed=7), 4), Count()
    pretrain(task, TinyData(), checkpoint, epochs=3, trainer=partial(make_trainer, count))
    assert count.batches == 4
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(task)[name])


def test_a_damaged_start_is_told(tmp_path: Path) -> None:
    def train(extra: pl.Callback) -> None:
        task = ImageClassifier(tiny_net(), 4)
        pretrain(task, TinyData(), tmp_path / "float.ckpt", epochs=3, trainer=partial(make_trainer, extra))

    with pytest.raises(RuntimeError, match="killed"):
        train(Interrupt(2))
    resume = tmp_path / "float-training" / "last.ckpt"
    resume.write_bytes(resume.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"remove .*float-training to train from the start"):
        train(Count())


def test_nothing_is_made_in_the_systems_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.mkstemp", lambda *_: pytest.fail("a killed process would leave this"))
    pretrain(
        ImageClassifier(tiny_net(), 4),
        TinyData(),
        tmp_path / "float.ckpt",
        epochs=2,
        trainer=partial(pl.Trainer, **QUIET),
    )
    assert [path.name for path in tmp_path.iterdir()] == ["float.ckpt"]


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "last.ckpt"
    CheckpointBeside().save_checkpoint({"state_dict": {"weight": torch.ones(2)}}, path)
    with pytest.raises(TypeError, match="pickle"):
        CheckpointBeside().save_checkpoint({"state_dict": {"weight": torch.zeros(2)}, "more": (i for i in ())}, path)
    assert [found.name for found in path.parent.iterdir()] == ["last.ckpt"]
    assert read_checkpoint(path)["state_dict"]["weight"].tolist() == [1, 1]


@pytest.mark.parametrize(("accuracies", "epoch"), [([0.5, 0.9, 0.7], 1), ([0.5, 0.9, 0.9], 2), ([0.9, 0.9, 0.8], 0)])
def test_keeps_the_best_epoch_and_of_equals_the_last(tmp_path: Path, accuracies: list[float], epoch: int) -> None:
    seen: list[dict[str, torch.Tensor]] = []

    class Spy(pl.Callback):
        def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.callback_metrics["float/val/acc"].fill_(accuracies[len(seen)])
            seen.append(weights(pl_module))  # type: ignore[arg-type]

    task = ImageClassifier(tiny_net(), 4)
    pretrain(task, TinyData(), tmp_path / "float.ckpt", epochs=3, trainer=partial(make_trainer, Spy()))
    assert all(torch.equal(value, seen[epoch][name]) for name, value in weights(task).items())


def test_broken_and_foreign_checkpoints(tmp_path: Path) -> None:
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(DataError, match="broken"):
        pretrain(ImageClassifier(tiny_net(), 4), TinyData(), broken)
    foreign = tmp_path / "foreign.ckpt"
    pretrain(ImageClassifier(tiny_net(), 4), TinyData(), foreign, epochs=1, trainer=partial(pl.Trainer, **QUIET))
    with pytest.raises(DataError, match="another network"):
        pretrain(ImageClassifier(tiny_net(channels=4), 4), TinyData(), foreign)


def test_no_epochs_keep_the_weights(tmp_path: Path) -> None:
    checkpoint, count = tmp_path / "float.ckpt", Count()
    task = ImageClassifier(tiny_net(), 4)
    before = weights(task)
    pretrain(task, TinyData(), checkpoint, epochs=0, trainer=partial(make_trainer, count))
    assert count.batches == 0
    again = ImageClassifier(tiny_net(seed=1), 4)
    pretrain(again, TinyData(), checkpoint, epochs=0, trainer=partial(make_trainer, count))
    for name, value in before.items():
        assert torch.equal(value, weights(again)[name])
    foreign = ImageClassifier(tiny_net(channels=4), 4)
    with pytest.raises(DataError, match="another network"):
        pretrain(foreign, TinyData(), checkpoint, epochs=0)


@pytest.mark.parametrize("epochs", [-1, True, 1.5])
def test_epochs_are_checked(tmp_path: Path, epochs: Any) -> None:
    with pytest.raises(ConfigError, match="epochs"):
        pretrain(ImageClassifier(tiny_net(), 4), TinyData(), tmp_path / "float.ckpt", epochs=epochs)


def test_goes_on_from_whole_epochs_only(tmp_path: Path) -> None:
    """Also where validation comes in the middle of them."""
    options = {"val_check_interval": 0.5}
    with pytest.raises(RuntimeError, match="killed"):
        pretrain(
            ImageClassifier(tiny_net(), 4),
            TinyData(),
            tmp_path / "float.ckpt",
            epochs=3,
            trainer=partial(make_trainer, Interrupt(2), **options),
        )
    count = Count()
    task = ImageClassifier(tiny_net(seed=7), 4)
    pretrain(task, TinyData(), tmp_path / "float.ckpt", epochs=3, trainer=partial(make_trainer, count, **options))
    assert count.batches == 4


def test_the_last_epoch_can_be_kept(tmp_path: Path) -> None:
    class Worse(pl.Callback):
        def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.callback_metrics["val/acc"] = torch.tensor(1.0 / (1 + trainer.current_epoch))

    found = {}
    for keep in ("best", "last"):
        task = ImageClassifier(tiny_net(), 4)
        fit_to_checkpoint(
            task,
            TinyData(),
            tmp_path / f"{keep}.ckpt",
            3,
            partial(make_trainer, Worse()),
            keep=keep,  # type: ignore[arg-type]
        )
        found[keep] = weights(task)
    assert any(not torch.equal(value, found["last"][name]) for name, value in found["best"].items())


class Shuffled(TinyData):
    """In an order by the global generator, as most users' data."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(self.x, self.y), batch_size=8, shuffle=True)


class Noisy(ImageDataModule):
    """The same images in bytes; training images get noise that is drawn anew whenever they are read.

    Worker processes live as long as the loader, and their generators with them: with those, there is no noise.
    """

    name, mean, std, classes = "noisy", (0.5,) * 3, (0.25,) * 3, ("a", "b", "c", "d")

    def __init__(self, num_workers: int) -> None:
        super().__init__((3, 8, 8), 8, 3, num_workers)

    def make_split(self, split: Split) -> ImageTensorDataset:
        images = TinyData().x.mul(40).add(60).clamp(0, 255).byte()
        augment = self.noise if split == "train" and not self.num_workers else None
        return ImageTensorDataset(images, TinyData().y, self.mean, self.std, augment)

    @staticmethod
    def noise(images: Tensor) -> Tensor:
        return (images + torch.randint(40, images.shape)).clamp(0, 255).byte()


@pytest.mark.parametrize("scheduler", ["none", "onecycle"])  # the latter has the loader made before the checkpoint
@pytest.mark.parametrize("make", [Shuffled, partial(Noisy, 0), partial(Noisy, 2)], ids=["shuffled", "noisy", "workers"])
def test_goes_on_as_if_never_stopped(tmp_path: Path, make: Callable[[], TinyData], scheduler: str) -> None:
    def run(checkpoint: str, net: nn.Module, extra: pl.Callback) -> ImageClassifier:
        task = ImageClassifier(net, 4)
        trainer = partial(make_trainer, extra)
        return pretrain(task, make(), tmp_path / checkpoint, epochs=4, scheduler=scheduler, trainer=trainer)

    torch.manual_seed(5)
    whole = run("whole.ckpt", tiny_net(), Count())
    torch.manual_seed(5)
    with pytest.raises(RuntimeError, match="killed"):
        run("float.ckpt", tiny_net(), Interrupt(2))
    torch.manual_seed(6)  # another process
    task = run("float.ckpt", tiny_net(seed=7), Count())
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(task)[name]), name
