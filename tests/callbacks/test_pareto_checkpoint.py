"""Checkpoints on the front, in real small Trainers, through resumes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_baqe.callbacks import ParetoCheckpoint
from lightning_baqe.errors import ConfigError
from lightning_baqe.search import pareto_mask

MONITOR = {"val/acc": "max", "latency_us": "min"}
NAN = float("nan")


class Scripted(pl.LightningModule):
    """Logs what it is told; its one weight is the epoch that it was last trained in."""

    def __init__(self, points: Sequence[tuple[float, float]], in_training: bool = False) -> None:
        super().__init__()
        self.points, self.in_training = list(points), in_training
        self.layer = nn.Linear(1, 1, bias=False)

    def log_point(self) -> None:
        accuracy, latency_us = self.points[self.current_epoch]
        self.log("val/acc", accuracy)
        self.log("latency_us", latency_us)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        if self.in_training:
            self.log_point()
        return self.layer(batch).sum()

    def on_train_epoch_start(self) -> None:
        with torch.no_grad():
            self.layer.weight.fill_(self.current_epoch)

    def validation_step(self, batch: Tensor, index: int) -> None:
        if not self.in_training:
            self.log_point()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def loader() -> DataLoader[Any]:
    return DataLoader([torch.ones(1), torch.ones(1)], batch_size=1)


def fit(
    module: Scripted,
    callback: ParetoCheckpoint,
    epochs: int | None = None,
    ckpt_path: str | None = None,
    **options: Any,
) -> pl.Trainer:
    plain = {"max_epochs": epochs or len(module.points), "logger": False, "enable_progress_bar": False,
             "enable_model_summary": False, "accelerator": "cpu", "num_sanity_val_steps": 1}  # fmt: skip
    trainer = pl.Trainer(**{**plain, **options}, callbacks=[callback])
    trainer.fit(module, loader(), None if module.in_training else loader(), ckpt_path=ckpt_path)
    return trainer


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


def front_of(points: Sequence[tuple[float, float]]) -> list[int]:
    """Epochs on the front, of equal points the first one."""
    finite = [i for i, point in enumerate(points) if all(v - v == 0 for v in point)]
    if not finite:
        return []
    values = torch.tensor([[-points[i][0], points[i][1]] for i in finite], dtype=torch.float64)
    kept = [i for i, on in zip(finite, pareto_mask(values).tolist(), strict=True) if on]
    return [i for i in kept if points[i] not in points[:i]]


def test_dominated_checkpoints_are_deleted(tmp_path: Path) -> None:
    points = [(0.5, 100.0), (0.4, 120.0), (0.6, 100.0), (0.9, 300.0), (0.7, 90.0), (0.7, 90.0)]
    callback = ParetoCheckpoint(MONITOR, tmp_path / "kept", "{epoch}-{val/acc:.2f}")
    trainer = fit(Scripted(points), callback)
    assert names(tmp_path / "kept") == {"3-0.90.ckpt", "4-0.70.ckpt"}
    assert [(p.epoch, p.values["latency_us"]) for p in callback.front] == [(3, 300.0), (4, 90.0)]
    for point in callback.front:
        content = torch.load(point.path, weights_only=True)
        assert content["epoch"] == point.epoch
        assert float(content["state_dict"]["layer.weight"]) == point.epoch
    assert trainer.checkpoint_callbacks == [callback]  # Lightning adds none of its own


@given(
    points=st.lists(
        st.tuples(st.sampled_from([0.0, 0.5, 1.0, NAN, float("inf")]), st.sampled_from([1.0, 2.0, 3.0])),
        min_size=1, max_size=6,
    ),
    cut=st.integers(1, 5),
)  # fmt: skip
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.filterwarnings("ignore:no checkpoint for step")
def test_what_is_kept_is_the_front_also_through_a_resume(
    points: list[tuple[float, float]], cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("front")
    callback = ParetoCheckpoint(MONITOR, folder, "{epoch}")
    trainer = fit(Scripted(points), callback, min(cut, len(points)))
    if cut < len(points):
        trainer.save_checkpoint(folder.parent / f"{folder.name}.resume")
        callback = ParetoCheckpoint(MONITOR, folder, "{epoch}")
        fit(Scripted(points), callback, len(points), str(folder.parent / f"{folder.name}.resume"))
    assert [p.epoch for p in callback.front] == front_of(points)
    assert names(folder) == {f"{epoch}.ckpt" for epoch in front_of(points)}


def test_a_checkpoint_of_the_front_resumes_the_front(tmp_path: Path) -> None:
    points = [(0.5, 100.0), (0.6, 200.0), (0.7, 50.0), (0.8, 60.0)]
    first = ParetoCheckpoint(MONITOR, tmp_path, "{epoch}")
    fit(Scripted(points), first, 2)
    assert names(tmp_path) == {"0.ckpt", "1.ckpt"}
    second = ParetoCheckpoint(MONITOR, tmp_path, "{epoch}")
    fit(Scripted(points), second, ckpt_path=str(tmp_path / "1.ckpt"))
    assert names(tmp_path) == {"2.ckpt", "3.ckpt"}  # those of the first run are dominated and gone


def test_a_run_that_died_before_deleting_deletes_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = [(0.5, 100.0), (0.6, 90.0), (0.6, 95.0)]

    def die(self: ParetoCheckpoint, trainer: pl.Trainer) -> None:
        if trainer.global_step > 2:
            raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(ParetoCheckpoint, "_delete_doomed", die)
        with pytest.raises(RuntimeError, match="power cut"):
            fit(Scripted(points), ParetoCheckpoint(MONITOR, tmp_path, "{epoch}"))
    assert names(tmp_path) == {"0.ckpt", "1.ckpt"}
    fit(Scripted(points), ParetoCheckpoint(MONITOR, tmp_path, "{epoch}"), ckpt_path=str(tmp_path / "1.ckpt"))
    assert names(tmp_path) == {"1.ckpt"}


def test_files_of_others_stay(tmp_path: Path) -> None:
    (tmp_path / "0.ckpt").write_text("theirs")
    (tmp_path / "notes.txt").write_text("theirs")

    class Replace(Scripted):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                (tmp_path / "0-v1.ckpt").write_text("somebody put another file here")

    with pytest.warns(UserWarning, match="changed by somebody"):
        fit(Replace([(0.1, 2.0), (0.2, 1.0)]), ParetoCheckpoint(MONITOR, tmp_path, "{epoch}"))
    assert names(tmp_path) == {"0.ckpt", "0-v1.ckpt", "1.ckpt", "notes.txt"}
    assert (tmp_path / "0.ckpt").read_text() == "theirs"


def test_checkpoints_that_are_gone_count_no_longer(tmp_path: Path) -> None:
    points = [(0.9, 10.0), (0.5, 20.0)]
    trainer = fit(Scripted(points), ParetoCheckpoint(MONITOR, tmp_path / "kept", "{epoch}"), 1)
    trainer.save_checkpoint(tmp_path / "resume.ckpt")
    (tmp_path / "kept" / "0.ckpt").unlink()
    with pytest.warns(UserWarning, match="missing and no longer count"):
        fit(Scripted(points), ParetoCheckpoint(MONITOR, tmp_path / "kept", "{epoch}"),
            ckpt_path=str(tmp_path / "resume.ckpt"))  # fmt: skip
    assert names(tmp_path / "kept") == {"1.ckpt"}


def test_a_bound_keeps_what_contributes_most(tmp_path: Path) -> None:
    points = [(0.0, 0.0), (1.0, 10.0), (0.5, 5.0), (0.51, 5.05), (0.7, 4.0)]
    callback = ParetoCheckpoint(MONITOR, tmp_path, "{epoch}", max_to_keep=3)
    fit(Scripted(points), callback)
    assert names(tmp_path) == {"0.ckpt", "1.ckpt", "4.ckpt"}


def test_one_metric_keeps_the_best(tmp_path: Path) -> None:
    fit(Scripted([(0.1, 1.0), (0.3, 1.0), (0.2, 1.0)]), ParetoCheckpoint({"val/acc": "max"}, tmp_path, "{epoch}"))
    assert names(tmp_path) == {"1.ckpt"}


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_metrics_of_training_epochs(tmp_path: Path) -> None:
    trainer = fit(Scripted([(0.1, 2.0), (0.2, 1.0)], in_training=True), ParetoCheckpoint(MONITOR),
                  default_root_dir=tmp_path)  # fmt: skip
    assert trainer.global_step == 4
    assert names(tmp_path / "pareto_checkpoints") == {"epoch=1-step=4.ckpt"}


def test_weights_only(tmp_path: Path) -> None:
    fit(Scripted([(0.1, 2.0)]), ParetoCheckpoint(MONITOR, tmp_path, "{epoch}", save_weights_only=True))
    content = torch.load(tmp_path / "0.ckpt", weights_only=True)
    assert "optimizer_states" not in content
    assert "callbacks" not in content


def test_nan_is_said_and_never_kept(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"step 4: \{'val/acc': nan\} is not finite"):
        fit(Scripted([(0.1, 2.0), (NAN, 1.0)]), ParetoCheckpoint(MONITOR, tmp_path, "{epoch}"))
    assert names(tmp_path) == {"0.ckpt"}


def test_fast_dev_run_writes_nothing(tmp_path: Path) -> None:
    fit(Scripted([(0.1, 2.0)]), ParetoCheckpoint(MONITOR, tmp_path), fast_dev_run=True)
    assert names(tmp_path) == set()


def test_errors_say_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"names \['size'\].* only \['latency_us', 'val/acc'\] were logged"):
        fit(Scripted([(0.1, 2.0)]), ParetoCheckpoint({"size": "min"}, tmp_path))
    with pytest.raises(ConfigError, match=r"names 'acc'; wanted are some of \['epoch', 'latency_us', 'step'"):
        fit(Scripted([(0.1, 2.0)]), ParetoCheckpoint(MONITOR, tmp_path, "{acc}"))
    with pytest.raises(ConfigError, match="has no form 'q'"):
        fit(Scripted([(0.1, 2.0)]), ParetoCheckpoint(MONITOR, tmp_path, "{val/acc:q}"))
    for monitor in ({}, {"a": "maximum"}):
        with pytest.raises(ConfigError, match="'min' or 'max'"):
            ParetoCheckpoint(monitor)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="max_to_keep=0"):
        ParetoCheckpoint(MONITOR, max_to_keep=0)


RANKS = """
import sys
from pathlib import Path
from test_pareto_checkpoint import MONITOR, Scripted, fit
from lightning_baqe.callbacks import ParetoCheckpoint

class Own(Scripted):  # every rank sees other values; rank zero's decide
    def log_point(self):
        if self.global_rank:
            self.points[self.current_epoch] = (float(self.current_epoch), 1.0)
        super().log_point()

callback = ParetoCheckpoint(MONITOR, Path(sys.argv[1]), "{epoch}")
trainer = fit(Own([(0.5, 100.0), (0.4, 120.0), (0.9, 300.0), (0.7, 90.0)]), callback, strategy="ddp", devices=2)
print(f"\\nfront {[point.epoch for point in callback.front]}", flush=True)  # in one piece: two ranks share the pipe
"""


@pytest.mark.slow
def test_two_ranks_agree(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"  # a file, since Lightning starts it again for the second rank
    script.write_text(RANKS)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
                   "OMP_NUM_THREADS": "1"}  # fmt: skip
    command = [sys.executable, str(script), str(tmp_path / "kept")]
    done = subprocess.run(command, env=environment, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if "front" in line] == ["front [2, 3]"] * 2
    assert names(tmp_path / "kept") == {"2.ckpt", "3.ckpt"}
