"""Kernels' kept object files: linked again to the same artifact, made anew when damaged, one for each target."""

from __future__ import annotations

import dataclasses
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_graphs import Maker, images

from lightning_baqe.deploy.artifact import Artifact
from lightning_baqe.deploy.calls import Plan
from lightning_baqe.deploy.compiler import compile_plan
from lightning_baqe.deploy.objects import KernelObjects, link
from lightning_baqe.deploy.plan import make_plan
from lightning_baqe.hardware.options import BuildOptions
from lightning_baqe.hardware.target import get_target
from lightning_baqe.integer.graph import IntegerGraph
from lightning_baqe.kernels.sample import sample_kernel
from lightning_baqe.measurement.device import Kernel
from lightning_baqe.measurement.local import Local
from lightning_baqe.resources import shortage
from lightning_baqe.tuning.bench import compile_kernel, save_arguments


@pytest.fixture(scope="module")
def graph() -> IntegerGraph:
    """Two convolutions whose results are concatenated: some calls write into a buffer that others began."""
    maker = Maker(16, 12)
    first = maker.conv(out=32, padding=1)
    maker.conv(maker.concat(first, maker.conv(first, out=32, kernel=1)), out=16)
    return maker.graph()


@pytest.fixture(scope="module")
def made(graph: IntegerGraph, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The objects of its kernels: copy them before you change them."""
    objects = KernelObjects(tmp_path_factory.mktemp("made"))
    build(graph, objects)
    return objects.folder


@pytest.fixture
def kept(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "kept")


def plan_of(graph: IntegerGraph, target: str = "native") -> Plan:
    return make_plan(graph, BuildOptions(get_target(target)))


def build(graph: IntegerGraph, objects: KernelObjects) -> Artifact:
    plan = plan_of(graph)
    return Artifact(graph, plan, compile_plan(plan, graph.input_shape, objects))


def test_the_second_build_compiles_nothing_and_is_the_same(graph: IntegerGraph, tmp_path: Path) -> None:
    x = images(graph, 3)
    cold, warm = KernelObjects(tmp_path), KernelObjects(tmp_path)
    first, second = build(graph, cold), build(graph, warm)
    kernels = {call.key for call in first.plan.calls}
    assert (cold.compiled, warm.compiled) == (len(kernels), 0)
    assert len(list(tmp_path.iterdir())) == len(kernels)
    assert torch.equal(first.run(x), graph.run(x))
    assert torch.equal(second.run(x), graph.run(x))
    every = first.run_all(x)
    assert all(torch.equal(value, every[name]) for name, value in second.run_all(x).items())
    kept = Artifact.load(second.save(tmp_path.parent / "artifact"))
    for path in tmp_path.iterdir():
        path.unlink()
    assert torch.equal(kept.run(x), graph.run(x))  # an artifact needs no object once it is linked


@pytest.mark.parametrize("damage", [lambda content: content[:1000], lambda content: b"", lambda content: content[::-1]])
def test_a_damaged_object_is_made_again(graph: IntegerGraph, kept: Path, damage: Callable[[bytes], bytes]) -> None:
    victim = min(kept.iterdir())
    content = victim.read_bytes()
    victim.write_bytes(damage(content))
    again = KernelObjects(kept)
    artifact = build(graph, again)
    assert again.compiled == 1
    assert victim.read_bytes() == content
    assert torch.equal(artifact.run(images(graph)), graph.run(images(graph)))


def test_each_target_has_its_objects(graph: IntegerGraph, kept: Path) -> None:
    """Also targets that differ by nothing but LLVM's name of the CPU."""
    # Another CPU with all instructions that the kernels are written in: LLVM ends the process where one is missing.
    other = {"vnni512": "icelake-server", "avxvnni": "meteorlake"}.get(get_target().path, "haswell")
    options = BuildOptions(dataclasses.replace(get_target(), mcpu=other))
    plan = dataclasses.replace(plan_of(graph), options=options)
    objects = KernelObjects(kept)
    compile_plan(plan, graph.input_shape, objects)
    assert objects.compiled == len(list(kept.iterdir())) / 2 == len({call.key for call in plan.calls})


def test_what_the_tuner_compiled_is_linked_to_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_BAQE_CACHE", str(tmp_path))
    maker = Maker(16, 6)
    maker.conv(out=16)
    graph = maker.graph()
    (call,) = (call for call in plan_of(graph).calls if call.layer is not None)
    (spec,), knobs = plan_of(graph).tunable().values(), dict(call.knobs)
    library, arguments = tmp_path / "kernel.so", tmp_path / "kernel.npz"
    compile_kernel(spec, get_target(), knobs, library)
    sample = sample_kernel(spec)
    save_arguments(arguments, sample.arguments(knobs), sample.result)
    assert Local().measure_kernel(Kernel(lambda: (library, arguments))).exact
    objects = KernelObjects()
    (tuned,) = objects.folder.iterdir()
    before = tuned.read_bytes()
    assert torch.equal(build(graph, objects).run(images(graph)), graph.run(images(graph)))
    assert objects.compiled == len(plan_of(graph).calls) - 1
    assert tuned.read_bytes() == before


def test_the_least_recently_used_objects_are_dropped(kept: Path) -> None:
    files = sorted(kept.iterdir())
    for age, path in enumerate(files):
        os.utime(path, (1e9 - age, 1e9 - age))
    KernelObjects(kept, limit_bytes=files[0].stat().st_size + files[1].stat().st_size).prune()
    assert sorted(kept.iterdir()) == files[:2]


def test_a_folder_that_others_can_write_to_is_not_used(graph: IntegerGraph, kept: Path, tmp_path: Path) -> None:
    assert stat.S_IMODE(KernelObjects(tmp_path / "new").folder.stat().st_mode) == 0o700
    kept.chmod(0o777)
    with pytest.warns(UserWarning, match="chmod 700"):
        objects = KernelObjects(kept)
    build(graph, objects)
    assert objects.compiled == len(list(kept.iterdir()))


def test_without_a_folder_kernels_are_compiled_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    maker = Maker(4, 4)
    maker.clip("x", (0, 200))
    graph = maker.graph()
    objects = KernelObjects(tmp_path / "file" / "objects")
    assert torch.equal(build(graph, objects).run(images(graph)), graph.run(images(graph)))
    assert objects.compiled


@pytest.mark.parametrize(
    ("said", "wanted"), [("ld: No space left on device", "is full"), ("Too many open files", "ulimit")]
)
def test_a_linker_without_room_says_nothing_of_the_code(said: str, wanted: str, tmp_path: Path) -> None:
    class Module:
        def export_library(self, path: str, workspace_dir: str) -> None:
            raise RuntimeError(said)

    with pytest.raises(OSError, match=said) as caught:
        link(Module(), tmp_path / "module.so")
    assert wanted in str(shortage(caught.value))


def test_other_faults_of_a_linker_pass(tmp_path: Path) -> None:
    class Module:
        def export_library(self, path: str, workspace_dir: str) -> None:
            raise RuntimeError("undefined symbol")

    with pytest.raises(RuntimeError, match="undefined symbol"):
        link(Module(), tmp_path / "module.so")
