"""What the user sees while a search runs."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lightning_baqe.callbacks.study import SearchStudy


class SearchProgress:
    """A bar with the trial, its phase, the best accuracy and the hypervolume so far.

    Args:
        total: trials and baselines.
        enabled: False shows nothing but warnings.
    """

    def __init__(self, total: int, enabled: bool = True) -> None:
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if enabled:
            columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                       TimeRemainingColumn(), TextColumn("{task.fields[figures]}"))  # fmt: skip
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("search", total=total, figures="")
            self._bar.start()

    def update(self, study: SearchStudy, what: str, phase: str = "", advance: bool = False) -> None:
        """Show what is going on."""
        if self._bar is None:
            return
        figures = ""
        if study.float_result is not None:
            summary = study.summary()
            done = [e for e in summary["trials"] + summary["baselines"] if e["state"] == "complete"]
            best = max((entry["accuracy"] for entry in done), default=None)
            if best is not None:
                figures = f"best accuracy {best:.4f}  hypervolume {summary['hypervolume']:.4f}"
            if advance and done and not self._console.is_terminal:
                self._console.print(f"{len(done)} evaluated: {figures}")
        text = f"{what} ({phase})" if phase else what
        self._bar.update(self._task, description=text, completed=study.done_count, figures=figures)

    def warn(self, text: str) -> None:
        """Print a warning above the bar."""
        self._console.print(f"[yellow]{text}")

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
