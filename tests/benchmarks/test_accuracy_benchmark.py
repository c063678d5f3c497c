"""The accuracy benchmark in its smallest form, with a network of two layers; the real one takes an hour."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_data import small_elpv, small_fashion_mnist
from torch import nn

from lightning_baqe.benchmarks import accuracy, accuracy_rows
from lightning_baqe.benchmarks.accuracy_rows import SMALLEST, Request, Settings, Training, find_row, measure_row
from lightning_baqe.files import Rows

SMALL = ["--smallest", "--networks", "resnet18", "--seeds", "3"]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    def two_layers(name: str, classes: int, **model: Any) -> nn.Module:
        convolution = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        net = nn.Sequential(convolution, nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                            nn.Linear(8, classes))  # fmt: skip
        if model.get("weights") == "imagenet":
            net.pretrained_cfg = {"mean": (0.4,) * 3, "std": (0.2,) * 3}  # type: ignore[assignment]
            net.add_module("conv_stem", nn.Identity())
            net.add_module("bn1", nn.Identity())
            net.add_module("blocks", nn.Sequential(nn.Identity(), nn.Identity(), nn.Identity()))
        return net

    monkeypatch.setattr(accuracy_rows, "network", two_layers)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def row_of(network: str, bits: str, flt: float, fake: float, deployed: float, data: str = "glyphs") -> dict[str, Any]:
    found = {"float": flt, "fake_quant": fake, "deployed": deployed}
    splits = {kind: {"val": value, "test": value} for kind, value in found.items()}
    return {"data": data, "network": network, "bits": bits, "seed": 0, "recall": None, "key": {"images": {}}, **splits}


def request_of(epochs: int = 1) -> Request:
    training = Training(epochs, 1e-3, 0.0)
    return Request("glyphs", "resnet18", "w8a8", 0, SMALLEST, Settings(training, {"w8a8": training}))


def test_rows_are_kept_and_not_made_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "accuracy"
    status = accuracy.main([*SMALL, "--folder", str(folder)])
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert [(row["network"], row["bits"], row["seed"]) for row in rows] == [
        ("resnet18", b, 3) for b in ("w8a8", "w4a4")
    ]
    for row in rows:
        for kind in ("float", "fake_quant", "deployed"):
            assert all(0 <= row[kind][split] <= 1 for split in ("val", "test"))
        assert row["epochs"] == {"float": 1, "tuning": 1}
        assert all(seconds > 0 for seconds in row["seconds"].values())
        assert row["device"]["cpu"]
        assert row["versions"]["torch"]
    assert rows[0]["float"] == rows[1]["float"]
    assert len(list(folder.glob("*.ckpt"))) == 3  # one float network for both
    assert status == int(any(accuracy.failures(row) for row in rows))

    trained = {path: path.stat().st_mtime_ns for path in folder.glob("*.ckpt")}
    assert accuracy.main([*SMALL, "--folder", str(folder)]) == status
    assert [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()] == rows
    # Without the rows they are measured again, of the trained networks.
    (folder / "rows.jsonl").unlink()
    accuracy.main([*SMALL, "--folder", str(folder)])
    again = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    for kind in ("float", "fake_quant", "deployed", "float_curve", "tuning_curve", "epochs"):
        assert [row[kind] for row in again] == [row[kind] for row in rows]
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.ckpt")} == trained
    capsys.readouterr()


@pytest.mark.parametrize("data", ["fashion_mnist", "elpv"])
def test_photographs(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "root"
    if data == "elpv":
        small_elpv(root, 64)
    else:
        small_fashion_mnist(root, 5200, 20)
    accuracy.main(["--data", data, "--smallest", "--seeds", "1", "--root", str(root), "--folder", str(tmp_path)])
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    (settings,) = accuracy.SETTINGS[data].values()
    assert [row["bits"] for row in rows] == list(settings.tuning)
    for row in rows:
        tuned = settings.tuning[row["bits"]] is not None
        assert row["epochs"] == {"float": 1, "tuning": int(tuned)}
        assert (row["recall"] is not None) == (data == "elpv")
    if data == "elpv":
        assert all(0 <= value <= 1 for row in rows for value in row["recall"].values())
        assert "recall" in capsys.readouterr().out


def test_an_interrupted_training_goes_on(tmp_path: Path) -> None:
    said: list[str] = []

    def stop(text: str) -> None:
        if "w8a8" in text and "epoch 2/3" in text:
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        measure_row(request_of(3), tmp_path, 1, stop)
    row = measure_row(request_of(3), tmp_path, 1, said.append)
    assert [text.split(":")[0].rsplit(maxsplit=1)[1] for text in said] == ["2/3", "3/3"]
    assert row["epochs"] == {"float": 3, "tuning": 3}
    assert not list(tmp_path.glob("*-training"))


def test_rows_count_for_their_settings_alone(tmp_path: Path) -> None:
    rows, request = Rows(tmp_path / "rows.jsonl"), request_of()
    assert find_row(rows, request) is None
    rows.append({"key": request.key, "float": 1})
    rows.append({"key": request.key, "float": 2})
    assert find_row(rows, request) == {"key": request.key, "float": 2}
    other = request_of(2)
    assert find_row(rows, other) is None
    assert other.checkpoint(tmp_path, quantized=False) != request.checkpoint(tmp_path, quantized=False)


@pytest.mark.parametrize(
    ("row", "broken"),
    [
        (row_of("resnet18", "w8a8", 0.9, 0.897, 0.897), 0),
        (row_of("resnet18", "w8a8", 0.9, 0.8968, 0.8969), 1),
        (row_of("resnet18", "w4a4", 0.9, 0.8801, 0.8801), 0),
        (row_of("mobilenet_v2", "w4a4", 0.9, 0.86, 0.86), 0),
        (row_of("mobilenet_v2", "w4a4", 0.9, 0.8621, 0.86), 1),
        (row_of("mobilenet_v2", "w4a4", 0.9, 0.85, 0.8599), 2),
        (row_of("mobilenet_v2", "w8a8", 0.9, 0.91, 0.912), 0),
        (row_of("resnet18", "w4a8", 0.935, 0.925, 0.925, "fashion_mnist"), 0),
        (row_of("resnet18", "w4a8", 0.9349, 0.9248, 0.9248, "fashion_mnist"), 2),
        (row_of("tf_efficientnet_lite0", "w8a8", 0.88, 0.88, 0.88, "elpv"), 1),
    ],
)
def test_limits(row: dict[str, Any], broken: int) -> None:
    assert len(accuracy.failures(row)) == broken


def test_tables_hold_every_row_and_the_means() -> None:
    rows = [row_of("resnet18", "w8a8", value, value, value) for value in (0.90, 0.91, 0.92)]
    rows.append(row_of("resnet18", "w4a4", 0.9, 0.8, 0.8))
    assert accuracy.row_table(rows).row_count == 4
    means = accuracy.mean_table(rows)
    assert means.row_count == 2
    columns = {str(column.header): list(column.cells) for column in means.columns}
    assert columns["float"][0] == "91.00 ± 1.00"
    assert columns["most"] == ["+0.00", "+10.00"]
    assert columns["limits"] == ["hold", "fail"]


def test_accuracies_on_images_that_were_trained_on_are_not_shown() -> None:
    row = row_of("tf_efficientnet_lite0", "w8a8", 0.89, 0.89, 0.89, "elpv")
    row["key"]["images"]["val_in_train"] = True
    cells = {str(column.header): next(iter(column.cells)) for column in accuracy.row_table([row]).columns}
    assert cells["float val"] == ""
    assert cells["test"] == "89.00"


@pytest.mark.parametrize(
    "arguments",
    [["--threads", "0"], ["--float-epochs", "0"], ["--bits", "w3a3"], ["--networks", "vgg11"], ["--bits", "w4a8"]],
)
def test_wrong_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        accuracy.main(arguments)
    assert arguments[0] in capsys.readouterr().err
