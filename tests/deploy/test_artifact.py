"""Artifacts: saved and loaded elsewhere, refused when damaged, and a gate that can fail."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_graphs import FLOAT_TOLERANCE, float_errors, lowered

import lightning_baqe as baqe
from lightning_baqe.deploy.artifact import Artifact
from lightning_baqe.deploy.storage import GRAPH, MANIFEST, MODULE, TENSORS, sealed
from lightning_baqe.errors import BuildError, ConfigError
from lightning_baqe.integer.graph import IntegerGraph
from lightning_baqe.kernels.x86.conv_spec import ConvSpec

Sample = tuple[IntegerGraph, torch.Tensor]


def test_resnet_equals_its_graph(resnet: Sample, resnet_artifact: Artifact) -> None:
    graph, x = resnet
    assert torch.equal(resnet_artifact.run(x), graph.run(x))
    wrong = baqe.verify(resnet_artifact, x)
    assert len(wrong) > 30
    assert not any(wrong.values())
    assert resnet_artifact.size_bytes == graph.size_bytes
    assert resnet_artifact.bits == graph.bits
    assert set(resnet_artifact.schedules) == set(graph.bits)


def test_a_larger_image() -> None:
    graph, x = lowered("resnet18", 64, seed=1)
    artifact = baqe.build(graph, schedules="default")
    assert torch.equal(artifact.run(x), graph.run(x))
    assert not any(baqe.verify(artifact, x).values())


def test_float_layers_among_integer_ones() -> None:
    graph, x = lowered("resnet18", 32, seed=2, floats=("conv1", "layer2.0.conv2", "layer3.1.conv1", "fc"))
    assert not graph.is_integer_only
    artifact = baqe.build(graph, schedules="default")
    assert not any(baqe.verify(artifact, x).values())
    errors = float_errors(artifact, x)
    assert errors
    assert max(errors.values()) <= FLOAT_TOLERANCE


def test_another_process_computes_the_same(resnet: Sample, saved_resnet: Path, tmp_path: Path) -> None:
    graph, x = resnet
    np.save(tmp_path / "x.npy", x.numpy())
    code = (
        "import sys, numpy as np, torch, lightning_baqe as baqe\n"
        "art = baqe.Artifact.load(sys.argv[1])\n"
        "np.save(sys.argv[3], art.run(torch.from_numpy(np.load(sys.argv[2]))).numpy())\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(saved_resnet), str(tmp_path / "x.npy"), str(tmp_path / "y.npy")], check=True
    )
    assert (np.load(tmp_path / "y.npy") == graph.run(x).numpy()).all()


def test_saving_again_replaces_the_folder(resnet_artifact: Artifact, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "artifact"
    resnet_artifact.save(folder)
    (folder / "old").write_text("")
    loaded = Artifact.load(resnet_artifact.save(folder))
    assert not (folder / "old").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["artifact"]
    assert loaded.schedules == resnet_artifact.schedules
    assert loaded.plan.digest == resnet_artifact.plan.digest
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["size_bytes"] == resnet_artifact.size_bytes


def test_a_loaded_artifact_can_be_saved(resnet: Sample, saved_resnet: Path, tmp_path: Path) -> None:
    copied = Artifact.load(Artifact.load(saved_resnet).save(tmp_path / "copy"))
    assert torch.equal(copied.run(resnet[1]), resnet[0].run(resnet[1]))


@pytest.mark.parametrize("name", [MANIFEST, MODULE, GRAPH, TENSORS])
def test_a_missing_file_is_named(saved_resnet: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(saved_resnet, folder)
    (folder / name).unlink()
    with pytest.raises(BuildError, match=name):
        Artifact.load(folder)


def test_no_folder_at_all(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="no artifact"):
        Artifact.load(tmp_path / "nowhere")


@pytest.mark.parametrize(("entry", "value", "words"), [("format", 99, "format 99"), ("plan", "0", "other templates")])
def test_another_version_is_refused(saved_resnet: Path, tmp_path: Path, entry: str, value: object, words: str) -> None:
    folder = tmp_path / "other"
    shutil.copytree(saved_resnet, folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(sealed({**manifest, entry: value})))
    with pytest.raises(BuildError, match=words):
        Artifact.load(folder)


def test_the_gate_can_fail(resnet: Sample, saved_resnet: Path) -> None:
    """One wrong constant shows, at its own node and at no other."""
    artifact = Artifact.load(saved_resnet)
    call = next(c for c in artifact.plan.calls if isinstance(c.spec, ConvSpec) and c.result == "layer2.1.conv1")
    artifact.plan.constants[call.arguments[2]][3] += 1 << 16
    wrong = {name: count for name, count in baqe.verify(artifact, resnet[1]).items() if count}
    assert set(wrong) == {"layer2.1.conv1"}


def test_foreign_instructions_are_refused(resnet: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_baqe.deploy.artifact.obstacle", lambda path, vbmi: "which this CPU does not have")
    with pytest.raises(BuildError, match="does not have"):
        baqe.build(resnet[0], schedules="default").run(resnet[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("floats", [(), ("conv1", "layer1.0.conv2", "layer4.1.conv1")])
def test_imagenet_networks(name: str, floats: tuple[str, ...]) -> None:
    graph, x = lowered(name, 224, seed=3, classes=1000, floats=floats)
    artifact = baqe.build(graph, schedules="default")
    assert not any(baqe.verify(artifact, x[:1]).values())
    if floats:
        assert max(float_errors(artifact, x[:1]).values()) <= FLOAT_TOLERANCE
    else:
        assert torch.equal(artifact.run(x[:1]), graph.run(x[:1]))


def test_pixels_that_are_not_finite(resnet: Sample, resnet_artifact: Artifact) -> None:
    x = resnet[1].repeat(3, 1, 1, 1)[:3].clone()
    assert torch.equal(resnet_artifact.run(x, check=True), resnet_artifact.run(x))
    x[1, 2, 3, 4], x[1, 0, 0, 0], x[2, 0, 0, 1] = float("nan"), float("inf"), -float("inf")
    said = r"3 values that are not finite \(1 nan, 2 infinite\) in 2 of 3 images, the first at \(1, 0, 0, 0\)"
    with pytest.raises(ConfigError, match=said):
        resnet_artifact.run(x, check=True)
    resnet_artifact.run(x)  # asked for alone: it costs a look at every pixel


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda x: x.to(torch.uint8), r"x is uint8, the {} wants a float tensor of shape \(n, 3, 32, 32\).*scale"),
        (lambda x: x > 0, "x is bool"),
        (lambda x: x.to(torch.complex64), "x is complex64"),
        (lambda x: x.numpy(), r"x is a numpy\.ndarray, the {} wants .*torch\.from_numpy\(x\)"),
        (lambda x: list(x), "x is a builtins.list, the {} wants"),
        (lambda x: x[0], r"shape \(3, 32, 32\), the {} wants .*give x\[None\] for one image"),
        (lambda x: x[:, :1], r"shape \(1, 1, 32, 32\), the {} wants"),
        (lambda x: x.to("meta"), "x is on device meta.*the {} wants .* that holds values"),
    ],
)
def test_wrong_inputs_are_refused_alike(spoil: Any, said: str, resnet: Sample, resnet_artifact: Artifact) -> None:
    graph, x = resnet
    for run, reader in ((graph.run, "graph"), (resnet_artifact.run, "artifact")):
        with pytest.raises(ConfigError, match=said.format(reader)):
            run(spoil(x[:1]))


def test_other_floats_and_gradients_will_do(resnet: Sample, resnet_artifact: Artifact) -> None:
    graph, x = resnet
    wanted = graph.run(x[:1])
    for same in (x[:1].double(), x[:1].clone().requires_grad_(), x[:1].to(memory_format=torch.channels_last)):
        assert torch.equal(graph.run(same), wanted)
        assert torch.equal(resnet_artifact.run(same), wanted)
