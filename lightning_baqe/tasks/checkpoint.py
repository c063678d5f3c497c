"""Checkpoints as they are written, in one step; and as they are read: tensors and plain values alone, whatever the file
was made to run."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins import TorchCheckpointIO

from lightning_baqe.errors import DataError
from lightning_baqe.scratch import scratch_path

_UNREADABLE = (
    *(RuntimeError, OSError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError),
    *(AssertionError, MemoryError, pickle.UnpicklingError, zipfile.BadZipFile),
)


class CheckpointBeside(TorchCheckpointIO):
    """Checkpoints of a local folder, made beside their place and moved there.

    Lightning's own makes them in the system's temporary folder, where a killed process leaves them, and from where
    another disk is reached by a copy, which may be cut off.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Path | str, storage_options: Any = None) -> None:
        """Write what a Trainer dumps.

        Raises:
            OSError: there is no room, or no right to write.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = scratch_path(path)
        try:
            with scratch.open("wb") as file:
                torch.save(checkpoint, file)
            os.replace(scratch, path)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise


def read_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What ``torch.save`` wrote, by name.

    Raises:
        DataError: it is missing, broken, holds objects that would have to be executed, or no mapping.
    """
    try:
        if not path.is_file():
            raise OSError("it is no file")  # pipes have no end
        content = torch.load(path, map_location=device, weights_only=True)
    except _UNREADABLE as error:
        first = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise DataError(f"{path} is no checkpoint of tensors, or a damaged one ({first})") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise DataError(f"{path} holds a {type(content).__name__}, a checkpoint maps names to what is kept")
    return content


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """A module's state: tensors by name, dense ones.

    Raises:
        DataError: as :func:`read_checkpoint`, or something in it is no tensor.
    """
    return check_state(read_checkpoint(path), path)


def check_state(content: Any, path: Path) -> dict[str, torch.Tensor]:
    """Content as a module's state; DataError where it is none."""
    if not isinstance(content, dict):
        raise DataError(f"{path}: the state is a {type(content).__name__}, wanted are tensors by name")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            raise DataError(f"{path}: {name!r} is a {type(value).__name__}, wanted is a dense tensor")
    return content
