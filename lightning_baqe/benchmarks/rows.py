"""Rows of a benchmark on disk, so that what was measured survives an interruption."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lightning_baqe.deploy.front import replace_file


class Rows:
    """A file with one JSON object a line, on the disk before the next is measured."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.all: list[dict[str, Any]] = []
        if path.exists():
            lines = path.read_text().splitlines(keepends=True)
            self.all = [json.loads(line) for line in lines if line.endswith("\n")]  # the last one may be cut off
            replace_file(path, "".join(line for line in lines if line.endswith("\n")).encode())

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row."""
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.all.append(row)
