"""What the user sees while a search runs."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lightning_baqe.runs.summary import Summary


class SearchProgress:
    """A bar with the trial, its phase, the best accuracy and the hypervolume so far.

    Args:
        total: trials and baselines.
        enabled: whether to show a bar.
        other: Lightning's bar, where it shows one: a line for every trial goes there instead.
    """

    def __init__(self, total: int, enabled: bool = True, other: pl.callbacks.ProgressBar | None = None) -> None:
        self._console = Console(stderr=True)
        self._other = other
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if enabled:
            columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                       TimeRemainingColumn(), TextColumn("{task.fields[figures]}"))  # fmt: skip
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("search", total=total, figures="")
            self._bar.start()

    def update(self, what: str, summary: Summary | None = None, advance: bool = False) -> None:
        """Show what is going on, and the figures of a new summary; ``advance``: one more was evaluated."""
        shown: dict[str, Any] = {}
        if summary is not None:
            done, figures = summary.complete, ""
            if done:
                best = max(entry.accuracy for entry in done)
                figures = f"best {summary.measure} {best:.4f}  hypervolume {summary.hypervolume:.4f}"
            shown = {"completed": summary.done_count, "figures": figures}
            line = f"{len(done)} evaluated: {figures}"
            if advance and self._bar is None and self._other is not None:
                self._other.print(line)
            elif advance and self._bar is not None and done and not self._console.is_terminal:
                self._console.print(line)
        if self._bar is not None:
            self._bar.update(self._task, description=what, **shown)

    def warn(self, text: str) -> None:
        """Print a warning above the bar."""
        self._console.print(f"[yellow]{text}")

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def show(self, what: RenderableType) -> None:
        """Print above the bar, whether there is one or not."""
        self._console.print(what)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
