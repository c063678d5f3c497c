"""The formats that the package reads: how a run writes each, and how users' code reads it."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_baqe.benchmarks.damage.spoilers import (
    Spoiled,
    spoiled_arrays,
    spoiled_bytes,
    spoiled_checkpoint,
    spoiled_database,
    spoiled_fields,
    spoiled_gzip,
    spoiled_idx,
    spoiled_json,
    spoiled_lines,
    spoiled_picture,
    spoiled_yaml,
)
from lightning_baqe.benchmarks.damage.watched import Differs, may_compile
from lightning_baqe.errors import BaqeError
from lightning_baqe.files import Rows, replace_file

if TYPE_CHECKING:
    from lightning_baqe.integer.graph import IntegerGraph


@dataclass(frozen=True)
class Format:
    """A format.

    Args:
        file: its name in a folder.
        write: makes the folder's files.
        read: reads them as users' code does.
        spoil: ways to spoil the file; gets its content and a generator.
        repair: makes the folder agree with a spoiled file, as who does it on purpose would.
    """

    file: str
    write: Callable[[Path], object]
    read: Callable[[Path], object]
    spoil: Callable[[bytes, np.random.Generator], Spoiled]
    repair: Callable[[Path], object] = lambda folder: None


def _quantized() -> IntegerGraph:
    """Of a network with most kinds of nodes."""
    import torch
    from torch import nn

    import lightning_baqe as baqe

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
            self.norm, self.act = nn.BatchNorm2d(8), nn.PReLU(8)
            self.head, self.layer_norm = nn.Linear(16, 5), nn.LayerNorm(16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(self.first(x))
            y = y + self.act(self.norm(self.second(y)))
            y = torch.cat([nn.functional.max_pool2d(y, 2), nn.functional.avg_pool2d(torch.sigmoid(y), 2)], 1)
            y = y[:, [3, 1, 2, 0, 7, 6, 5, 4, 8, 9, 15, 14, 13, 12, 11, 10]].permute(0, 1, 3, 2)
            return self.head(self.layer_norm((y * y.mean((2, 3), keepdim=True)).mean((2, 3))))

    torch.manual_seed(0)
    x = torch.randn(8, 3, 8, 8)
    net = Net().eval()
    quantized = baqe.quantize(net, baqe.BitConfig.uniform(net, 4, 8), x, fallback="float")
    return baqe.lower(baqe.calibrate(quantized, [x]))


def _write_artifact(folder: Path) -> None:
    import lightning_baqe as baqe

    baqe.build(_quantized(), schedules="default").save(folder)


def _reseal(folder: Path, names: tuple[str, ...] = ()) -> None:
    """A manifest with new digests of these files and of itself, as whoever changes something on purpose would write."""
    from lightning_baqe.deploy.storage import MANIFEST, _file_digest, sealed

    manifest = json.loads((folder / MANIFEST).read_text())
    paths = {name: folder / name for name in names}
    small = {n: _file_digest(path) for n, path in paths.items() if path.is_file() and path.stat().st_size < 1 << 30}
    if small:
        manifest["files"] |= small
    if isinstance(manifest, dict):
        replace_file(folder / MANIFEST, json.dumps(sealed(manifest)).encode())


def _reseal_graph(folder: Path) -> None:
    from lightning_baqe.deploy.storage import GRAPH, TENSORS

    _reseal(folder, (GRAPH, TENSORS))


def _read_graph(folder: Path) -> None:
    """Load, interpret; what was let in is compiled, too, and both must agree."""
    import torch

    from lightning_baqe.deploy.artifact import Artifact

    graph = Artifact.load_graph(folder)
    x = torch.randn(2, *graph.input_shape, generator=torch.Generator().manual_seed(0))
    wanted = graph.run(x)
    with may_compile():
        rebuilt = Artifact.load(folder, rebuild=True)
        given = rebuilt.run(x)
    if not torch.allclose(given, wanted, rtol=1e-3, atol=1e-3, equal_nan=True):
        raise Differs(f"{(given - wanted).abs().max()}")


def _read_artifact(folder: Path) -> None:
    import torch

    from lightning_baqe.deploy.artifact import Artifact

    loaded = Artifact.load(folder)
    loaded.run(torch.zeros(1, *loaded.graph.input_shape))


def _write_bits(folder: Path) -> None:
    from torchvision.models import resnet18

    from lightning_baqe.quantization.config import BitConfig

    network = resnet18()
    (folder / "bits.json").write_text(BitConfig.uniform(network).to_json())


def _read_bits(folder: Path) -> None:
    from lightning_baqe.quantization.config import BitConfig

    BitConfig.from_json(folder / "bits.json")


def _study(folder: Path) -> Any:
    from lightning_baqe.runs.study import SearchStudy

    return SearchStudy(folder, None, {"recipe": "qat_search", "metric": None, "model": "net", "dataset": "data"})


def _write_study(folder: Path) -> None:
    from lightning_baqe.runs.study import FLOAT_FIGURES, RESULT
    from lightning_baqe.runs.summary import Baseline, Figures

    study = _study(folder)
    study.keep(FLOAT_FIGURES, Figures(accuracy=0.9, latency_us=1000.0, size_bytes=10_000).record())
    figures: dict[str, Any] = {
        "accuracy": 0.8,
        "latency_us": 500.0,
        "size_bytes": 2_000,
        "bits": {"conv1": (8, 8), "fc": (4, 4)},
    }
    study.add_baseline(Baseline(name="uniform_8", **figures))
    for number in range(3):
        trial = study._study.ask()
        trial.set_user_attr(RESULT, {**figures, "phase": "ted", "accuracy": 0.7 + 0.05 * number})
        study._study.tell(trial, [0.3 - 0.05 * number, 0.5, 0.2])
    study.write()
    study.close()


def _read_study(folder: Path) -> None:
    with contextlib.closing(_study(folder)) as study:
        if study.float_result is not None:  # else a search would measure it again
            study.summary()


def _read_summary(folder: Path) -> None:
    from lightning_baqe.runs.front import Front

    front = Front.load(folder)
    with contextlib.suppress(BaqeError):
        front.select(latency_us=600)


def _write_records(folder: Path) -> None:
    import lightning_baqe as baqe
    from lightning_baqe.measurement.database import KernelRecord, Records
    from lightning_baqe.measurement.records_exchange import export_records

    artifact, records = baqe.build(_quantized(), schedules="default"), Records(folder / "records.db")
    for call in artifact.plan.calls:
        if call.layer is not None:
            records.add_kernel(call.spec, artifact.target, KernelRecord(dict(call.knobs), 2.0, [2.0, 3.0], True))
    records.add_model(artifact.plan.digest, 1, [10.0, 11.0], 10.5)
    records.add_peak(artifact.target, "dot", 4, 100.0)
    export_records(records, folder / "records.jsonl")
    artifact.save(folder / "artifact")


def _read_record_lines(folder: Path) -> None:
    from lightning_baqe.measurement.database import Records
    from lightning_baqe.measurement.records_exchange import import_records

    import_records(Records(folder / "fresh.db"), folder / "records.jsonl")


def _read_records(folder: Path) -> None:
    from lightning_baqe.deploy.artifact import Artifact
    from lightning_baqe.measurement.build import choose_plan
    from lightning_baqe.measurement.database import Records

    artifact = Artifact.load(folder / "artifact")
    records = Records(folder / "records.db")
    plan = choose_plan(artifact.graph, artifact.plan.options, None, records)
    records.model(plan.digest, 1)
    records.peak(artifact.target, "dot", 4)
    records.add_peak(artifact.target, "dot", 4, 101.0)


def _write_configuration(folder: Path) -> None:
    from lightning_baqe.train import compose, open_run

    open_run(compose(["recipe=qat_search", f"run_dir={folder}"]))


def _read_configuration(folder: Path) -> None:
    from lightning_baqe.train import compose, open_run

    open_run(compose(["recipe=qat_search", f"run_dir={folder}"]))


def _write_landscape(folder: Path) -> None:
    from lightning_baqe.landscapes.measured import FOLDER, SUFFIX

    shutil.copyfile(str(FOLDER / f"mobilenet_v2_glyphs{SUFFIX}"), folder / f"landscape{SUFFIX}")


def _read_landscape(folder: Path) -> None:
    from lightning_baqe.landscapes.measured import SUFFIX, Landscape

    landscape = Landscape.load(folder / f"landscape{SUFFIX}")
    for params in landscape.candidates(2, np.random.default_rng(0)):
        landscape.evaluate(params)
    landscape.knowledge()


def _write_checkpoint(folder: Path) -> None:
    import torch
    from torch import nn

    torch.save(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).state_dict(), folder / "float.ckpt")


def _read_checkpoint(folder: Path) -> None:
    from lightning_baqe.tasks.checkpoint import read_state

    read_state(folder / "float.ckpt")


def _glyphs(folder: Path) -> Any:
    from lightning_baqe.data.glyphs import GlyphsDataModule

    return GlyphsDataModule(train_size=20, val_size=10, test_size=10, cache_dir=folder)


def _write_glyphs(folder: Path) -> None:
    data = _glyphs(folder)
    data.prepare_data()
    data._cache_file("val").rename(folder / "val.npz")


def _read_glyphs(folder: Path) -> None:
    data = _glyphs(folder)
    (folder / "val.npz").rename(data._cache_file("val"))
    data.setup("validate")
    next(iter(data.val_dataloader()))


_IDX = {part: f"t10k-{part}-ubyte" for part in ("images-idx3", "labels-idx1")}


def _write_idx(folder: Path) -> None:
    (folder / _IDX["images-idx3"]).write_bytes(
        bytes((0, 0, 8, 3)) + np.array((20, 28, 28), ">u4").tobytes() + bytes(20 * 28 * 28)
    )
    labels = (np.arange(20) % 10).astype(np.uint8).tobytes()
    (folder / _IDX["labels-idx1"]).write_bytes(bytes((0, 0, 8, 1)) + np.array((20,), ">u4").tobytes() + labels)


def _read_idx(folder: Path) -> None:
    from lightning_baqe.data.fashion_mnist import FashionMnistDataModule

    FashionMnistDataModule(folder).setup("test")


def _write_picture(folder: Path) -> None:
    from PIL import Image

    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), np.uint8)).save(folder / "picture.png")


def _read_picture(folder: Path) -> None:
    from lightning_baqe.data.pictures import read_image

    read_image(folder / "picture.png")


def _write_rows(folder: Path) -> None:
    for number in range(4):
        Rows(folder / "rows.jsonl").append({"number": number, "figures": [1.0, 2.0], "name": "x"})


def _read_rows(folder: Path) -> None:
    Rows(folder / "rows.jsonl").read()


def _write_device(folder: Path) -> None:
    from omegaconf import OmegaConf

    from lightning_baqe.train import compose

    found = OmegaConf.to_container(compose(["recipe=qat_search"]).deploy, resolve=True)
    (folder / "device.json").write_text(json.dumps(found))


def _read_device(folder: Path) -> None:
    from lightning_baqe.errors import ConfigError
    from lightning_baqe.files import parse_json, read_file
    from lightning_baqe.hardware.description import DeviceDescription

    content = parse_json(read_file(folder / "device.json", 1 << 20), "device.json")
    if not isinstance(content, dict):
        raise ConfigError("Hydra composes nothing but mappings")
    DeviceDescription.of({name: value for name, value in content.items() if not name.startswith("_")})


FORMATS: dict[str, Format] = {
    "bit-config": Format("bits.json", _write_bits, _read_bits, spoiled_json),
    "manifest": Format("manifest.json", _write_artifact, _read_artifact, spoiled_json),
    "manifest, sealed again": Format("manifest.json", _write_artifact, _read_artifact, spoiled_fields, _reseal),
    "integer graph": Format("graph.json", _write_artifact, _read_graph, spoiled_json, _reseal_graph),
    "tensors": Format("tensors.npz", _write_artifact, _read_graph, spoiled_arrays, _reseal_graph),
    "module": Format("module.so", _write_artifact, _read_artifact, spoiled_bytes),
    "summary": Format("summary.json", _write_study, _read_summary, spoiled_json),
    "study": Format("study.db", _write_study, _read_study, spoiled_database),
    "records": Format("records.db", _write_records, _read_records, spoiled_database),
    "record lines": Format("records.jsonl", _write_records, _read_record_lines, spoiled_lines),
    "configuration": Format("config.yaml", _write_configuration, _read_configuration, spoiled_yaml),
    "device": Format("device.json", _write_device, _read_device, spoiled_json),
    "landscape": Format("landscape.json.gz", _write_landscape, _read_landscape, spoiled_gzip),
    "float checkpoint": Format("float.ckpt", _write_checkpoint, _read_checkpoint, spoiled_checkpoint),
    "glyphs": Format("val.npz", _write_glyphs, _read_glyphs, spoiled_arrays),
    "IDX": Format(_IDX["images-idx3"], _write_idx, _read_idx, spoiled_idx),
    "picture": Format("picture.png", _write_picture, _read_picture, spoiled_picture),
    "rows": Format("rows.jsonl", _write_rows, _read_rows, spoiled_lines),
}
