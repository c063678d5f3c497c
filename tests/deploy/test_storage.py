"""Folders of artifacts: damage is found, signatures hold, graphs can be compiled again from them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from quantization.small_networks import images, settled

import lightning_baqe as baqe
from lightning_baqe.deploy.artifact import Artifact
from lightning_baqe.deploy.storage import BITS, GRAPH, MANIFEST, MODULE, SIGNATURE, TENSORS, sealed
from lightning_baqe.errors import BuildError
from lightning_baqe.files import replace_file

KEY = bytes(range(32))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = settled("residual")
    quantized = baqe.calibrate(baqe.quantize(network, baqe.BitConfig.uniform(network, 4, 4), images()), [images()])
    return baqe.build(baqe.lower(quantized), schedules="default").save(tmp_path_factory.mktemp("saved") / "artifact")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "artifact"))


def flips_of(folder: Path, count: int, seed: int) -> list[tuple[str, int, int]]:
    """Which bit of which byte of which file; every file has its share."""
    random = np.random.default_rng(seed)
    names = sorted(path.name for path in folder.iterdir())
    found = []
    for number in range(count):
        name = names[number % len(names)]
        found.append((name, int(random.integers((folder / name).stat().st_size)), int(random.integers(8))))
    return found


def check_flips(folder: Path, count: int, seed: int) -> dict[str, int]:
    """Flip bits one by one: each is refused, or the artifact computes what it did. How many of each."""
    x = images()
    whole = Artifact.load(folder)
    wanted, outcomes = whole.run(x), {"refused": 0, "harmless": 0}
    whole.close()
    for name, place, bit in flips_of(folder, count, seed):
        content = bytearray((folder / name).read_bytes())
        content[place] ^= 1 << bit
        intact = (folder / name).read_bytes()
        replace_file(folder / name, bytes(content))  # in a new file: a module may still be in memory
        try:
            loaded = Artifact.load(folder)
        except BuildError:
            outcomes["refused"] += 1
        else:
            assert torch.equal(loaded.run(x), wanted), (name, place, bit)
            loaded.close()
            outcomes["harmless"] += 1
        replace_file(folder / name, intact)
    return outcomes


def test_flipped_bits_are_refused_or_harmless(folder: Path) -> None:
    outcomes = check_flips(folder, 60, seed=0)
    assert outcomes["refused"] > 50


@pytest.mark.slow
def test_a_thousand_flipped_bits(folder: Path) -> None:
    outcomes = check_flips(folder, 1000, seed=1)
    print(outcomes)
    assert outcomes["refused"] > 900


@pytest.mark.parametrize("name", [MANIFEST, MODULE, GRAPH, TENSORS, BITS])
def test_a_file_that_ends_early(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(BuildError, match=name):
        Artifact.load(folder)


def test_files_of_another_artifact(folder: Path, tmp_path: Path) -> None:
    network = settled("residual")
    quantized = baqe.calibrate(baqe.quantize(network, baqe.BitConfig.uniform(network), images()), [images()])
    other = baqe.build(baqe.lower(quantized), schedules="default").save(tmp_path / "other")
    for name in (MODULE, GRAPH, TENSORS):
        intact = (folder / name).read_bytes()
        replace_file(folder / name, (other / name).read_bytes())
        with pytest.raises(BuildError, match=rf"{name} is not the file that was written"):
            Artifact.load(folder)
        replace_file(folder / name, intact)


def test_signatures(folder: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(KEY)
    with pytest.raises(BuildError, match="is not signed"):
        Artifact.load(folder, key=key)
    Artifact.load(folder).sign(key)
    x = images()
    assert torch.equal(Artifact.load(folder, key=KEY).run(x), Artifact.load(folder).run(x))
    with pytest.raises(BuildError, match="not made with this key"):
        Artifact.load(folder, key=KEY[::-1])
    with pytest.raises(BuildError, match="16 to 4096 are wanted"):
        Artifact.load(folder, key=b"short")
    # What somebody changes and seals again is found by the signature alone.
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(sealed({**manifest, "versions": {}})))
    Artifact.load(folder)
    with pytest.raises(BuildError, match=SIGNATURE):
        Artifact.load(folder, key=key)


def test_only_saved_artifacts_are_signed(folder: Path) -> None:
    artifact = Artifact.load(folder, rebuild=True)
    with pytest.raises(BuildError, match="save it"):
        artifact.sign(KEY)
    artifact.save(folder)
    artifact.sign(KEY)
    Artifact.load(folder, key=KEY)
    (folder / BITS).write_text("{}")
    with pytest.raises(BuildError, match=BITS):
        artifact.sign(KEY)


def test_a_rebuilt_artifact_runs_no_code_of_the_folder(folder: Path) -> None:
    wanted = Artifact.load(folder).run(images())
    replace_file(folder / MODULE, b"no module at all")
    with pytest.raises(BuildError, match=MODULE):
        Artifact.load(folder)
    rebuilt = Artifact.load(folder, rebuild=True)
    assert torch.equal(rebuilt.run(images()), wanted)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"threads": 0}, "threads: Input should be greater"),
        ({"threads": True}, "threads: Input should be a valid integer"),
        (
            {"target": {"name": "x", "path": "gpu", "mcpu": "x", "lanes": 8, "registers": 16, "vbmi": False}},
            "target.path",
        ),
        ({"schedules": {"conv1": {"tile": [1]}}}, "schedules.conv1.tile"),
        ({"schedules": {"conv1": {"no_such_knob": 1}}}, "its schedules are not of its graph"),
        ({"surprise": 1}, "surprise: Extra inputs"),
        ({"files": {}}, "names the files"),
    ],
)
def test_manifests_that_say_something_else(folder: Path, change: dict[str, object], said: str) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(sealed({**manifest, **change})))
    with pytest.raises(BuildError, match=said):
        Artifact.load(folder)


def test_a_manifest_is_not_changed_by_hand(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "size_bytes": 1}))
    with pytest.raises(BuildError, match="was changed after it was written"):
        Artifact.load(folder)


def test_a_key_that_is_no_file(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="cannot be read"):
        Artifact.load(folder).sign(tmp_path / "nowhere")
