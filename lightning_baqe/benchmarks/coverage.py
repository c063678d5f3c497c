"""Which networks of torchvision and timm work: ``python -m lightning_baqe.benchmarks.coverage``.

One small member of each family, random weights, random mixed 2..8-bit layers, the smallest image that it runs on, from
64 pixels; operators without an integer meaning stay float. Each network has a process of its own, with a time limit,
so that nothing that it does goes unnoticed. A row is kept as soon as it is there; the next run tries what is missing.

| stage | means |
| --- | --- |
| admit | traced; the trace, and the trace lowered at 32 bit, compute what the network does |
| quantize | fake-quantized, calibrated |
| lower | a graph of integers, with islands of float operators |
| build | compiled by TVM for this machine |
| match | compiled and interpreted outputs equal on every element, every integer node alone, too; each island close |

A family is a module of the library's ``models``; of torchvision segmentation networks and backbones of detectors, too.
It counts as a CNN if what mixes pixels in all of its members is convolution and pooling; ``families.json`` has these
and all others, each with the member that is tried; of transformers one with few blocks and small images where the
library lets us, so that the whole takes hours, not days: every operator of the family stays.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress

from lightning_baqe.benchmarks.setups import console_of, parser_of, table_of
from lightning_baqe.files import Rows
from lightning_baqe.hardware.identity import device_info, versions

if TYPE_CHECKING:
    from torch import nn

STAGES = ("admit", "quantize", "lower", "build", "match")
WANTED = {"torchvision": 1.0, "timm": 0.95}  # of all families
INTEGER_ONLY = {"torchvision": 0.9, "timm": 0.9}  # of the CNNs

Member = str | dict[str, Any]  # a name, or {"name": name, option: value}
FAMILIES: dict[str, dict[str, dict[str, Member]]] = json.loads(Path(__file__).with_name("families.json").read_text())
OUTPUTS = {"segmentation": "out", "detection": "0"}  # of the several that these networks return


@dataclass(frozen=True)
class Row:
    """What became of one network.

    Args:
        kind: ``"cnns"``, ``"others"``, ``"segmentation"`` or ``"detection"``.
        reached: the last of :data:`STAGES` that worked, ``""`` for none.
        error: why it went no further, ``""`` if it matched.
        size: of the image, pixels.
        macs: per image.
        floats: operators that stay float.
        seconds: all in all.
    """

    library: str
    kind: str
    family: str
    member: str
    reached: str
    error: str
    size: int = 0
    macs: int = 0
    floats: int = 0
    seconds: float = 0.0

    @property
    def passes(self) -> bool:
        return self.reached == STAGES[-1]


def _network(library: str, kind: str, member: Member) -> tuple[nn.Module, int]:
    """The network with random weights, and the image size that its library has for it."""
    import torchvision

    from lightning_baqe.engines.zoo import default_size
    from lightning_baqe.tasks.networks import network

    options = dict(member) if isinstance(member, dict) else {}
    name = str(options.pop("name", member))
    if kind == "segmentation":
        return torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=10), 0
    if kind == "detection":
        return torchvision.models.get_model(name, weights=None, weights_backbone=None).backbone, 0
    if options:
        import timm

        return timm.create_model(name, num_classes=10, **options), default_size(name)
    return network(name, 10, library), default_size(name)


def try_network(library: str, kind: str, family: str, size: int = 64) -> Row:
    """Take one family's member through all stages."""
    import torch

    from lightning_baqe.calibration.calibrate import calibrate
    from lightning_baqe.deploy.verify import verify
    from lightning_baqe.engines.zoo import random_bits, settled
    from lightning_baqe.entrance.admission import admit
    from lightning_baqe.entrance.quantize import quantize
    from lightning_baqe.errors import BaqeError
    from lightning_baqe.integer.float_operators import FloatOperator
    from lightning_baqe.integer.lowering import lower
    from lightning_baqe.measurement.build import build

    start, reached, found, macs, floats = time.perf_counter(), "", 0, 0, 0
    member = FAMILIES[library][kind][family]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        module, last_size = _network(library, kind, member)
        module, images = settled(module, size, last_size)
        found = images.shape[-1]
        admitted = admit(module, images, OUTPUTS.get(kind), fallback="float")
        reached = "admit"
        quantized = calibrate(quantize(admitted, random_bits(module, seed=0)).eval(), [images])
        reached = "quantize"
        graph = lower(quantized)
        reached, macs = "lower", graph.macs
        floats = sum(isinstance(node, FloatOperator) for node in graph)
        artifact = build(graph, schedules="default")
        reached = "build"
        wrong = {name: count for name, count in verify(artifact, images[:1]).items() if count}
        equal = bool(floats) or torch.equal(artifact.run(images[:2]), graph.run(images[:2]))
        error = "" if equal and not wrong else f"compiled and interpreted values differ: {wrong or 'output'}"
        reached = reached if error else "match"
    except BaqeError as raised:
        error = f"{type(raised).__name__}: {raised}"
    seconds = round(time.perf_counter() - start, 1)
    return Row(library, kind, family, _name(member), reached, error, found, macs, floats, seconds)


def _in_process(entry: tuple[str, str, str], timeout_s: float) -> Row:
    """:func:`try_network` in a process of its own, forked from one that has imported everything."""
    name = _name(FAMILIES[entry[0]][entry[1]][entry[2]])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["timm", "tvm", "lightning_baqe.engines.zoo", "lightning_baqe.measurement.build"])
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(entry, writer))
    process.start()
    writer.close()
    try:
        found = reader.recv() if reader.poll(timeout_s) else f"took more than {timeout_s:.0f} s"
    except EOFError:
        found = "CRASH"
    process.kill() if isinstance(found, str) and found != "CRASH" else process.join()
    process.join()
    if isinstance(found, Row):
        return found
    error = f"{found}, exit status {process.exitcode}" if found == "CRASH" else found
    return Row(*entry, name, "", error, seconds=timeout_s if found != "CRASH" else 0.0)


def _send(entry: tuple[str, str, str], writer: Connection) -> None:
    try:
        writer.send(try_network(*entry))
    except Exception as error:  # whatever is no refusal counts as a crash, with its text
        writer.send(
            Row(*entry, _name(FAMILIES[entry[0]][entry[1]][entry[2]]), "", f"CRASH, {type(error).__name__}: {error}")
        )


def run(wanted: list[tuple[str, str, str]], folder: Path, jobs: int, timeout_s: float, console: Console) -> list[Row]:
    """All rows, from the folder or tried now.

    Args:
        wanted: library, kind and family of each.
        folder: of ``rows.jsonl``.
        jobs: networks at once.
        timeout_s: for each network.
        console: shows progress.
    """
    kept = Rows(folder / "rows.jsonl")
    rows = {(row["library"], row["kind"], row["family"]): Row(**row) for row in kept.read()}
    missing = [entry for entry in wanted if entry not in rows]
    with Progress(console=console) as progress, ThreadPoolExecutor(jobs) as pool:
        task = progress.add_task("networks", total=len(missing))
        for entry, row in zip(missing, pool.map(partial(_in_process, timeout_s=timeout_s), missing), strict=True):
            kept.append(asdict(row))
            rows[entry] = row
            progress.update(task, advance=1, description=row.member)
    return [rows[entry] for entry in wanted]


def report(rows: list[Row], console: Console) -> bool:
    """Print the tables; whether every library has its wanted shares, and nothing crashed."""
    fine = True
    for library in dict.fromkeys(row.library for row in rows):
        mine = [row for row in rows if row.library == library]
        texts = ("kind", "family", "member", *STAGES, "error")
        headings = ("kind", "family", "member", "image", "MMAC", *STAGES, "floats", "seconds", "error")
        cells = []
        for row in mine:
            last = STAGES.index(row.reached) if row.reached else -1
            marks = ["yes" if index <= last else "no" for index in range(len(STAGES))]
            numbers = (f"{row.macs / 1e6:.0f}", *marks, row.floats, f"{row.seconds:.0f}")
            cells.append([row.kind, row.family, row.member, row.size, *numbers, row.error])
        console.print(table_of(f"{library}, random mixed 2..8-bit layers", headings, texts, cells))
        unexplained = [row.member for row in mine if "CRASH" in row.error]
        share = _say_share(f"{library}: families that pass", [row.passes for row in mine], WANTED[library], console)
        integers = [row.passes and not row.floats for row in mine if row.kind == "cnns"]
        share &= _say_share(
            f"{library}: CNN families that pass as integers only", integers, INTEGER_ONLY[library], console
        )
        console.print(f"{library}: without an explanation: {unexplained or 'none'}\n")
        fine = fine and share and not unexplained
    return fine


def _say_share(what: str, passes: list[bool], wanted: float, console: Console) -> bool:
    share = sum(passes) / max(1, len(passes))
    console.print(f"{what}: {sum(passes)} of {len(passes)}, {share:.0%} (wanted {wanted:.0%})")
    return share >= wanted or not passes


def _name(member: Member) -> str:
    return str(member["name"]) if isinstance(member, dict) else member


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status: 1 if a library is below its shares."""
    parser = parser_of(__doc__)
    parser.add_argument("--libraries", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--families", nargs="+", help="these alone")
    parser.add_argument("--folder", type=Path, default=Path("outputs/coverage"), help="of the rows")
    parser.add_argument("--jobs", type=int, default=2, help="networks at once")
    parser.add_argument("--timeout-s", type=float, default=900.0, help="for each network")
    options = parser.parse_args(arguments)
    console = console_of(220)
    console.print(f"{device_info()['cpu']}; {' '.join(f'{k} {v}' for k, v in versions().items())}")
    wanted = [
        (library, kind, family)
        for library in options.libraries
        for kind, members in FAMILIES[library].items()
        for family in members
        if options.families is None or family in options.families
    ]
    return 0 if report(run(wanted, options.folder, options.jobs, options.timeout_s, console), console) else 1


if __name__ == "__main__":
    sys.exit(main())
