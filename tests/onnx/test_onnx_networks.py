"""Whole networks in ONNX, with random weights.

Such networks are chaotic: a step in one pixel of the first layer is a difference in most of the last ones, so that the
logits say little about whether every operator is right. Each is therefore compared given the engine's own inputs, too.
"""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest
import torch
import torchvision
from onnx_engines import MODES, cosine, run, run_all, run_openvino

import lightning_baqe as baqe
from lightning_baqe.integer import nodes as ir
from lightning_baqe.integer.graph import IntegerGraph

SLOW = pytest.param("inception_v3", 75, marks=pytest.mark.slow)


def lowered(name: str, size: int, mixed: bool) -> tuple[IntegerGraph, torch.Tensor]:
    """A network of random weights with W8A8 or random bits, and images."""
    options = {"aux_logits": False, "init_weights": True} if name == "inception_v3" else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = torchvision.models.get_model(name, weights=None, num_classes=10, **options).train()
        with torch.no_grad():
            for _ in range(3):
                network(torch.randn(8, 3, size, size))
        x = torch.randn(8, 3, size, size)
    bits, rng = baqe.BitConfig.uniform(network.eval()), random.Random(0)
    if mixed:
        floats = set(rng.sample(list(bits), 2))
        bits = bits.replace(
            {layer: baqe.LayerBits(*(32, 32) if layer in floats else rng.choices(range(2, 9), k=2)) for layer in bits}
        )
    quantized = baqe.calibrate(baqe.quantize(network, bits, x), [x]).eval()
    return baqe.lower(quantized), x


def check_nodes(graph: IntegerGraph, path: Path, x: torch.Tensor) -> int:
    """Compare each node, given the engine's inputs, with the engine's output; returns how many were compared.

    They may differ by one step, at ties and where the bias was rounded. A step of the accumulator is ``factor`` steps
    of the output, which bounds how many do.
    """
    found = run_all(path, x)
    integers = {
        node.name: torch.round(found[node.name].double() / node.type.scale).long() + node.type.zero_point
        for node in graph
        if node.type.is_integer and node.type.scale and node.name in found
    }
    compared = 0
    for node in graph:
        inputs = [integers[name] for name in node.inputs if name in integers]
        if node.name not in integers or not inputs or len(inputs) < len(node.inputs):
            continue
        difference = (node.run(*inputs) - integers[node.name]).abs()
        factor = 0.0
        if isinstance(node, ir.Conv | ir.Linear) and node.requant is not None:
            factor = float(node.requant.real().abs().max())
        assert difference.max() <= 1, node.name
        # Means of few integers are ties now and then, and products with round numbers.
        ties = 0.1 * isinstance(node, ir.AvgPool | ir.Requantize)
        assert (difference > 0).float().mean() <= 0.005 + factor / 4 + ties, node.name
        compared += 1
    return compared


@pytest.mark.parametrize(("name", "size"), [("resnet18", 32), ("mobilenet_v2", 32), SLOW])
def test_8_bits(name: str, size: int, tmp_path: Path) -> None:
    graph, x = lowered(name, size, mixed=False)
    path = graph.to_onnx(tmp_path / "model.onnx")
    assert check_nodes(graph, path, x) > 20
    # What rounding took from the biases is all that ONNX has no place for.
    same_biases = IntegerGraph(
        tuple(dataclasses.replace(n, fraction=None) if isinstance(n, ir.Conv | ir.Linear) else n for n in graph),
        graph.bits,
    )
    for mode in MODES:
        logits = run(path, x, mode)
        assert cosine(logits, same_biases.run(x)) > 0.999, mode
        assert cosine(logits, graph.run(x)) > 0.998, mode
    assert cosine(run_openvino(path, x), graph.run(x)) > 0.998


@pytest.mark.parametrize(("name", "size"), [("resnet18", 32), SLOW])
def test_random_bits(name: str, size: int, tmp_path: Path) -> None:
    graph, x = lowered(name, size, mixed=True)
    path = graph.to_onnx(tmp_path / "model.onnx")
    assert check_nodes(graph, path, x) > 20
    packed = graph.to_onnx(tmp_path / "packed.onnx", pack_int4=True)
    for model in (path, packed):
        for mode in MODES:
            assert run(model, x, mode).isfinite().all()
    assert packed.stat().st_size < path.stat().st_size
