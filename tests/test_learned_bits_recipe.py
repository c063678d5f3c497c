"""The recipe of learned bits in its smallest form: sizes are kept, runs go on, what cannot be is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from smallest import LEARNED_BITS, SMALLEST

from lightning_baqe.callbacks import LearnedBits
from lightning_baqe.deploy.artifact import Artifact
from lightning_baqe.tasks.checkpoint import read_checkpoint
from lightning_baqe.train import main

OURS = ["recipe=learned_bits", *SMALLEST, *LEARNED_BITS]


@pytest.fixture(autouse=True)
def _own_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_BAQE_CACHE", str(tmp_path / "cache"))


def trial_of(run_dir: Path) -> dict[str, Any]:
    (trial,) = json.loads((run_dir / "summary.json").read_text())["trials"]
    return trial


@pytest.mark.parametrize("by_channel", [False, True])
def test_a_run(tmp_path: Path, capfd: pytest.CaptureFixture[str], by_channel: bool) -> None:
    run_dir = tmp_path / "run"
    ours = [*OURS, f"run_dir={run_dir}", f"learned_bits.by_channel={by_channel}"]
    assert main(ours) == 0
    shown = capfd.readouterr()
    assert "trial_0" in shown.out
    assert "mean bits of 5 wanted" in shown.err
    assert (run_dir / "bits.png").stat().st_size > 5000
    trial = trial_of(run_dir)
    assert trial["phase"] == "learned_bits"
    counts = {"stem.0": 216, "conv1.0": 576, "conv2.0": 576, "fc": 80}
    weights = {layer: trial["bits"][layer][0] for layer in counts}
    assert all(isinstance(bits, list) == by_channel for bits in weights.values())
    assert sum(np.mean(weights[layer]) * n for layer, n in counts.items()) <= 5 * sum(counts.values())
    artifact = Artifact.load(run_dir / "artifacts" / "trial_0")
    assert artifact.graph.is_integer_only
    artifact.close()
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["float.ckpt", "learned_bits.ckpt"]
    before = (run_dir / "checkpoints" / "learned_bits.ckpt").stat().st_mtime_ns
    assert main(ours) == 0  # nothing is trained again
    assert (run_dir / "checkpoints" / "learned_bits.ckpt").stat().st_mtime_ns == before
    assert trial_of(run_dir)["accuracy"] == trial["accuracy"]


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main([*OURS, f"run_dir={tmp_path}/whole"]) == 0

    def interrupted(self: LearnedBits, epoch: int) -> None:
        if epoch == 2:
            raise KeyboardInterrupt
        enter(self, epoch)

    enter = LearnedBits._enter
    monkeypatch.setattr(LearnedBits, "_enter", interrupted)
    assert main([*OURS, f"run_dir={tmp_path}/run"]) != 0
    monkeypatch.setattr(LearnedBits, "_enter", enter)
    assert main([*OURS, f"run_dir={tmp_path}/run"]) == 0
    whole, run = trial_of(tmp_path / "whole"), trial_of(tmp_path / "run")
    assert run["bits"] == whole["bits"]
    assert run["accuracy"] == whole["accuracy"]
    kept = "checkpoints/learned_bits.ckpt"
    first, second = (read_checkpoint(tmp_path / name / kept)["state_dict"] for name in ("whole", "run"))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_bytes_biases_and_several_bits_in_turn(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ours = [*OURS, "learned_bits.weights=null", "learned_bits.weight_bytes=900", "learned_bits.biases=true"]
    assert main([*ours, "learned_bits.pretrain_epochs=2", "learned_bits.start=[8,7]", f"run_dir={tmp_path}"]) == 0
    assert "trial_0" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["learned_bits.weights=1.5"], "weights=1.5, wanted are mean bits of 2, which the smallest network has, to 8"),
        (["learned_bits.activations=9"], "activations=9, wanted are mean bits of 2"),
        (["learned_bits.tune_epochs=0"], "learned_bits.tune_epochs"),
        (["learned_bits.gradients.weights=dsq"], "'dsq' is unknown"),
        (["pressure=ramp", "pressure.share=2"], "share=2"),
        (["learned_bits.weight_init=median"], "weight_init must be one of"),
        (["learned_bits.activation_range=max"], "activation_range must be one of"),
        (["learned_bits.distillation=2"], "weight=2"),
        (["learned_bits.every=0"], "every"),
        (["learned_bits.learning_rate=-1"], "learning_rate=-1"),
        (["pressure.gains=[20,4]"], "three numbers"),
        (["pressure.first=0"], "one above 0"),
        (["learned_bits.start=null"], "wanted are bits of 2 to 8"),
        (["learned_bits.start=[8,4]"], "start=(8, 4) are 2 bits in turn for 1 epochs"),
        (["learned_bits.weight_bytes=900"], "learned_bits.weights=5 and learned_bits.weight_bytes=900, but one of the"),
        (["learned_bits.weights=null", "learned_bits.weight_bytes=300"], "weight_bytes=300 cannot be reached"),
        (["deploy.bits.convolution.weight=[8,32]"], "has weights of [8, 32] bit"),
    ],
)
def test_what_cannot_be_is_refused(
    options: list[str], wanted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*OURS, *options, f"run_dir={tmp_path}/run"]) == 1
    assert wanted in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()
