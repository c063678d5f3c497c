"""What benchmarks share: folders that the same command goes on to fill, tables, numbers on the command line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

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


def table_of(title: str, headings: Sequence[str], texts: Collection[str] = ()) -> Table:
    """A table without rows; the columns in ``texts`` are set left, those of figures right."""
    table = Table(title=title)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in texts else "right")
    return table


def check_positive(parser: argparse.ArgumentParser, options: argparse.Namespace, *names: str) -> None:
    """End the program with a message, unless these options are left out or at least 1."""
    for name in names:
        value = getattr(options, name.replace("-", "_"))
        if value is not None and value < 1:
            parser.error(f"--{name} is at least 1")
