"""Residual sums at the end of convolutions, or in kernels of their own where a device fuses none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fake_device import FakeDevice
from small_graphs import Maker, images
from torch import nn

from lightning_baqe.calibration.calibrate import calibrate
from lightning_baqe.deploy.artifact import Artifact
from lightning_baqe.deploy.calls import Plan
from lightning_baqe.deploy.plan import make_plan
from lightning_baqe.deploy.storage import MANIFEST, sealed
from lightning_baqe.deploy.verify import verify
from lightning_baqe.entrance.quantize import quantize
from lightning_baqe.errors import BuildError
from lightning_baqe.hardware.options import BuildOptions
from lightning_baqe.hardware.target import get_target
from lightning_baqe.integer.graph import IntegerGraph
from lightning_baqe.kernels.x86.conv_spec import ConvSpec
from lightning_baqe.kernels.x86.pixels import PixelSpec
from lightning_baqe.measurement.build import build_with
from lightning_baqe.quantization.config import BitConfig, LayerBits
from lightning_baqe.runs.evaluation import evaluate
from lightning_baqe.tuning.network_space import NetworkSpace
from lightning_baqe.tuning.tuner import tunable_layers


@pytest.fixture(scope="module")
def graph() -> IntegerGraph:
    maker = Maker(16, 6)
    trunk = maker.conv(out=32, padding=1, name="first")
    total = maker.add(trunk, maker.conv(trunk, out=32, padding=1, name="branch"))
    maker.conv(maker.concat(total, maker.conv(trunk, out=16, kernel=1, name="side")), out=8, padding=1, name="last")
    return maker.graph()


def sums(plan: Plan) -> tuple[int, int]:
    """Those at the end of convolutions, and those in kernels of their own."""
    fused = sum(isinstance(call.spec, ConvSpec) and call.spec.residual is not None for call in plan.calls)
    return fused, sum(isinstance(call.spec, PixelSpec) and call.spec.op == "add" for call in plan.calls)


def test_sums_are_where_they_are_wanted(graph: IntegerGraph) -> None:
    target = get_target()
    fused, apart = make_plan(graph, BuildOptions(target)), make_plan(graph, BuildOptions(target, fuse_residual=False))
    assert (sums(fused), sums(apart)) == ((1, 0), (0, 1))
    assert len(apart.calls) == len(fused.calls) + 1
    assert len(apart.buffers) == len(fused.buffers) == 2  # concatenations need no copy either way
    assert apart.digest != fused.digest


def test_an_artifact_says_so_and_is_loaded_so(graph: IntegerGraph, tmp_path: Path) -> None:
    artifact = build_with(graph, BuildOptions(fuse_residual=False), "default")
    x = images(graph)
    assert torch.equal(artifact.run(x), graph.run(x))
    assert not any(verify(artifact, x).values())
    loaded = Artifact.load(artifact.save(tmp_path / "apart"))
    assert sums(loaded.plan) == (0, 1)
    assert torch.equal(loaded.run(x), graph.run(x))
    path = tmp_path / "apart" / MANIFEST
    manifest = json.loads(path.read_text())
    assert manifest["fuse_residual"] is False
    path.write_text(json.dumps(sealed({**manifest, "fuse_residual": True})))
    with pytest.raises(BuildError, match="other templates"):
        Artifact.load(tmp_path / "apart")


def test_what_is_tuned_and_searched_is_what_is_built(graph: IntegerGraph) -> None:
    target = get_target()
    for fuse_residual in (True, False):
        specs = tunable_layers(graph, BuildOptions(target, fuse_residual=fuse_residual))
        assert any(isinstance(spec, ConvSpec) and spec.residual is not None for spec in specs) == fuse_residual
    base = BitConfig({layer: LayerBits(8, 8) for layer in graph.bits}, ties=())
    space = NetworkSpace.of({8: graph}, base, BuildOptions(target, fuse_residual=False))
    schedules = {layer: found[8] for layer, found in space.defaults.items()}
    assert make_plan(graph, BuildOptions(target, fuse_residual=False), schedules).schedules == schedules


def test_evaluation_hands_it_on(tmp_path: Path) -> None:
    network, x = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten()), torch.randn(1, 3, 2, 2)
    model = calibrate(quantize(network, BitConfig.uniform(network, 8, 8), x), [x])
    options, device = BuildOptions(threads=3, fuse_residual=False), FakeDevice(tmp_path / "records.db")
    evaluate(model.eval(), [(x, torch.zeros(1, dtype=torch.int64))], tmp_path / "artifact", options, device=device)
    assert [artifact.plan.options for artifact in device.networks] == [options]
