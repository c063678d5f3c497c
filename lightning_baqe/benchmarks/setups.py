"""Folders that benchmarks fill, so that the same command goes on where it was interrupted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_baqe.errors import ConfigError
from lightning_baqe.files import replace_file


def begin(folder: Path, setup: Mapping[str, Any]) -> None:
    """Make the folder, or go on in one that was begun with the same setup.

    Args:
        folder: keeps `setup.json`.
        setup: what may not change while the folder is filled; numbers, texts and lists.

    Raises:
        ConfigError: the folder was begun with another setup.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "setup.json"
    if not path.exists():
        replace_file(path, json.dumps(setup, indent=1).encode())
        return
    found = json.loads(path.read_text())
    different = [f"{k}: {found.get(k)!r} there, {v!r} here" for k, v in setup.items() if found.get(k) != v]
    if different:
        raise ConfigError(f"{folder} was begun with another setup ({'; '.join(different)}): give another --folder.")
