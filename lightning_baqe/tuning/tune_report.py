"""What a tuning run shows: a progress bar while it runs, then a table and ``tuning.json``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from lightning_baqe.files import replace_file
from lightning_baqe.hardware.identity import versions
from lightning_baqe.kernels.specs import kernel_key
from lightning_baqe.kernels.tunable import template_of
from lightning_baqe.tuning.tuner import Step, TunedKernel, TuneResult


@contextmanager
def tune_progress(console: Console) -> Iterator[Callable[[Step], None]]:
    """A bar with the kernel, its latency, GMAC/s and share of the peak; a line now and then where there is no terminal.
    What it yields shows a step of the tuner.
    """
    columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn(), TextColumn("{task.fields[figures]}", markup=False))  # fmt: skip
    shown = 0  # tenths

    def update(step: Step) -> None:
        nonlocal shown
        figures, tenths = step_text(step), 10 * step.done // step.total
        bar.update(task, completed=step.done, total=step.total, figures=figures)
        if not console.is_terminal and tenths > shown:
            shown = tenths
            console.print(f"{step.done}/{step.total} {figures}", markup=False, soft_wrap=True)

    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("tune", total=None, figures="")
        yield update


def step_text(step: Step) -> str:
    """``layer knobs: latency, GMAC/s, share of the peak``, or why it failed."""
    knobs = knobs_text(step.record.knobs)
    if step.gmacs is None or step.record.latency_us is None:
        return f"{step.layer} {knobs}: {step.record.error}"
    share = "" if step.share is None else f", {step.share:.0%} of peak"
    return f"{step.layer} {knobs}: {step.record.latency_us:.1f} us, {step.gmacs:.0f} GMAC/s{share}"


def knobs_text(knobs: Mapping[str, Any]) -> str:
    """The values in the order of the knobs' names."""
    return " ".join(str(knobs[name]) for name in sorted(knobs))


def tuning_table(result: TuneResult) -> Table:
    """One row for each kernel, and the sums over all layers."""
    table = Table(title="kernels, most work first")
    for name in ("layers", "MMAC", "default us", "best us", "speedup", "GMAC/s", "of peak", "tried", "knobs"):
        table.add_column(name, justify="left" if name in ("layers", "knobs") else "right")
    for kernel in result.kernels:
        table.add_row(
            kernel.layers[0] + (f" and {len(kernel.layers) - 1} more" if len(kernel.layers) > 1 else ""),
            f"{kernel.spec.macs / 1e6:.1f}",
            _figure(kernel.default_us, ".1f"),
            _figure(kernel.best_us, ".1f"),
            f"{kernel.speedup:.2f}",
            _figure(kernel.gmacs, ".0f"),
            _figure(kernel.share, ".0%"),
            str(kernel.known),
            knobs_text(kernel.knobs or {}),
        )
    speedup = f"{result.default_us / result.best_us:.2f}" if result.best_us else ""
    table.add_section()
    table.add_row("all layers", "", f"{result.default_us:.0f}", f"{result.best_us:.0f}", speedup, "", "", "", "")
    return table


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def tuning_line(result: TuneResult, budget_s: float | None) -> str:
    """What was measured, whether all of it was right, and whether the budget ended it."""
    failed = sum(kernel.failed for kernel in result.kernels)
    inexact = sum(kernel.inexact for kernel in result.kernels)
    known = sum(kernel.known for kernel in result.kernels)
    line = f"{result.measured} candidates measured in {result.seconds:.1f} s, {failed} of them failed; "
    line += f"{known} are known, {inexact} of them gave wrong results."
    if not result.complete:
        line += f" The budget of {budget_s:g} s ended it: the same command goes on."
    return line


def write_tuning(folder: Path, result: TuneResult, about: Mapping[str, Any]) -> Path:
    """Write ``tuning.json`` with ``about`` (recipe, device, ...) and one entry for each kernel; returns its path."""
    content = {
        **about,
        "versions": versions(),
        "seconds": result.seconds,
        "complete": result.complete,
        "measured": result.measured,
        "default_us": result.default_us,
        "best_us": result.best_us,
        "kernels": [kernel_entry(kernel) for kernel in result.kernels],
    }
    path = folder / "tuning.json"
    replace_file(path, json.dumps(content, indent=1).encode())
    return path


def kernel_entry(kernel: TunedKernel) -> dict[str, Any]:
    """A kernel's figures, as JSON can hold them."""
    spec = kernel.spec

    def figures(*names: str) -> dict[str, Any]:
        return {name: getattr(kernel, name) for name in names}

    return {
        "kernel": kernel_key(spec, {}),
        "layers": list(kernel.layers),
        "macs": spec.macs,
        **figures("default_us", "best_us", "speedup", "gmacs", "peak_gmacs", "share"),
        "default_knobs": template_of(spec).check_knobs(spec, {}),
        **figures("knobs", "known", "inexact", "measured", "failed"),
    }
