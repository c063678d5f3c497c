"""What damaged and hostile files do: ``python -m lightning_baqe.benchmarks.malformed``.

Each format that the package reads is written once, as a run writes it, and then spoiled in many ways: bytes, values of
JSON, entries of archives, pickles that would run a command. Each spoiled file is read as users' code reads it, in a
process of its own format that another watches.

| outcome | means |
| --- | --- |
| refused | one of our errors, naming the file |
| read | no error: what was changed has another meaning, or none |
| traceback | another exception |
| signal | the process died |
| hang | no answer in half a minute, or more than 4 GiB taken |
| executed | code of the file ran, a program was started, or a file outside of the folder was written |
| differs | a graph that was let in computes one thing interpreted and another compiled |

Only the first two are right.
"""

from __future__ import annotations

import contextlib
import copy
import gzip
import io
import json
import os
import pickle
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_baqe.benchmarks.setups import console_of, parser_of, table_of
from lightning_baqe.errors import BaqeError
from lightning_baqe.files import Rows, replace_file
from lightning_baqe.hardware.identity import device_info

if TYPE_CHECKING:
    from lightning_baqe.integer.graph import IntegerGraph

OUTCOMES = ("refused", "read", "traceback", "signal", "hang", "executed", "differs")
RIGHT = ("refused", "read")
LIMIT_S, LIMIT_BYTES = 30, 4 << 30
_RESULT = "row: "

Spoiled = Iterator[tuple[str, Callable[[Path], None]]]  # what was done, and what does it to the file


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


# --- ways to spoil ------------------------------------------------------------------------------------------------


class _Runs:
    """A pickle that would write a file."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch executed",)


def _put(content: bytes) -> Callable[[Path], None]:
    return lambda path: replace_file(path, content)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _endless(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def _huge(path: Path) -> None:
    with path.open("ab") as file:
        file.truncate(1 << 40)  # a hole: no block of it is on the disk


def spoiled_bytes(content: bytes, random: np.random.Generator) -> Spoiled:
    """Any file."""
    yield "empty", _put(b"")
    yield "first half", _put(content[: len(content) // 2])
    yield "last byte missing", _put(content[:-1])
    yield "zeros", _put(bytes(len(content)))
    yield "noise", _put(random.bytes(len(content)))
    yield "a pickle", _put(pickle.dumps(_Runs()))
    yield "as UTF-16", _put(content.decode("latin-1").encode("utf-16"))
    yield "twice", _put(content * 2)
    yield "a pipe", _pipe
    yield "a folder", _folder
    yield "without end", _endless
    yield "2^40 bytes", _huge
    for _ in range(8):
        place, bit = int(random.integers(len(content))), int(random.integers(8))
        flipped = bytearray(content)
        flipped[place] ^= 1 << bit
        yield f"bit {bit} of byte {place}", _put(bytes(flipped))


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from _places(child, (*path, key))


_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 50_000_000, 2**31, 2**63, 10**400, -(10**30), 0.5, 1e308, float("nan"), float("inf")),
    *("", "../../escaped", "x" * 100_000, "\ud800", "0", [], [[]], {}, {"": 0}, [0] * 1000),
)


def spoiled_values(content: Any, random: np.random.Generator, count: int) -> Iterator[tuple[str, Any]]:
    """JSON with one value changed, a key taken away or added, at random places, as many of each depth."""
    by_depth: dict[int, list[tuple[Any, ...]]] = {}
    for path in _places(content):
        by_depth.setdefault(len(path), []).append(path)
    for number in range(count):
        paths = by_depth[sorted(by_depth)[number % len(by_depth)]]
        path = paths[int(random.integers(len(paths)))]
        changed = copy.deepcopy(content)
        if not path:
            yield "the whole", _VALUES[number % len(_VALUES)]
            continue
        owner = changed
        for key in path[:-1]:
            owner = owner[key]
        place = ".".join(map(str, path))
        match number % 5:
            case 0:
                del owner[path[-1]]
                yield f"without {place}", changed
            case 1 if isinstance(owner, dict):
                owner["surprise"] = 1
                yield f"a key beside {place}", changed
            case 2 if isinstance(owner[path[-1]], int | float) and not isinstance(owner[path[-1]], bool):
                factor = (0, -1, 2, 10, 1000)[int(random.integers(5))]
                owner[path[-1]] *= factor
                yield f"{place} times {factor}", changed
            case _:
                owner[path[-1]] = value = _VALUES[int(random.integers(len(_VALUES)))]
                yield f"{place} = {str(value)[:20]}", changed


def spoiled_json(content: bytes, random: np.random.Generator, count: int = 40) -> Spoiled:
    """JSON: bytes, values, and what only text can say."""
    yield from spoiled_bytes(content, random)
    yield "100,000 deep", _put(b"[" * 100_000)
    yield "100,000 deep, closed", _put(b'{"a":' * 100_000 + b"0" + b"}" * 100_000)
    text = content.decode()
    brace = text.index("{") + 1
    first = text[brace:].split(":", 1)[0].strip()
    yield "a key twice", _put((text[:brace] + f"{first}: 0, " + text[brace:]).encode())
    yield "1e999", _put((text[:brace] + '"a": 1e999, ' + text[brace:]).encode())
    yield "5,000 digits", _put((text[:brace] + '"a": ' + "9" * 5000 + ", " + text[brace:]).encode())
    for what, changed in spoiled_values(json.loads(content), random, count):
        yield what, _put(json.dumps(changed).encode())


def spoiled_lines(content: bytes, random: np.random.Generator, count: int = 40) -> Spoiled:
    """JSON lines: bytes, and values of one line."""
    yield from spoiled_bytes(content, random)
    lines = content.splitlines()
    for number in range(count):
        place = number % len(lines)
        for what, changed in spoiled_values(json.loads(lines[place]), random, 1 + number % 4):
            line = json.dumps(changed).encode()
            yield f"line {place + 1}, {what}", _put(b"\n".join([*lines[:place], line, *lines[place + 1 :]]) + b"\n")
            break


def spoiled_gzip(content: bytes, random: np.random.Generator) -> Spoiled:
    """Gzipped JSON: packed bytes, unpacked ones, and a bomb."""
    yield from spoiled_bytes(content, random)
    yield "a bomb", _put(gzip.compress(b" " * (1 << 30), 9))
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder, "unpacked")
        for what, spoil in spoiled_json(gzip.decompress(content), random):
            scratch.write_bytes(b"")
            with contextlib.suppress(ValueError):
                spoil(scratch)
            if scratch.is_file() and scratch.stat().st_size < 1 << 30:
                yield f"unpacked: {what}", _put(gzip.compress(scratch.read_bytes(), 1))
            shutil.rmtree(folder)
            Path(folder).mkdir()


def spoiled_yaml(content: bytes, random: np.random.Generator) -> Spoiled:
    """YAML of a configuration."""
    import yaml

    yield from spoiled_bytes(content, random)
    yield "deep", _put(b"[" * 20_000)
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
    yield "2^40 references", _put(bomb.encode())
    for text in ("!!python/object/apply:os.system [touch executed]", "a: ${oc.env:HOME}", "a: ${a}", "a: 1\na: 2"):
        yield text, _put(text.encode())
    for what, changed in spoiled_values(yaml.safe_load(content), random, 30):
        with contextlib.suppress(yaml.YAMLError, UnicodeEncodeError):
            yield what, _put(yaml.safe_dump(changed).encode())


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, allow_pickle=True)
    return file.getvalue()


def spoiled_arrays(content: bytes, random: np.random.Generator) -> Spoiled:
    """Arrays of ``numpy.savez``: bytes, and entries of the archive."""
    yield from spoiled_bytes(content, random)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}

    def packed(changed: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> Callable[[Path], None]:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", how) as archive:
            for name, entry in changed.items():
                archive.writestr(name, entry)
        return _put(file.getvalue())

    yield "compressed", packed(members, zipfile.ZIP_DEFLATED)
    yield "a bomb", packed({**members, "bomb.npy": bytes(1 << 28)}, zipfile.ZIP_DEFLATED)
    yield "a name outside", packed({**members, "../escaped.npy": b""})
    for name in list(members)[:: max(len(members) // 8, 1)]:
        array = np.lib.format.read_array(io.BytesIO(members[name]))
        yield f"without {name}", packed({other: entry for other, entry in members.items() if other != name})
        yield f"{name} as objects", packed({**members, name: _npy(np.array([_Runs()], dtype=object))})
        yield f"{name} as text", packed({**members, name: _npy(np.array(["x"]))})
        yield f"{name} as float64", packed({**members, name: _npy(array.astype(np.float64))})
        yield f"{name} flat", packed({**members, name: _npy(np.concatenate([array.reshape(-1)] * 2))})
        header = members[name].replace(str(array.shape).encode(), b"(99999999999999,)", 1)
        yield f"{name} claims 10^14", packed({**members, name: header})
        high = np.iinfo(array.dtype).max if array.dtype.kind in "iu" else np.inf
        if array.dtype.kind in "iuf":
            yield f"{name} at its highest", packed({**members, name: _npy(np.full_like(array, high))})
            yield f"{name} at 50 million", packed({**members, name: _npy(np.full_like(array, min(high, 5 * 10**7)))})


def spoiled_checkpoint(content: bytes, random: np.random.Generator) -> Spoiled:
    """What ``torch.save`` wrote."""
    import torch

    yield from spoiled_bytes(content, random)
    good = torch.load(io.BytesIO(content), weights_only=True)

    def saved(value: Any) -> Callable[[Path], None]:
        file = io.BytesIO()
        torch.save(value, file)
        return _put(file.getvalue())

    yield "an object", saved(_Runs())
    yield "objects among tensors", saved({**good, "more": _Runs()})
    for value in (None, 1, "text", [1], torch.zeros(2), {1: torch.zeros(2)}, {}):
        yield f"holds {str(value)[:20]}", saved(value)
    for name in list(good)[:6]:
        for value in (None, 1, "text", [], torch.zeros(0), torch.zeros(3).to_sparse()):
            yield f"{name} = {str(value)[:20]}", saved({**good, name: value})


def spoiled_picture(content: bytes, random: np.random.Generator) -> Spoiled:
    """A PNG."""
    from PIL import Image

    yield from spoiled_bytes(content, random)
    file = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(file, "png")
    yield "30,000 x 30,000", _put(file.getvalue())
    text = io.BytesIO()
    Image.new("L", (4, 4)).save(text, "gif")
    yield "a GIF by that name", _put(text.getvalue())


def spoiled_database(content: bytes, random: np.random.Generator) -> Spoiled:
    """An SQLite file: bytes, pages, and rows."""
    yield from spoiled_bytes(content, random)
    pages = range(0, len(content), 4096)
    for start in [int(page) for page in random.choice(list(pages), min(len(pages), 12), replace=False)]:
        yield f"page {start // 4096} of noise", _put(content[:start] + random.bytes(4096) + content[start + 4096 :])
        yield f"page {start // 4096} of zeros", _put(content[:start] + bytes(4096) + content[start + 4096 :])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "copy.db")
        path.write_bytes(content)
        with contextlib.closing(sqlite3.connect(path)) as connection:
            tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            filled = [t for t in tables if connection.execute(f'SELECT count(*) FROM "{t}"').fetchone()[0]]
            columns = {t: [row[1] for row in connection.execute(f'PRAGMA table_info("{t}")')] for t in filled}
    for table in tables:
        yield f"without table {table}", _sql(f'DROP TABLE "{table}"')
    for table in filled:
        for column in columns[table]:
            for value in ("NULL", "'no JSON'", "'{\"a\": NaN}'", "-1", "1e999"):
                yield f"{table}.{column} = {value}", _sql(f'UPDATE OR IGNORE "{table}" SET "{column}" = {value}')


def _sql(statement: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with contextlib.closing(sqlite3.connect(path)) as connection, contextlib.suppress(sqlite3.DatabaseError):
            connection.execute("PRAGMA foreign_keys = OFF")
            connection.execute(statement)
            connection.commit()

    return change


# --- formats ------------------------------------------------------------------------------------------------------


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


def _reseal(folder: Path) -> None:
    """New digests, as whoever changes a file on purpose would write them."""
    from lightning_baqe.deploy.storage import GRAPH, MANIFEST, TENSORS, _file_digest, sealed

    manifest = json.loads((folder / MANIFEST).read_text())
    files = {name: _file_digest(folder / name) for name in (GRAPH, TENSORS) if (folder / name).is_file()}
    small = {name: digest for name, digest in files.items() if (folder / name).stat().st_size < 1 << 30}
    replace_file(folder / MANIFEST, json.dumps(sealed({**manifest, "files": manifest["files"] | small})).encode())


def _read_graph(folder: Path) -> None:
    """Load, interpret; what was let in is compiled, too, and both must agree."""
    import torch

    from lightning_baqe.deploy.artifact import Artifact

    graph = Artifact.load_graph(folder)
    x = torch.randn(2, *graph.input_shape, generator=torch.Generator().manual_seed(0))
    wanted = graph.run(x)
    with _may_compile():
        rebuilt = Artifact.load(folder, rebuild=True)
        given = rebuilt.run(x)
    if not torch.allclose(given, wanted, rtol=1e-3, atol=1e-3, equal_nan=True):
        raise _Differs(f"{(given - wanted).abs().max()}")


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
    "manifest, sealed again": Format("manifest.json", _write_artifact, _read_artifact, spoiled_json, _reseal),
    "integer graph": Format("graph.json", _write_artifact, _read_graph, spoiled_json, _reseal),
    "tensors": Format("tensors.npz", _write_artifact, _read_graph, spoiled_arrays, _reseal),
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
    "picture": Format("picture.png", _write_picture, _read_picture, spoiled_picture),
    "rows": Format("rows.jsonl", _write_rows, _read_rows, spoiled_lines),
}


# --- one format, in a process of its own --------------------------------------------------------------------------


class _Differs(Exception):
    """Interpreted and compiled results are not the same."""


class _Executed(BaseException):
    """The file made something run; no `except` of the reader's may hide it."""


class _Hang(BaseException):
    """Time is up; likewise."""


_watched: list[Path] = []  # the folder that may be written, while a file is read
_STARTS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pickle.find_class", "exec")


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watched:
        return
    if event in _STARTS[:-1]:
        _watched.clear()
        raise _Executed(f"{event} {arguments[:2]}")
    if event == "open" and isinstance(arguments[0], str) and isinstance(arguments[2], int):
        writes = arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        inside = Path(arguments[0]).absolute().is_relative_to(_watched[0]) or arguments[0].startswith(
            ("/dev/", "/proc/")
        )
        if writes and not inside:
            _watched.clear()
            raise _Executed(f"wrote {arguments[0]}")


@contextlib.contextmanager
def _may_compile() -> Iterator[None]:
    """Compilers are started and write where they like."""
    folders = list(_watched)
    _watched.clear()
    try:
        yield
    finally:
        _watched.extend(folders)


def _alarm(number: int, frame: object) -> None:
    raise _Hang


def outcome_of(form: Format, folder: Path) -> tuple[str, str]:
    """One of :data:`OUTCOMES`, and what was said."""
    signal.signal(signal.SIGALRM, _alarm)
    signal.alarm(LIMIT_S)
    _watched[:] = [folder]
    try:
        form.read(folder)
    except BaqeError as error:
        return "refused", str(error)
    except _Differs as error:
        return "differs", str(error)
    except _Executed as error:
        return "executed", str(error)
    except (_Hang, MemoryError) as error:
        return "hang", type(error).__name__
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {error}"
    else:
        return "read", ""
    finally:
        signal.alarm(0)
        _watched.clear()


def run_format(name: str, first: int, most: int | None, seed: int) -> None:
    """Print a row for each spoiled file from the ``first`` on; ends with the process if a file kills it."""
    warnings.simplefilter("ignore")
    sys.dont_write_bytecode = True  # what imports write is not the file's doing
    form = FORMATS[name]
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        good = Path(scratch, "good")
        good.mkdir()
        form.write(good)
        kept = sorted(path.name for path in Path(scratch).iterdir())
        form.read(Path(shutil.copytree(good, Path(scratch, "once"))))  # what is imported then may start what it likes
        shutil.rmtree(Path(scratch, "once"))
        sys.addaudithook(_audit)
        undamaged = outcome_of(form, Path(shutil.copytree(good, Path(scratch, "first"))))
        if undamaged != ("read", ""):
            raise RuntimeError(f"{name}: an undamaged file is not read: {undamaged}")
        shutil.rmtree(Path(scratch, "first"))
        resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + LIMIT_BYTES,) * 2)
        ways = list(form.spoil((good / form.file).read_bytes(), np.random.default_rng(seed)))
        chosen = range(len(ways)) if most is None else np.linspace(0, len(ways) - 1, min(most, len(ways)), dtype=int)
        for number in (int(n) for n in chosen if n >= first):
            what, spoil = ways[number]
            print(f"{_RESULT}{json.dumps([number, what, 'signal', ''])}", flush=True)  # until it is known better
            folder = Path(shutil.copytree(good, Path(scratch, "spoiled")))
            spoil(folder / form.file)
            form.repair(folder)
            found, said = outcome_of(form, folder)
            shutil.rmtree(folder)
            if sorted(path.name for path in Path(scratch).iterdir()) != kept:
                found, said = "executed", "there is a file that was not there"
            print(f"{_RESULT}{json.dumps([number, what, found, said[:400]])}", flush=True)


def _data_bytes() -> int:
    """Of private memory that this process has."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    return int(line.split()[1]) * 1024


def rows_of(name: str, most: int | None, seed: int) -> list[tuple[str, str, str]]:
    """``(what was done, outcome, what was said)`` of all spoiled files of a format."""
    rows: dict[int, tuple[str, str, str]] = {}
    while True:
        first = max(rows, default=-1) + 1
        code = f"import lightning_baqe.benchmarks.malformed as m; m.run_format({name!r}, {first}, {most}, {seed})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        for line in done.stdout.splitlines():
            if line.startswith(_RESULT):
                number, *row = json.loads(line.removeprefix(_RESULT))
                rows[number] = tuple(row)
        if done.returncode == 0:
            return list(rows.values())
        if max(rows, default=-1) < first:
            raise RuntimeError(f"{name}: {done.stderr[-2000:]}")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status: 1 unless all outcomes are right."""
    parser = parser_of(__doc__)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--most", type=int, help="spoiled files of each format, spread over all; default: all")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    console = console_of(160)
    console.print(device_info()["cpu"])
    cells, wrong = [], 0
    for name in options.formats:
        rows = rows_of(name, options.most, options.seed)
        counts = Counter(outcome for _, outcome, _ in rows)
        cells.append([name, len(rows), *(counts[outcome] or "" for outcome in OUTCOMES)])
        for what, outcome, said in rows:
            if outcome not in RIGHT:
                wrong += 1
                console.print(f"{name}: {what}: {outcome}: {said}", markup=False)
        console.print(f"{name}: {len(rows)} files, {sum(counts[outcome] for outcome in RIGHT)} right")
    total = sum(int(row[1]) for row in cells)
    console.print(table_of(f"{total} spoiled files", ("format", "files", *OUTCOMES), ("format",), cells))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
