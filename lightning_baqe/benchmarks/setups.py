"""What benchmarks share: folders that the same command goes on to fill, tables, numbers on the command line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_baqe.errors import ConfigError
from lightning_baqe.files import replace_file

INSTALL = "uv sync --group bench"  # the other engines


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


def console_of(width: int) -> Console:
    """What benchmarks print to: as wide as the terminal, or so many columns in a file."""
    return Console(width=None if Console().is_terminal else width, highlight=False)


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """A command line whose help is the module's docstring."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def table_of(
    title: str, headings: Sequence[str], texts: Collection[str] = (), rows: Iterable[Iterable[object]] = ()
) -> Table:
    """A table of cells; the columns in ``texts`` are set left, those of figures right."""
    table = Table(title=title)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in texts else "right")
    for row in rows:
        table.add_row(*map(str, row))
    return table


def text_of(value: float | None, form: str, missing: str = "") -> str:
    """A figure in this format; None is ``missing``."""
    return missing if value is None else format(value, form)


def layers_text(layers: Sequence[str]) -> str:
    """``layer1.0.conv1 +3``: the first of the layers that share a kernel, and how many others."""
    return layers[0] + (f" +{len(layers) - 1}" if len(layers) > 1 else "")


def check_positive(parser: argparse.ArgumentParser, options: argparse.Namespace, *names: str) -> None:
    """End the program with a message, unless these options are left out or at least 1."""
    for name in names:
        value = getattr(options, name.replace("-", "_"))
        if value is not None and value < 1:
            parser.error(f"--{name} is at least 1")
