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
convolution and pooling; :data:`OTHERS` names all the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from lightning_baqe.benchmarks.setups import table_of
from lightning_baqe.files import Rows
from lightning_baqe.hardware.identity import device_info, versions

STAGES = ("quantize", "lower", "build", "match")
WANTED = {"torchvision": 0.8, "timm": 0.6}

CNNS: dict[str, dict[str, str]] = {
    "torchvision": {
        "alexnet": "alexnet",
        "convnext": "convnext_tiny",
        "densenet": "densenet121",
        "efficientnet": "efficientnet_b0",
        "googlenet": "googlenet",
        "inception": "inception_v3",
        "mnasnet": "mnasnet0_5",
        "mobilenetv2": "mobilenet_v2",
        "mobilenetv3": "mobilenet_v3_small",
        "regnet": "regnet_y_400mf",
        "resnet": "resnet18",
        "shufflenetv2": "shufflenet_v2_x0_5",
        "squeezenet": "squeezenet1_1",
        "vgg": "vgg11_bn",
    },
    "timm": {
        "byobnet": "repvgg_a0",
        "convmixer": "convmixer_768_32",
        "convnext": "convnext_atto",
        "cspnet": "cs3darknet_s",
        "cspnext": "cspnext_tiny",
        "densenet": "densenet121",
        "dla": "dla46_c",
        "dpn": "dpn48b",
        "efficientnet": "efficientnet_b0",
        "fasternet": "fasternet_t0",
        "ghostnet": "ghostnet_050",
        "hardcorenas": "hardcorenas_a",
        "hgnet": "hgnetv2_b0",
        "hrnet": "hrnet_w18_small",
        "inception_next": "inception_next_atto",
        "inception_resnet_v2": "inception_resnet_v2",
        "inception_v3": "inception_v3",
        "inception_v4": "inception_v4",
        "lcnetv2": "lcnetv2_small",
        "mambaout": "mambaout_femto",
        "mobilenetv3": "mobilenetv3_small_050",
        "nasnet": "nasnetalarge",
        "nfnet": "nfnet_l0",
        "pnasnet": "pnasnet5large",
        "rdnet": "rdnet_tiny",
        "regnet": "regnety_002",
        "repghost": "repghostnet_050",
        "repvit": "repvit_m0_9",
        "res2net": "res2net50_14w_8s",
        "resnest": "resnest14d",
        "resnet": "resnet10t",
        "resnetv2": "resnetv2_18d",
        "rexnet": "rexnet_100",
        "selecsls": "selecsls42",
        "senet": "legacy_seresnet18",
        "sknet": "skresnet18",
        "starnet": "starnet_s1",
        "tresnet": "tresnet_m",
        "vgg": "vgg11_bn",
        "vovnet": "ese_vovnet19b_dw",
        "xception": "legacy_xception",
        "xception_aligned": "xception41",
    },
}
# Attention, token-mixing MLPs, recurrence, focal modulation, state spaces, or hybrids with them.
_TIMM_OTHERS = """
    beit byoanet cait coat convit cpubone crossvit csatv2 davit deepseek_vit deit edgenext efficientformer
    efficientformer_v2 efficientvim efficientvit_mit efficientvit_msra eva fastvit focalnet gcvit gemma4_vit hiera
    hieradet_sam2 iformer levit lowformer maxxvit metaformer mlp_mixer mobilenetv5 mobilevit mvitv2 naflexvit nest
    nextvit pit pvt_v2 qwen3_vit sequencer shvit swiftformer swin_transformer swin_transformer_v2
    swin_transformer_v2_cr tiny_vit tnt twins visformer vision_transformer vision_transformer_hybrid
    vision_transformer_relpos vision_transformer_sam vitamin volo xcit
"""
OTHERS: dict[str, frozenset[str]] = {
    "torchvision": frozenset({"maxvit", "swin_transformer", "vision_transformer"}),
    "timm": frozenset(_TIMM_OTHERS.split()),
}


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


def _in_process(library: str, family: str, member: str, timeout_s: float) -> Row:
    """:func:`try_network` in a process of its own."""
    command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, "--one", library, family, member]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return Row(library, family, member, "", f"took more than {timeout_s:.0f} s", seconds=timeout_s)
    if done.returncode:
        lines = done.stderr.strip().splitlines()[-1:] or ["no message"]
        return Row(library, family, member, "", f"CRASH, exit status {done.returncode}: {lines[0]}")
    return Row(**json.loads(done.stdout.strip().splitlines()[-1]))


def run(libraries: list[str], folder: Path, jobs: int, timeout_s: float, console: Console) -> list[Row]:
    """All rows, from the folder or tried now."""
    kept = Rows(folder / "rows.jsonl")
    rows = [Row(**row) for row in kept.read()]
    done = {(row.library, row.family, row.member) for row in rows}
    wanted = [(lib, family, member) for lib in libraries for family, member in CNNS[lib].items()]
    missing = [entry for entry in wanted if entry not in done]
    with Progress(console=console) as progress, ThreadPoolExecutor(jobs) as pool:
        task = progress.add_task("networks", total=len(missing))
        for row in pool.map(lambda e: _in_process(e[0], e[1], e[2], timeout_s), missing):
            kept.append(asdict(row))
            rows.append(row)
            progress.update(task, advance=1, description=row.member)
    return [row for entry in wanted for row in rows if (row.library, row.family, row.member) == entry]


def report(rows: list[Row], console: Console) -> bool:
    """Print the tables; whether every library has its wanted share."""
    fine = True
    for library in dict.fromkeys(row.library for row in rows):
        mine = [row for row in rows if row.library == library]
        texts = ("family", "member", *STAGES, "error")
        headings = ("family", "member", "image", "MMAC", *STAGES, "seconds", "error")
        table = table_of(f"{library}: CNN families, random mixed 2..8-bit layers", headings, texts)
        for row in mine:
            last = STAGES.index(row.reached) if row.reached else -1
            marks = ["yes" if index <= last else "no" for index in range(len(STAGES))]
            table.add_row(
                row.family, row.member, str(row.size), f"{row.macs / 1e6:.0f}", *marks, f"{row.seconds:.0f}", row.error
            )
        console.print(table)
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--libraries", nargs="+", default=list(CNNS), choices=list(CNNS))
    parser.add_argument("--folder", type=Path, default=Path("outputs/coverage"), help="of the rows")
    parser.add_argument("--jobs", type=int, default=2, help="networks at once")
    parser.add_argument("--timeout-s", type=float, default=900.0, help="for each network")
    parser.add_argument("--one", nargs=3, metavar=("LIBRARY", "FAMILY", "MEMBER"), help="this network, as JSON")
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(asdict(try_network(*options.one))))
        return 0
    console = Console(width=None if Console().is_terminal else 200)
    info: dict[str, Any] = device_info(1)
    console.print(f"{info['cpu']}; {' '.join(f'{k} {v}' for k, v in versions().items())}")
    return 0 if report(run(options.libraries, options.folder, options.jobs, options.timeout_s, console), console) else 1


if __name__ == "__main__":
    sys.exit(main())
