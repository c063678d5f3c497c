"""Which CNNs of torchvision and timm work: ``python -m lightning_baqe.benchmarks.coverage``.

One small member of each family, random weights, random mixed 2..8-bit layers, the smallest image that it runs on, from
64 pixels. Each network has a process of its own, with a time limit, so that nothing that it does goes unnoticed. A row
is kept as soon as it is there; the next run tries what is missing.

| stage | means |
| --- | --- |
| quantize | traced, fake-quantized, calibrated |
| lower | an integer graph |
| build | compiled by TVM for this machine |
| match | compiled and interpreted outputs equal on every element, every integer node alone, too |

A family is a module of the library's ``models``. It counts as a CNN if what mixes pixels in all of its members is
convolution and pooling; ``families.json`` names these, each with the member that is tried, and all others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from lightning_baqe.benchmarks.setups import console_of, parser_of, table_of
from lightning_baqe.files import Rows
from lightning_baqe.hardware.identity import device_info, versions

STAGES = ("quantize", "lower", "build", "match")
WANTED = {"torchvision": 0.8, "timm": 0.6}

FAMILIES: dict[str, Any] = json.loads(Path(__file__).with_name("families.json").read_text())
CNNS: dict[str, dict[str, str]] = {library: of["cnns"] for library, of in FAMILIES.items()}  # each with its member
# Attention, token-mixing MLPs, recurrence, focal modulation, state spaces, or hybrids with them.
OTHERS = {library: frozenset(of["others"]) for library, of in FAMILIES.items()}


@dataclass(frozen=True)
class Row:
    """What became of one network.

    Args:
        reached: the last of :data:`STAGES` that worked, ``""`` for none.
        error: why it went no further, ``""`` if it matched.
        size: of the image, pixels.
        macs: per image.
        seconds: all in all.
    """

    library: str
    family: str
    member: str
    reached: str
    error: str
    size: int = 0
    macs: int = 0
    seconds: float = 0.0

    @property
    def passes(self) -> bool:
        return self.reached == STAGES[-1]


def try_network(library: str, family: str, member: str, size: int = 64) -> Row:
    """Take one network through all stages."""
    import torch

    from lightning_baqe.deploy.verify import verify
    from lightning_baqe.engines.zoo import calibrated, random_bits, settled_network
    from lightning_baqe.errors import BaqeError
    from lightning_baqe.integer.lowering import lower
    from lightning_baqe.measurement.build import build

    start, reached, found, macs = time.perf_counter(), "", 0, 0
    torch.set_num_threads(1)
    try:
        module, images = settled_network(member, library, size)
        found = images.shape[-1]
        quantized = calibrated(module, random_bits(module, seed=0), images)
        reached = "quantize"
        graph = lower(quantized)
        reached, macs = "lower", graph.macs
        artifact = build(graph, schedules="default")
        reached = "build"
        wrong = {name: count for name, count in verify(artifact, images[:1]).items() if count}
        equal = torch.equal(artifact.run(images[:2]), graph.run(images[:2]))
        error = "" if equal and not wrong else f"compiled and interpreted values differ: {wrong or 'output'}"
        reached = reached if error else "match"
    except BaqeError as raised:
        error = f"{type(raised).__name__}: {raised}"
    return Row(library, family, member, reached, error, found, macs, round(time.perf_counter() - start, 1))


def _in_process(entry: tuple[str, str, str], timeout_s: float) -> Row:
    """:func:`try_network` in a process of its own."""
    command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, "--one", *entry]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return Row(*entry, "", f"took more than {timeout_s:.0f} s", seconds=timeout_s)
    if done.returncode:
        lines = done.stderr.strip().splitlines()[-1:] or ["no message"]
        return Row(*entry, "", f"CRASH, exit status {done.returncode}: {lines[0]}")
    return Row(**json.loads(done.stdout.strip().splitlines()[-1]))


def run(libraries: list[str], folder: Path, jobs: int, timeout_s: float, console: Console) -> list[Row]:
    """All rows, from the folder or tried now."""
    kept = Rows(folder / "rows.jsonl")
    rows = {(row["library"], row["family"], row["member"]): Row(**row) for row in kept.read()}
    wanted = [(library, family, member) for library in libraries for family, member in CNNS[library].items()]
    missing = [entry for entry in wanted if entry not in rows]
    with Progress(console=console) as progress, ThreadPoolExecutor(jobs) as pool:
        task = progress.add_task("networks", total=len(missing))
        for entry, row in zip(missing, pool.map(partial(_in_process, timeout_s=timeout_s), missing), strict=True):
            kept.append(asdict(row))
            rows[entry] = row
            progress.update(task, advance=1, description=row.member)
    return [rows[entry] for entry in wanted]


def report(rows: list[Row], console: Console) -> bool:
    """Print the tables; whether every library has its wanted share."""
    fine = True
    for library in dict.fromkeys(row.library for row in rows):
        mine = [row for row in rows if row.library == library]
        texts = ("family", "member", *STAGES, "error")
        headings = ("family", "member", "image", "MMAC", *STAGES, "seconds", "error")
        cells = []
        for row in mine:
            last = STAGES.index(row.reached) if row.reached else -1
            marks = ["yes" if index <= last else "no" for index in range(len(STAGES))]
            macs, seconds = f"{row.macs / 1e6:.0f}", f"{row.seconds:.0f}"
            cells.append([row.family, row.member, row.size, macs, *marks, seconds, row.error])
        console.print(table_of(f"{library}: CNN families, random mixed 2..8-bit layers", headings, texts, cells))
        share = sum(row.passes for row in mine) / len(mine)
        unexplained = [row.member for row in mine if "CRASH" in row.error]
        fine = fine and share >= WANTED[library] and not unexplained
        console.print(
            f"{library}: {sum(row.passes for row in mine)} of {len(mine)} families pass, {share:.0%} "
            f"(wanted {WANTED[library]:.0%}); without an explanation: {unexplained or 'none'}\n"
        )
    return fine


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status: 1 if a library is below its share."""
    parser = parser_of(__doc__)
    parser.add_argument("--libraries", nargs="+", default=list(CNNS), choices=list(CNNS))
    parser.add_argument("--folder", type=Path, default=Path("outputs/coverage"), help="of the rows")
    parser.add_argument("--jobs", type=int, default=2, help="networks at once")
    parser.add_argument("--timeout-s", type=float, default=900.0, help="for each network")
    parser.add_argument("--one", nargs=3, metavar=("LIBRARY", "FAMILY", "MEMBER"), help="this network, as JSON")
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(asdict(try_network(*options.one))))
        return 0
    console = console_of(200)
    console.print(f"{device_info()['cpu']}; {' '.join(f'{k} {v}' for k, v in versions().items())}")
    return 0 if report(run(options.libraries, options.folder, options.jobs, options.timeout_s, console), console) else 1


if __name__ == "__main__":
    sys.exit(main())
