"""Bits of each output channel's weights, from the bit-config to the compiled network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantization.small_networks import NETWORKS, images, settled
from torch import nn

import lightning_baqe as baqe
from lightning_baqe import BitConfig, LayerBits
from lightning_baqe.calibration.rounding import best_integers, nearest
from lightning_baqe.errors import ConfigError, DataError
from lightning_baqe.integer.nodes import Layer
from lightning_baqe.integer.serialize import graph_from_parts, graph_to_parts, pack_bits, unpack_bits
from lightning_baqe.quantization.layers import outputs_first
from lightning_baqe.quantization.sensitivity import quantizers_of_layers
from lightning_baqe.quantization.weight import WEIGHT_INITS, WeightQuantizer
from lightning_baqe.tasks.optimizers import parameter_groups


def mixed(model: nn.Module) -> BitConfig:
    """2 to 8 bits in turns, over the channels of all layers."""
    uniform = BitConfig.uniform(model, 4, 5)
    channels = {name: len(outputs_first(model.get_submodule(name))) for name in uniform}
    bits = {name: tuple(2 + (place + 3) % 7 for place in range(count)) for name, count in channels.items()}
    return uniform.replace({name: LayerBits(of, 5) for name, of in bits.items()})


@pytest.mark.parametrize("init", WEIGHT_INITS)
def test_each_channel_is_quantized_as_with_its_bits_alone(init: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, grad = (torch.randn(7, 3, 3, 3, generator=generator) for _ in range(2))
    bits = (8, 2, 5, 3, 2, 4, 6)
    together = WeightQuantizer(weight, bits, init)
    found = weight.clone().requires_grad_()
    out = together(found)
    out.backward(grad)
    for place, width in enumerate(bits):
        row = slice(place, place + 1)
        alone, leaf = WeightQuantizer(weight[row], width, init), weight[row].clone().requires_grad_()
        expected = alone(leaf)
        expected.backward(grad[row])
        torch.testing.assert_close(out[row], expected)
        torch.testing.assert_close(found.grad[row], leaf.grad)
        torch.testing.assert_close(together.scale.grad[row], alone.scale.grad)
        assert torch.equal(together.integers(weight)[0][row], alone.integers(weight[row])[0])


@pytest.mark.parametrize("correct", ["none", "fast", "best"])
@pytest.mark.parametrize("name", NETWORKS)
def test_lowered_networks_compute_the_same(name: str, correct: str) -> None:
    model = settled(name)
    bits = mixed(model)
    quantized = baqe.calibrate(baqe.quantize(model, bits, images()), [images()], correct=correct).eval()
    for layer, of in quantizers_of_layers(quantized).items():
        integers, _ = of.weight.integers(outputs_first(quantized.get_submodule(of.path)))
        for row, width in zip(integers, bits[layer].weight, strict=True):
            assert -(2 ** (width - 1)) <= int(row.min()) <= int(row.max()) < 2 ** (width - 1)
    graph = baqe.lower(quantized)
    with torch.no_grad():
        difference = (graph.run(images()) - quantized(images())).abs()
    assert float(difference.max()) <= 0.02 * float(quantized(images()).abs().max().detach()) + 1e-3
    again = graph_from_parts(*graph_to_parts(graph))
    assert torch.equal(again.run(images()), graph.run(images()))
    assert (again.bits, again.size_bytes, again.bops) == (graph.bits, graph.size_bytes, graph.bops)


def test_sizes_and_operations_count_each_channel() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    x = torch.randn(4, 3, 6, 6)
    sizes = {}
    for first in (4, (2, 2, 4, 8), (8, 8, 8, 8), 8):
        bits = BitConfig.uniform(model).replace({"0": LayerBits(first, 5)})
        graph = baqe.lower(baqe.calibrate(baqe.quantize(model, bits, x), [x]).eval())
        sizes[first] = (graph.size_bytes, graph.bops)
    assert sizes[4] == sizes[2, 2, 4, 8]
    assert sizes[8] == sizes[8, 8, 8, 8]
    assert sizes[8][0] - sizes[4][0] == 4 * 27 // 2
    assert sizes[8][1] - sizes[4][1] == 4 * 5 * 4 * 27 * 16


def test_artifacts_and_bit_configs_keep_them(tmp_path: Path) -> None:
    model = settled("residual")
    bits = mixed(model)
    assert BitConfig.from_json(bits.to_json()) == bits
    graph = baqe.lower(baqe.calibrate(baqe.quantize(model, bits, images()), [images()]).eval())
    artifact = baqe.build(graph, schedules="default")
    artifact.save(tmp_path / "net")
    artifact.close()
    loaded = baqe.Artifact.load(tmp_path / "net")
    assert torch.equal(torch.as_tensor(loaded.run(images())), graph.run(images()))
    assert all(loaded.bits[name][0] == bits[name].weight for name in bits)
    loaded.close()


@given(st.data(), st.lists(st.integers(2, 8), min_size=1, max_size=9), st.integers(1, 12))
def test_packing_round_trips(data: st.DataObject, bits: list[int], count: int) -> None:
    rows = [
        data.draw(st.lists(st.integers(-(2 ** (b - 1)), 2 ** (b - 1) - 1), min_size=count, max_size=count))
        for b in bits
    ]
    packed = pack_bits(torch.tensor(rows), tuple(bits))
    assert packed.size == (sum(bits) * count + 7) // 8
    assert unpack_bits(packed, tuple(bits), len(bits) * count).reshape(-1, count).tolist() == rows


def test_what_does_not_fit_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    x = torch.randn(4, 3, 6, 6)
    wrong = BitConfig.uniform(model).replace({"0": LayerBits((4, 4), 8)})
    with pytest.raises(ConfigError, match="layer '0' has 4 output channels, and 2 weight bits by channel"):
        baqe.quantize(model, wrong, x)
    with pytest.raises(ConfigError, match="2 numbers of bits for the 3 channels"):
        pack_bits(torch.zeros(3, 2, dtype=torch.int64), (4, 4))
    with pytest.raises(ConfigError, match="7 values are no channels of 2"):
        unpack_bits(pack_bits(torch.zeros(2, 3, dtype=torch.int64), (4, 3)), (4, 3), 7)
    right = BitConfig.uniform(model).replace({"0": LayerBits((2, 3, 4, 8), 8)})
    quantized = baqe.calibrate(baqe.quantize(model, right, x), [x]).eval()
    with pytest.raises(ConfigError, match="'0' has weight bits by channel, and layers are compared"):
        _ = quantizers_of_layers(quantized)["0"].width
    description, arrays = graph_to_parts(baqe.lower(quantized))
    for wrong_bits, message in (
        ((2, 3, 4), "bits for 3"),
        ((2, 2, 4, 8), "not 2 bits"),
        ((0, 3, 4, 8), r"have \(0, 3"),
    ):
        broken = {**description, "nodes": [dict(node) for node in description["nodes"]]}
        (layer,) = (node for node in broken["nodes"] if node.get("weight_bits") == [2, 3, 4, 8])
        layer["weight_bits"] = list(wrong_bits)
        with pytest.raises(DataError, match=message):
            graph_from_parts(broken, arrays)


def test_no_channel_leaps_over_its_scale() -> None:
    """Training's rate for scales is that of the smallest, where they are apart by design."""
    model = settled("residual")
    quantized = baqe.calibrate(baqe.quantize(model, mixed(model), images()), [images()])
    groups = {group["name"]: group for group in parameter_groups(quantized, 1e-3, 0.0, relative=True)}
    rate = groups["weight_scale_channelwise_bit"]["lr"]
    least = [float(of.weight.scale.detach().min()) for of in quantizers_of_layers(quantized).values()]
    assert rate == pytest.approx(1e-3 * sum(least) / len(least))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_rounding_by_channel_is_that_of_each(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    target, inputs = (torch.randn(1, n, 6, generator=generator, dtype=torch.float64) for n in (3, 9))
    H, step = inputs.mT @ inputs, torch.rand(1, 3, 1, generator=generator, dtype=torch.float64) + 0.1
    qn, qp = torch.tensor([2, 4, 8]).double().reshape(1, 3, 1), torch.tensor([1, 3, 7]).double().reshape(1, 3, 1)
    for function in (nearest, lambda t, s, n, p: best_integers(t, s, H, n, p)):
        found = function(target, step, qn, qp)
        for place in range(3):
            row = slice(place, place + 1)
            alone = function(target[:, row], step[:, row], int(qn[0, place]), int(qp[0, place]))
            assert torch.equal(found[:, row], alone)


def test_layers_say_what_they_hold() -> None:
    model = settled("residual")
    graph = baqe.lower(baqe.calibrate(baqe.quantize(model, mixed(model), images()), [images()]).eval())
    for node in graph:
        if isinstance(node, Layer) and isinstance(node.weight_bits, tuple):
            assert node.widest_weight_bits == max(node.weight_bits)
            assert node.mean_weight_bits * len(node.weight_bits) == sum(node.weight_bits)
