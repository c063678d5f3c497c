"""An artifact: a folder with the compiled module, the integer graph with packed weights, and a manifest."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
import weakref
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tvm
import tvm_ffi
from tvm import relax

from lightning_baqe.deploy.calls import Plan
from lightning_baqe.deploy.compiler import ALL, MAIN, constants
from lightning_baqe.deploy.plan import make_plan
from lightning_baqe.errors import BuildError, ConfigError
from lightning_baqe.hardware.identity import device_info, versions
from lightning_baqe.hardware.options import BuildOptions
from lightning_baqe.hardware.target import CpuTarget, can_run
from lightning_baqe.integer.graph import IntegerGraph, as_images
from lightning_baqe.integer.serialize import graph_from_parts, graph_to_parts
from lightning_baqe.kernels.x86.layout import as_image

FORMAT = 1
MANIFEST, MODULE, GRAPH, TENSORS, BITS = "manifest.json", "module.so", "graph.json", "tensors.npz", "bits.json"


def load_library(path: Path | str) -> Any:
    """A compiled module, unloaded with the last reference to it; TVM's default keeps it until the process ends."""
    return tvm_ffi.load_module(str(path), keep_module_alive=False)


class Artifact:
    """A compiled network for batch 1.

    Made by :func:`lightning_baqe.build` or :meth:`load`.

    Args:
        graph: the integer graph that it computes.
        plan: its kernels.
        executable: the Relax VM module, compiled but not yet linked; None with a library.
        library: the linked module.
    """

    def __init__(self, graph: IntegerGraph, plan: Plan, executable: Any, library: Path | None = None) -> None:
        self.graph, self.plan, self._executable = graph, plan, executable
        self._library = library
        self._module: Any = None  # loaded by whoever runs it: the library may be another machine's
        self._vm: Any = None
        self._image: Any = None
        self._lock = threading.Lock()
        self._constants: list[Any] = []

    @property
    def target(self) -> CpuTarget:
        return self.plan.options.target

    @property
    def threads(self) -> int:
        return self.plan.options.threads

    @property
    def schedules(self) -> dict[str, dict[str, Any]]:
        """The knobs of every tunable layer."""
        return self.plan.schedules

    @property
    def bits(self) -> Mapping[str, tuple[int, int]]:
        """``{layer: (weight bits, activation bits)}``."""
        return self.graph.bits

    @property
    def size_bytes(self) -> int:
        """Of the graph: packed weights, biases, requantization numbers."""
        return self.graph.size_bytes

    @property
    def vm(self) -> Any:
        """The virtual machine, its constants already set."""
        if self._vm is None:
            if not can_run(self.target.path, self.target.vbmi):
                raise BuildError(
                    f"this artifact uses {self.target.path} instructions ({self.target.mcpu}), which this CPU does not "
                    "have; build its graph again here: baqe.build(artifact.graph)"
                )
            library = self._linked()
            if self._module is None:
                self._module = load_library(library)
            self._vm = relax.VirtualMachine(self._module, tvm.cpu())
            self._constants = [tvm.runtime.tensor(array) for array in constants(self.plan)]
            self._image = tvm.runtime.empty((1, *as_image(self.graph.input_shape)), "float32")
            self._vm.set_input(MAIN, self._image, *self._constants)
        return self._vm

    def close(self) -> None:
        """Let go of the machine, its constants and the module; whatever needs them next loads them again.

        The next garbage collection unloads the module, unless somebody else holds ``vm`` or one of its functions.
        """
        with self._lock:
            self._vm = self._module = self._image = None
            self._constants = []

    def _linked(self) -> Path:
        """The linked module. Machine code is made once, here: running, saving and measuring all use this file."""
        if self._library is None:
            folder = tempfile.mkdtemp(prefix="lightning_baqe-")
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            library = Path(folder) / MODULE
            try:
                self._executable.export_library(str(library))
            except RuntimeError as error:
                raise BuildError(
                    f"the module cannot be linked; is a C++ compiler (g++ or clang) installed? {error}"
                ) from error
            self._library = library
        return self._library

    def run(self, x: torch.Tensor | Sequence[torch.Tensor], check: bool = False) -> torch.Tensor:
        """Logits of a batch, one image after the other.

        Args:
            x: float, shape ``(n, *graph.input_shape)``, on any device; computed on the CPU. A tuple for several inputs.
            check: refuse values that are not finite, which integers cannot stand for.

        Returns:
            float32, shape ``(n, *graph.output_shape)``; equal to ``graph.run(x)`` on every element for networks
            without float layers and without functions like exp of the input before it is quantized.

        Raises:
            ConfigError: no tensor, or its shape or type does not fit; with ``check``, values that are not finite.
            BuildError: this CPU lacks the artifact's instructions.
        """
        images = self._images(x)
        if check:
            _check_finite(images)
        logits = np.array([self.run_array(image[None])[0] for image in images], np.float32)
        return torch.from_numpy(logits).reshape(len(images), *self.graph.output_shape)

    def run_array(self, image: np.ndarray) -> np.ndarray:
        """One image without torch: contiguous float32 ``(1, *input_shape)`` to float32 ``(1, outputs)``."""
        with self._lock:  # the machine holds one image and one result
            vm = self.vm
            self._image.copyfrom(image.reshape(self._image.shape))
            vm.invoke_stateful(MAIN)
            return np.asarray(vm.get_outputs(MAIN).numpy())

    def run_all(self, x: torch.Tensor | Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Every value that the compiled module holds, by node: integers as int64, floats as float32, ``(n, *shape)``.

        A residual sum that is computed inside a convolution's kernel stands for both, and of the operators of an island
        only those have a value that others read.
        """
        images = self._images(x)
        vm = self.vm
        found: dict[str, list[np.ndarray]] = {}
        for image in images:
            results = vm[ALL](tvm.runtime.tensor(image.reshape(self._image.shape)), *self._constants)
            buffers = {name: self.plan.constants[name] for name in self.plan.layouts if name in self.plan.constants}
            names = [name for call in self.plan.calls for name in call.results]
            for name, value in zip(names, results, strict=True):
                buffers[self.plan.buffer(name)] = value.numpy()
                if name in self.plan.plain:
                    found.setdefault(name, []).append(value.numpy()[0])
            for name, layout in self.plan.layouts.items():
                found.setdefault(name, []).append(layout.unpack(buffers[self.plan.buffer(name)]))
        values: dict[str, torch.Tensor] = {}
        shapes = {node.name: node.type.shape for node in self.graph}
        for name, arrays in found.items():
            stacked = torch.from_numpy(np.stack(arrays))
            stacked = stacked if stacked.dtype == torch.float32 else stacked.to(torch.int64)
            values[name] = stacked.reshape(len(images), *shapes[name]) if name in shapes else stacked
        return values

    def _images(self, x: torch.Tensor | Sequence[torch.Tensor]) -> np.ndarray:
        return np.ascontiguousarray(as_images(x, self.graph, "artifact").numpy())

    def save(self, folder: Path | str) -> Path:
        """Write the artifact's folder, in one move: an interrupted save leaves nothing half-written.

        Raises:
            BuildError: no C++ compiler links the module.
        """
        folder = Path(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            shutil.copyfile(self._linked(), staging / MODULE)
            description, tensors = graph_to_parts(self.graph)
            (staging / GRAPH).write_text(json.dumps(description))
            np.savez(staging / TENSORS, **tensors)  # type: ignore[arg-type]
            (staging / BITS).write_text(json.dumps({k: list(v) for k, v in self.bits.items()}, indent=1))
            manifest = {
                "format": FORMAT,
                "target": vars(self.target),
                "threads": self.threads,
                "schedules": self.schedules,
                "fuse_residual": self.plan.options.fuse_residual,
                "plan": self.plan.digest,
                "device": device_info(self.threads),
                "versions": versions(),
                "size_bytes": self.size_bytes,
            }
            (staging / MANIFEST).write_text(json.dumps(manifest, indent=1))
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(staging, folder)
            folder.chmod(0o755)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return folder

    @classmethod
    def load(cls, folder: Path | str) -> Artifact:
        """Read an artifact's folder. Nothing in it is unpickled, but its module is native code: load what you trust.

        Raises:
            BuildError: a file is missing, or another version wrote it.
        """
        folder = Path(folder)
        missing = [name for name in (MANIFEST, MODULE, GRAPH, TENSORS) if not (folder / name).exists()]
        if missing:
            raise BuildError(
                f"{folder} is no artifact: it lacks {', '.join(missing)}; give a folder that Artifact.save wrote"
            )
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest.get("format") != FORMAT:
            raise BuildError(
                f"{folder} has format {manifest.get('format')}, this version reads {FORMAT}; build it again"
            )
        graph = cls.load_graph(folder)
        fuse_residual = bool(manifest.get("fuse_residual", True))
        options = BuildOptions(CpuTarget(**manifest["target"]), manifest["threads"], fuse_residual)
        plan = make_plan(graph, options, manifest["schedules"])
        if plan.digest != manifest["plan"]:
            raise BuildError(
                f"{folder} was built by other templates (versions {manifest['versions']}); build its graph again: "
                f"baqe.build(baqe.Artifact.load_graph({str(folder)!r}))"
            )
        return cls(graph, plan, None, (folder / MODULE).resolve())

    @staticmethod
    def load_graph(folder: Path | str) -> IntegerGraph:
        """The integer graph of an artifact's folder, whatever version compiled it.

        Raises:
            BuildError: the files are missing or damaged.
        """
        folder = Path(folder)
        try:
            with np.load(folder / TENSORS, allow_pickle=False) as tensors:
                return graph_from_parts(json.loads((folder / GRAPH).read_text()), dict(tensors))
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise BuildError(f"the graph in {folder} cannot be read ({type(error).__name__}: {error})") from error


def _check_finite(images: np.ndarray) -> None:
    """Raise ConfigError where a pixel is not finite; says how many there are, and where the first is."""
    wrong = ~np.isfinite(images)
    if not wrong.any():
        return
    nan, first = int(np.isnan(images).sum()), tuple(int(i) for i in np.argwhere(wrong)[0])
    raise ConfigError(
        f"x holds {int(wrong.sum())} values that are not finite ({nan} nan, {int(wrong.sum()) - nan} infinite) in "
        f"{int(wrong.reshape(len(images), -1).any(1).sum())} of {len(images)} images, the first at {first}: an integer "
        "network has no such numbers; mend or leave out these images"
    )
