"""Machine code of kernels, each compiled once and kept: builds and tuning only link what is there.

A kept object is the object file and, after it, the SHA-256 of it. Its name holds all that its code depends on: the
kernel's key, the target, and a digest of the toolchain and of the sources that generate code.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tvm
from tvm.target import Target

from lightning_baqe.deploy.digest import code_digest
from lightning_baqe.files import cache_folder, replace_file
from lightning_baqe.hardware.identity import digest, toolchain
from lightning_baqe.hardware.target import CpuTarget
from lightning_baqe.interrupts import postponed
from lightning_baqe.resources import shortage
from lightning_baqe.scratch import compiling_folder

LIMIT_BYTES = 256 * 2**20  # some ten thousand kernels
_CHECK_BYTES = hashlib.sha256().digest_size
_CODE = code_digest()  # now, while the sources are still those that were imported


class KernelObjects:
    """Compiled kernels in a folder that processes share.

    Where the folder cannot be written, or is not the user's alone, kernels are compiled and not kept.

    Args:
        folder: by default ``objects`` in :func:`~lightning_baqe.files.cache_folder`.
        limit_bytes: the least recently used objects beyond this are dropped.
        compiled: kernels that were not there and were compiled.
    """

    def __init__(self, folder: Path | None = None, limit_bytes: int = LIMIT_BYTES) -> None:
        self.folder = cache_folder() / "objects" if folder is None else folder
        self.limit_bytes = limit_bytes
        self.compiled = 0
        with contextlib.suppress(OSError):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._usable = self._is_own()

    def library(self, key: str, target: CpuTarget, function: Callable[[], Any]) -> Any:
        """A kernel's machine code as a TVM module that can be linked, with the functions ``key`` and ``main``.

        ``key`` is of :func:`~lightning_baqe.deploy.calls.kernel_key`; ``function`` makes the TIR and is called only if
        it must be compiled. RuntimeError or ValueError where TVM or LLVM refuses it.
        """
        path = self.path(key, target)
        content = self._read(path) if self._usable else None
        with postponed(), compiling_folder() as folder:
            file = Path(folder) / f"{key}.o"
            if content is None:
                module = tvm.IRModule({key: function().with_attr("global_symbol", key)})
                tvm.compile(module, target=Target(target.tvm)).mod.write_to_file(str(file))
                self.compiled += 1
                if self._usable:
                    self._keep(path, file.read_bytes())
            else:
                file.write_bytes(content)
            return tvm.runtime.load_static_library(str(file), [key])

    def path(self, key: str, target: CpuTarget) -> Path:
        """Where a kernel's object is kept."""
        return self.folder / f"{key}-{digest([target.tvm, toolchain(), _CODE])}.o"

    def prune(self) -> None:
        """Drop the least recently used objects beyond the limit."""
        with contextlib.suppress(FileNotFoundError):  # another process prunes too
            with os.scandir(self.folder) as entries:
                files = sorted(((e.stat().st_mtime_ns, e.stat().st_size, e.path) for e in entries), reverse=True)
            total = 0
            for _, size, path in files:
                total += size
                if total > self.limit_bytes:
                    os.unlink(path)

    def _is_own(self) -> bool:
        """Whether nobody else can put native code there."""
        if not self.folder.is_dir():
            return False
        info = self.folder.stat()
        if info.st_uid == os.getuid() and not info.st_mode & 0o022:
            return True
        warnings.warn(
            f"{self.folder} (owner {info.st_uid}, mode {info.st_mode & 0o777:o}) is not used: it would hold native "
            f"code, and must belong to you ({os.getuid()}) and be writable by nobody else: chmod 700, or give another "
            "folder in LIGHTNING_BAQE_CACHE",
            stacklevel=3,
        )
        return False

    def _read(self, path: Path) -> bytes | None:
        """A kept object; None if there is none, or if it is damaged."""
        try:
            content = path.read_bytes()
            os.utime(path)  # used now
        except OSError:
            return None
        code, check = content[:-_CHECK_BYTES], content[-_CHECK_BYTES:]
        return code if hashlib.sha256(code).digest() == check else None

    def _keep(self, path: Path, code: bytes) -> None:
        """Keep an object in one move; a full or read-only disk costs time only."""
        check = hashlib.sha256(code).digest()
        with contextlib.suppress(OSError):
            replace_file(path, code + check)
        if check[0] < 8:  # one object in 32 is enough to look at them all
            self.prune()


def link(module: Any, library: Path) -> None:
    """Link compiled TVM code, a module or an executable, into a shared library.

    Raises:
        RuntimeError: it cannot be linked.
        OSError: the machine ran out of room, files or memory.
    """
    with postponed(), compiling_folder() as folder:  # TVM's own folder would stay where the process is killed
        try:
            module.export_library(str(library), workspace_dir=folder)
        except RuntimeError as error:
            if shortage(error):
                raise OSError(str(error)) from error  # no word on the code: whoever catches its faults lets this pass
            raise
