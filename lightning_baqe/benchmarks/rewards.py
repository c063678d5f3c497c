"""What a device rewards: the latency and storage that each bit-width buys, kernel by kernel.

    python -m lightning_baqe.benchmarks.rewards --model resnet18 [--target avx2]

Every kernel of the network, dense or depthwise, is measured with a few knobs at each bit-width, as far as the records
lack them: all but the first and the last layer at these bits in weights and inputs. Then the fastest codes of all
bit-widths of a kernel are measured once more in turns, and the table is of these figures: a clock that drifted from one
bit-width to the next does not decide between them. The records keep them, and a second run measures nothing.

Weights are random, and without a trained network's outliers: chains of int16 sums depend on the weights at hand, so
that a trained network may do a little better or worse.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from lightning_baqe.benchmarks.setups import console_of, parser_of, table_of, text_of
from lightning_baqe.costs.bit_rewards import (
    GAIN,
    REFERENCE,
    WIDTHS,
    Fastest,
    Rewards,
    default_bit_choices,
    fastest_codes,
    rewards_of,
    searched_kernels,
)
from lightning_baqe.engines.zoo import calibrated, settled_network
from lightning_baqe.errors import BaqeError, ConfigError
from lightning_baqe.hardware.options import BuildOptions
from lightning_baqe.hardware.target import CpuTarget, get_target
from lightning_baqe.integer.graph import IntegerGraph
from lightning_baqe.integer.lowering import lower
from lightning_baqe.kernels.tunable import TunableSpec
from lightning_baqe.kernels.x86.depthwise import DepthwiseSpec
from lightning_baqe.measurement.device import REPEATS, Device
from lightning_baqe.measurement.local import Local
from lightning_baqe.quantization.config import BitConfig
from lightning_baqe.tuning.bench import KernelBench, interleaved
from lightning_baqe.tuning.tuner import Step, tune

ROUNDS = 8  # of a comparison; more than the tuner's, so that the number of samples tells which figures are of one


def graphs_at(name: str, library: str, size: int, widths: Sequence[int]) -> dict[int, IntegerGraph]:
    """A network with random weights at each bit-width, first and last layer at 8 bit."""
    module, images = settled_network(name, library, size)
    return {bits: lower(calibrated(module, BitConfig.uniform(module, bits, bits), images)) for bits in widths}


def measure_missing(
    graphs: Mapping[int, IntegerGraph], target: CpuTarget, threads: int, candidates: int, device: Device
) -> None:
    """Measure each kernel with so many knobs at each bit-width; what is in the records is not measured again."""
    with Progress(console=Console(stderr=True)) as progress:
        for bits, graph in graphs.items():
            task = progress.add_task(f"kernels of {bits} bit")

            def show(step: Step, task: TaskID = task) -> None:
                progress.update(task, completed=step.done, total=step.total)

            tune(graph, BuildOptions(target, threads), candidates, device=device, progress=show)


def compare_widths(graphs: Mapping[int, IntegerGraph], target: CpuTarget, threads: int, device: Device) -> None:
    """Measure the fastest codes of each kernel, one for each bit-width with a code of its own, in turns.

    A figure that was chosen for being low goes up when it is taken again, and then another code may be the fastest:
    goes on until all that are the fastest were compared so. Where one code serves all there is nothing to compare.
    """
    with Progress(console=Console(stderr=True)) as progress, tempfile.TemporaryDirectory() as folder:
        kernels = searched_kernels(graphs, BuildOptions(target, threads))
        for number, (_, specs) in enumerate(progress.track(kernels, description="bit-widths in turns")):
            benches: dict[TunableSpec, KernelBench] = {}
            while True:
                fastest = fastest_codes(specs, target, device.records)
                codes: dict[str, Fastest] = {}
                for bits in sorted(fastest, reverse=True):
                    codes.setdefault(fastest[bits].code, fastest[bits])
                if len(codes) < 2 or all(one.samples >= ROUNDS * REPEATS for one in codes.values()):
                    break
                for one in codes.values():
                    place = Path(folder) / f"{number}_{len(benches)}"
                    benches.setdefault(one.spec, KernelBench(one.spec, target, device, place))
                interleaved([(benches[one.spec], one.knobs) for one in codes.values()], ROUNDS)


def shape_text(spec: TunableSpec) -> str:
    """``64->64 3x3/1 56x56``: channels, window, stride, output; then ``depthwise``, or the number of groups."""
    source, result = spec.source, spec.result
    window = "x".join(map(str, spec.kernel))
    text = f"{source.channels}->{result.channels} {window}/{spec.stride[0]} {result.height}x{result.width}"
    if isinstance(spec, DepthwiseSpec):
        return f"{text} depthwise"
    return text if spec.groups == 1 else f"{text} {spec.groups} groups"


def table(rewards: Rewards) -> Table:
    """One row a kernel, then the network."""
    widths = [bits for bits in rewards.widths if bits != REFERENCE]
    title = f"Speed at each bit-width over 8 bit ({rewards.path}); '=': the same instructions"
    headings = ("kernel", "layers", "us at 8 bit", *(f"{bits} bit" for bits in widths))
    cells = []
    for kernel in rewards.kernels:
        ratios = ["=" if bits in kernel.same else _ratio(kernel.speedup(bits)) for bits in widths]
        reference = text_of(kernel.latency_us.get(REFERENCE), ".1f", "-")
        cells.append([shape_text(kernel.spec), len(kernel.layers), reference, *ratios])
    found = table_of(title, headings, ("kernel",), cells)
    found.add_section()
    layers = str(sum(len(kernel.layers) for kernel in rewards.kernels))
    found.add_row("all of them, by time", layers, "", *(_ratio(rewards.speedup(bits)) for bits in widths))
    found.add_row("the network's size", "", "", *(f"{rewards.storage[bits]:.2f}x" for bits in widths))
    return found


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def main(arguments: Sequence[str] | None = None, device: Device | None = None) -> int:
    """The command line, for a device instead of this machine if one is given; returns the exit status."""
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--library", default="torchvision")
    parser.add_argument("--size", type=int, default=224, help="of the image")
    parser.add_argument("--bits", type=int, nargs="+", default=list(WIDTHS))
    parser.add_argument("--candidates", type=int, default=3, help="knobs of each kernel")
    parser.add_argument("--target", default="native")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--database", type=Path, metavar="records.db", help="default: the user's")
    options = parser.parse_args(arguments)
    console = console_of(140)
    try:
        if wrong := [bits for bits in options.bits if not 2 <= bits <= REFERENCE]:
            raise ConfigError(f"--bits are 2..{REFERENCE}, got {wrong}")
        target, device = get_target(options.target), device or Local(options.database)
        graphs = graphs_at(options.model, options.library, options.size, sorted({*options.bits, REFERENCE}))
        measure_missing(graphs, target, options.threads, options.candidates, device)
        compare_widths(graphs, target, options.threads, device)
        rewards = rewards_of(graphs, BuildOptions(target, options.threads), device.records)
        console.print(
            f"{device.info()['cpu']}, {options.model}, image {graphs[REFERENCE].input_shape[-1]}", markup=False
        )
        console.print(table(rewards))
        for what, counts in (("with size as an objective", True), ("for accuracy and latency alone", False)):
            choices = ", ".join(map(str, default_bit_choices(rewards, "beyond", counts)))
            console.print(f"A search {what} offers {choices} bit (a width buys latency from {GAIN:g}x on).")
    except BaqeError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
