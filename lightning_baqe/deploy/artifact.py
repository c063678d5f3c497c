"""An artifact: a folder with the compiled module, the integer graph with packed weights, and a manifest."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tvm
import tvm_ffi
from tvm import relax

from lightning_baqe.deploy.calls import Plan
from lightning_baqe.deploy.compiler import ALL, MAIN, compile_plan, constants
from lightning_baqe.deploy.objects import link
from lightning_baqe.deploy.plan import make_plan
from lightning_baqe.deploy.storage import (
    BITS,
    MODULE,
    check_file,
    read_graph,
    read_manifest,
    write_parts,
    write_signature,
)
from lightning_baqe.errors import BuildError, ConfigError, DataError
from lightning_baqe.hardware.identity import device_info, versions
from lightning_baqe.hardware.options import BuildOptions
from lightning_baqe.hardware.target import CpuTarget, ask_for_tiles, get_target, obstacle
from lightning_baqe.integer.graph import IntegerGraph, as_images
from lightning_baqe.kernels.x86.layout import as_image
from lightning_baqe.scratch import scratch_folder, scratch_path


def load_library(path: Path | str) -> Any:
    """A compiled module, unloaded with the last reference to it; TVM's default keeps it until the process ends.

    Its code may use AMX's tiles, which this process then must have asked for.
    """
    ask_for_tiles()
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
        self._folder = None if library is None else library.parent
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
    def bits(self) -> Mapping[str, tuple[int | tuple[int, ...], int]]:
        """``{layer: (weight bits, activation bits)}``; of weights one number, or one for each output channel."""
        return self.graph.bits

    @property
    def size_bytes(self) -> int:
        """Of the graph: packed weights, biases, requantization numbers."""
        return self.graph.size_bytes

    @property
    def vm(self) -> Any:
        """The virtual machine, its constants already set."""
        if self._vm is None:
            if (why := obstacle(self.target.path, self.target.vbmi)) is not None:
                raise BuildError(
                    f"this artifact uses {self.target.path} instructions ({self.target.mcpu}), {why}; build its graph "
                    "again here: baqe.build(artifact.graph)"
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
            library = scratch_folder(self) / MODULE
            try:
                link(self._executable, library)
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
        staging = scratch_path(folder)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        try:
            shutil.copyfile(self._linked(), staging / MODULE)
            about = {
                "target": vars(self.target),
                "threads": self.threads,
                "schedules": self.schedules,
                "fuse_residual": self.plan.options.fuse_residual,
                "plan": self.plan.digest,
                "device": device_info(self.threads),
                "versions": versions(),
                "size_bytes": self.size_bytes,
            }
            write_parts(staging, self.graph, about)
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(staging, folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        self._folder = folder
        return folder

    def sign(self, key: Path | str | bytes) -> None:
        """Sign the folder in which the artifact was saved, or from which it was loaded, last.

        Args:
            key: a secret of 16 to 4096 bytes, or a file that holds it. Whoever has it can sign and check.

        Raises:
            BuildError: there is no such folder, it was changed since, or the key does not do.
        """
        if self._folder is None:
            raise BuildError("this artifact lies in no folder yet: save it, then sign it")
        try:
            write_signature(self._folder, key)
        except DataError as error:
            raise BuildError(str(error)) from error

    @classmethod
    def load(cls, folder: Path | str, *, rebuild: bool = False, key: Path | str | bytes | None = None) -> Artifact:
        """Read an artifact's folder.

        Nothing in it is unpickled, all files are checked against their digests, and the graph is proven. But its module
        is native code, which whoever made the folder chose: running it is running their program. Load what you trust,
        ask for a signature, or build the graph again.

        Args:
            folder: that :meth:`save` wrote.
            rebuild: use the graph alone and compile it here, for this machine; with the artifact's schedules if it was
                compiled for the same target, else with the templates' defaults.
            key: with which it must have been signed, see :meth:`sign`.

        Raises:
            BuildError: a file is missing, damaged or of another version, or the signature is not right.
        """
        folder = Path(folder)
        manifest = read_manifest(folder, key)
        graph = read_graph(folder, manifest)
        target, schedules = manifest.cpu_target, manifest.schedules
        if rebuild:
            here = get_target()
            options = BuildOptions(here, manifest.threads, manifest.fuse_residual)
            plan = make_plan(graph, options, schedules if target == here else None)
            return cls(graph, plan, compile_plan(plan, graph.input_shape))
        check_file(folder, MODULE, manifest)
        check_file(folder, BITS, manifest)
        try:
            plan = make_plan(graph, BuildOptions(target, manifest.threads, manifest.fuse_residual), schedules)
        except ConfigError as error:
            raise BuildError(f"{folder}: its schedules are not of its graph: {error}") from error
        if plan.digest != manifest.plan:
            raise BuildError(
                f"{folder} was built by other templates (versions {manifest.versions}); build its graph again: "
                f"baqe.Artifact.load({str(folder)!r}, rebuild=True)"
            )
        return cls(graph, plan, None, (folder / MODULE).resolve())

    @staticmethod
    def load_graph(folder: Path | str) -> IntegerGraph:
        """The integer graph of an artifact's folder, whatever version compiled it.

        Raises:
            BuildError: the files are missing or damaged, or the graph is not what it says.
        """
        return read_graph(Path(folder))


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
