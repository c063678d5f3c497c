"""What a long search must not keep: unloaded modules."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lightning_baqe as baqe
from lightning_baqe.calibration.calibrate import calibrate
from lightning_baqe.entrance.quantize import quantize
from lightning_baqe.quantization.config import BitConfig


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/maps is Linux's")
def test_a_closed_artifact_is_unloaded_and_runs_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    x = torch.rand(2, 3, 8, 8)
    model = calibrate(quantize(net, BitConfig.uniform(net, 8, 8), x[:1]), [x])
    folder = baqe.build(baqe.lower(model), schedules="default").save(tmp_path / "artifact")
    artifact = baqe.Artifact.load(folder)

    def loaded() -> bool:
        return str(folder) in Path("/proc/self/maps").read_text()

    before = artifact.run(x)
    assert loaded()
    artifact.close()
    gc.collect()  # without it the module stays loaded
    assert not loaded()
    assert torch.equal(artifact.run(x), before)
