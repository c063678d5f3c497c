"""Is what PyTorch computes what the device computes? ``python -m lightning_baqe.benchmarks.exactness model=resnet18``.

Every tensor that the network stores as integers, three times: the fake-quantized network in PyTorch (float32), the
integer graph's interpreter, the compiled module. Arguments are ``key=value``:

| key | default | meaning |
| --- | --- | --- |
| model, library | resnet18, torchvision | the network, random weights, batch norms settled on random images |
| checkpoint | | a ``state_dict`` file of it, read with ``weights_only=True`` |
| weight, activation | 8, 8 | bits of all layers but the first and the last, which have 8; ``mixed``: random 2..8 |
| size, images, seed, num_classes | 64, 4, 0, 10 | |
| threads, target | 1, native | of the compiled module |
| json | | a file for all rows |

| column | compares | where 1 step is a step of the tensor's grid |
| --- | --- | --- |
| alone | fake-quant against interpreter, given fake-quant's inputs | shows each operator by itself |
| whole | fake-quant against interpreter, from the image on | rounding differences of all layers before add up |
| compiled | compiled against interpreter, from the image on | must be 0 everywhere |

Exit status 1 if a compiled element differs.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import fx

from lightning_baqe.benchmarks.setups import console_of, table_of
from lightning_baqe.deploy.verify import verify
from lightning_baqe.engines.zoo import calibrated, random_bits, settled_network
from lightning_baqe.errors import ConfigError
from lightning_baqe.hardware.identity import device_info
from lightning_baqe.integer.graph import IntegerGraph
from lightning_baqe.integer.lowering import lower_with_sources
from lightning_baqe.measurement.build import build
from lightning_baqe.quantization.config import BitConfig, near
from lightning_baqe.quantization.convert import QuantizedModel

DEFAULTS: dict[str, str] = {
    "model": "resnet18", "library": "torchvision", "checkpoint": "", "weight": "8", "activation": "8", "size": "64",
    "images": "4", "seed": "0", "num_classes": "10", "threads": "1", "target": "native", "json": "",
}  # fmt: skip


@dataclass(frozen=True)
class Agreement:
    """How two tensors of integers agree.

    Args:
        largest: difference, in steps.
        equal: share of equal elements, 0..1.
        cosine: of the values behind them, zero points subtracted.
    """

    largest: int
    equal: float
    cosine: float


@dataclass(frozen=True)
class Row:
    """One stored tensor.

    Args:
        node, kind: of the integer graph.
        alone: together with what stands between it and the stored tensors before.
        compiled: differing elements, None where the value lives inside another kernel.
    """

    node: str
    kind: str
    elements: int
    alone: Agreement
    whole: Agreement
    compiled: int | None


def agreement(a: torch.Tensor, b: torch.Tensor, zero_point: int) -> Agreement:
    """Compare two int64 tensors of one shape."""
    x, y = (a - zero_point).double().flatten(), (b - zero_point).double().flatten()
    norm = float(x.norm() * y.norm())
    cosine = float(x @ y) / norm if norm else float(torch.equal(x, y))
    return Agreement(int((a - b).abs().max()), float((a == b).double().mean()), cosine)


def fake_quant_integers(
    model: QuantizedModel, graph: IntegerGraph, sources: dict[str, str], x: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The integers that a fake-quantized network's tensors stand for, by node of the integer graph: int64."""
    interpreter = fx.Interpreter(model, garbage_collect_values=False)
    with torch.no_grad():
        interpreter.run(x)
    values = {node.name: value for node, value in interpreter.env.items()}
    found = {}
    for name, node_name in sources.items():
        kind = graph[node_name].type
        integers = torch.round(values[name].double() / kind.scale).to(torch.int64) + kind.zero_point
        found[node_name] = integers.reshape(len(x), *kind.shape)
    return found


def compare(
    model: QuantizedModel, x: torch.Tensor, target: str = "native", threads: int = 1
) -> tuple[list[Row], float]:
    """Compare all stored tensors.

    Args:
        model: calibrated, in eval mode.
        x: images, ``(n, channels, height, width)``.

    Returns:
        the rows in network order, and the share of images whose top-1 is the same in PyTorch and on the device.
    """
    graph, sources = lower_with_sources(model, x[:1])
    fake = fake_quant_integers(model, graph, sources, x)
    whole = graph.run_all(x)
    artifact = build(graph, target, schedules="default", threads=threads)
    compiled = artifact.run_all(x)
    rows = []
    given = {graph.nodes[0].name: x, **fake}
    for node in graph:
        known = [given[name] for name in node.inputs if name in given]
        if node.name not in fake:
            if node.inputs:  # fake-quant has no such tensor: a layer under a max pool, what is only moved
                given[node.name] = node.run(*known)
            continue
        alone = agreement(fake[node.name], node.run(*known), node.type.zero_point)
        differing = int((compiled[node.name] != whole[node.name]).sum()) if node.name in compiled else None
        agree = agreement(fake[node.name], whole[node.name], node.type.zero_point)
        rows.append(Row(node.name, node.kind, fake[node.name].numel(), alone, agree, differing))
    if any(verify(artifact, x[:1]).values()):
        raise ConfigError("the compiled module fails lightning_baqe.verify; please report it")
    with torch.no_grad():
        same = (model(x).argmax(1) == artifact.run(x).argmax(1)).double().mean()
    return rows, float(same)


def _options(arguments: list[str]) -> dict[str, str]:
    options = dict(DEFAULTS)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in options:
            raise ConfigError(f"{argument!r} is no key=value with one of {', '.join(options)}{near(key, options)}")
        options[key] = value
    return options


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    options = _options(arguments)
    seed, classes, size = (int(options[name]) for name in ("seed", "num_classes", "size"))
    module, _ = settled_network(options["model"], options["library"], size, seed, classes)
    if options["checkpoint"]:
        module.load_state_dict(torch.load(options["checkpoint"], weights_only=True))
    x = torch.randn(int(options["images"]), 3, size, size, generator=torch.Generator().manual_seed(seed + 1))
    if "mixed" in (options["weight"], options["activation"]):
        bits = random_bits(module, seed)
    else:
        bits = BitConfig.uniform(module, int(options["weight"]), int(options["activation"]))
    rows, same = compare(calibrated(module, bits, x), x, options["target"], int(options["threads"]))
    console = console_of(160)
    title = f"{options['model']}, W{options['weight']}A{options['activation']}, {len(x)} images of {size} px"
    headings = ("tensor", "operator", "elements", "alone: max", "equal", "whole: max", "equal", "cosine", "compiled")
    cells = []
    for row in rows:
        alone = (row.alone.largest, f"{row.alone.equal:.4%}")
        whole = (row.whole.largest, f"{row.whole.equal:.2%}", f"{row.whole.cosine:.6f}")
        inside = "in kernel" if row.compiled is None else row.compiled
        cells.append((row.node, row.kind, row.elements, *alone, *whole, inside))
    console.print(table_of(title, headings, ("tensor", "operator"), cells))
    differing = sum(row.compiled or 0 for row in rows)
    elements = sum(row.elements for row in rows)
    unequal = sum((1 - row.alone.equal) * row.elements for row in rows)
    console.print(
        f"{device_info(1)['cpu']}: operators alone: {1 - unequal / elements:.5%} of the elements equal, largest "
        f"difference {max(row.alone.largest for row in rows)} steps; compiled against interpreter: {differing} "
        f"elements differ; top-1 equal to PyTorch's on {same:.1%}"
    )
    if options["json"]:
        Path(options["json"]).write_text(json.dumps({"options": options, "rows": [asdict(row) for row in rows]}))
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
