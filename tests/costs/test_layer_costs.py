"""Costs by layer: exact for uniform networks, sums in between."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fake_device import FakeDevice
from torch import Tensor, nn

import lightning_baqe as baqe
from lightning_baqe.costs.layer_costs import (
    BOPS,
    LATENCY,
    MEAN_BITS,
    SIZE,
    LayerCosts,
    converted_inputs,
    latency_costs,
    static_costs,
    uniform_configs,
)
from lightning_baqe.entrance.admission import admit
from lightning_baqe.errors import ConfigError
from lightning_baqe.hardware.options import BuildOptions
from lightning_baqe.integer.graph import IntegerGraph
from lightning_baqe.quantization.config import LayerBits
from lightning_baqe.quantization.ops import OpReader

WIDTHS = (2, 4, 8, 32)


class Net(nn.Module):
    """A residual branch, and two layers that read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one = nn.Conv2d(8, 8, 3, padding=1)
        self.side = nn.Conv2d(8, 8, 1)
        self.two = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.two(torch.relu(self.one(x))) + self.side(x))
        return self.fc(x.mean((2, 3)))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def configs(net: nn.Module) -> dict[int, baqe.BitConfig]:
    return uniform_configs(baqe.BitConfig.uniform(net, 8, 8), ("one", "side", "two"), WIDTHS)


def graph_of(net: nn.Module, bits: baqe.BitConfig) -> IntegerGraph:
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return baqe.lower(baqe.calibrate(baqe.quantize(net, bits, x), [x]).eval())


@pytest.fixture(scope="module")
def graphs(net: nn.Module, configs: dict[int, baqe.BitConfig]) -> dict[int, IntegerGraph]:
    return {bits: graph_of(net, config) for bits, config in configs.items()}


MIXED = {"stem": 8, "one": 2, "side": 8, "two": 4, "fc": 8}


def test_sizes_and_bit_operations_are_those_of_graphs(
    net: nn.Module, configs: dict[int, baqe.BitConfig], graphs: dict[int, IntegerGraph]
) -> None:
    network = admit(net, torch.zeros(1, 3, 8, 8)).graph
    costs = static_costs(graphs, configs, OpReader(network, network.graph))
    mixed = baqe.BitConfig.uniform(net, 8, 8).replace({n: LayerBits(b, b) for n, b in MIXED.items()})
    for bits, graph in (
        (MIXED, graph_of(net, mixed)),
        *(({**MIXED, "one": b, "side": b, "two": b}, graphs[b]) for b in WIDTHS),
    ):
        assert costs.total(BOPS, bits) == graph.bops
        assert costs.total(SIZE, bits) == pytest.approx(graph.size_bytes, abs=30)
        assert costs.total(SIZE, bits) >= graph.size_bytes
    weights = {name: module.weight.numel() for name, module in net.named_modules() if hasattr(module, "weight")}
    wanted = sum(MIXED[name] * count for name, count in weights.items()) / sum(weights.values())
    assert costs.total(MEAN_BITS, MIXED) == pytest.approx(wanted)
    assert costs.tables[SIZE]["stem"].keys() == {8}
    assert list(costs.tables[SIZE]["one"]) == list(WIDTHS)
    assert costs.span(BOPS, min) == graphs[2].bops
    assert costs.span(BOPS, max) == graphs[32].bops


def test_latencies(
    net: nn.Module, configs: dict[int, baqe.BitConfig], graphs: dict[int, IntegerGraph], tmp_path: Path
) -> None:
    """Sums are exact where whole networks were measured, whatever these say beyond their kernels."""
    whole = {2: 150.0, 4: 95.0, 8: 110.0, 32: 400.0}
    reader = OpReader(admit(net, torch.zeros(1, 3, 8, 8)).graph, admit(net, torch.zeros(1, 3, 8, 8)).graph.graph)
    device, static = FakeDevice(tmp_path / "records.db"), static_costs(graphs, configs, reader)

    def measured(offered: tuple[int, ...]) -> LayerCosts:
        return latency_costs(
            {b: graphs[b] for b in offered}, {b: configs[b] for b in offered}, reader, BuildOptions(), device,
            static.tables[SIZE], lambda bits, graph: whole[bits], candidates=1, tune_s=0.0,
        )  # fmt: skip

    costs = measured(WIDTHS)
    for bits in WIDTHS:
        assert costs.total(LATENCY, {**MIXED, "one": bits, "side": bits, "two": bits}) == pytest.approx(whole[bits])
    kernels = len(device.kernels)
    assert measured(WIDTHS) == costs
    assert len(device.kernels) == kernels  # the device's records have them
    # At 2 bit more time goes than to the kernels: to the readers of the tensor that the sum reads at 8 bit, in halves.
    assert costs.tables[LATENCY].keys() == {"stem", "one", "side", "two", "fc"}
    assert LayerCosts.from_record(costs.record()) == costs
    with pytest.raises(ConfigError, match=r"need an integer network to refer to, got \[32\] bits"):
        measured((32,))


def test_who_reads_converted_tensors(net: nn.Module) -> None:
    network = admit(net, torch.zeros(1, 3, 8, 8)).graph
    reader, base = OpReader(network, network.graph), baqe.BitConfig.uniform(net, 8, 8)
    assert converted_inputs(reader, base) == {}
    two = base.replace(one=LayerBits(2, 2), side=LayerBits(4, 4), two=LayerBits(2, 2))
    assert converted_inputs(reader, two) == {"one": 8 * 8 * 8}  # the stem's output is stored at 4 bit, for the side
    assert converted_inputs(reader, base.replace(one=LayerBits(2, 2), side=LayerBits(2, 2))) == {}


def test_restricted_and_joined() -> None:
    costs = LayerCosts({SIZE: {"a": {4: 1.0, 8: 2.0, 32: 8.0}, "b": {8: 3.0}}}, {SIZE: 5.0})
    assert costs.restricted((4, 8)).tables == {SIZE: {"a": {4: 1.0, 8: 2.0}, "b": {8: 3.0}}}
    joined = costs.joined(LayerCosts({BOPS: {"a": {4: 1.0}}}, {BOPS: 0.0}))
    assert (set(joined.tables), joined.rest) == ({SIZE, BOPS}, {SIZE: 5.0, BOPS: 0.0})
    assert (costs.span(SIZE, min), costs.span(SIZE, max)) == (9.0, 16.0)
