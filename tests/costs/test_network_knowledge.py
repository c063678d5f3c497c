"""What a search over a network knows: sizes are exact, latencies are those of the records, schedules the best known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lightning_baqe as baqe
from lightning_baqe.costs.network_knowledge import NEGLIGIBLE, conversion_groups, search_knowledge
from lightning_baqe.deploy.plan import make_plan
from lightning_baqe.errors import ConfigError
from lightning_baqe.hardware.options import BuildOptions
from lightning_baqe.hardware.target import get_target
from lightning_baqe.integer.nodes import Requantize
from lightning_baqe.measurement.database import KernelRecord, Records
from lightning_baqe.quantization.sharing import shared_tensors
from lightning_baqe.search.knowledge import BoundKnowledge, Knowledge, Sum
from lightning_baqe.search.space import SearchSpace
from lightning_baqe.tuning.network_space import NetworkSpace

LATENCY_US, SIZE_BYTES = 100.0, 50_000
TIES = (("3", "5"),)


class Residual(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.body(x))


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), Residual(nn.Conv2d(16, 16, 3, padding=1)), nn.Conv2d(16, 16, 3, groups=16),
        nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    ).eval()  # fmt: skip


def lowered(network: nn.Module, bits: baqe.BitConfig) -> baqe.IntegerGraph:
    x = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    return baqe.lower(baqe.calibrate(baqe.quantize(network, bits, x), [x]))


def known(
    network: nn.Module, choices: tuple[int, ...], records: Records
) -> tuple[Knowledge, NetworkSpace, dict[int, baqe.IntegerGraph]]:
    target = get_target()
    graphs = {bits: lowered(network, baqe.BitConfig.uniform(network, bits, bits)) for bits in (*choices, 32)}
    base = baqe.BitConfig.uniform(network, 8, 8, ties=TIES)
    space = NetworkSpace.of({bits: graphs[bits] for bits in choices}, base, BuildOptions(target))
    for bits in choices:
        plan = make_plan(graphs[bits], BuildOptions(target))
        for layer, spec in plan.tunable().items():
            knobs = space.defaults[layer].get(bits, plan.schedules[layer])
            records.add_kernel(spec, target, KernelRecord(dict(knobs), float(bits), [float(bits)], True, None))
    reference = {"latency_us": LATENCY_US, "size_bytes": SIZE_BYTES}
    scores = {bits: {layer: 1.0 / bits for layer in base} for bits in choices}
    return search_knowledge(space, graphs, reference, BuildOptions(target), records, scores), space, graphs


def test_sizes_are_exact_for_any_point(network: nn.Module, tmp_path: Path) -> None:
    knowledge, space, _ = known(network, (3, 4, 8), Records(tmp_path / "r.db"))
    size = knowledge.objectives[2]
    assert isinstance(size, Sum)
    assert size.kind == "exact"
    internal = SearchSpace(space.distributions)
    bound = BoundKnowledge(knowledge, internal)
    for params in space.candidates(8, np.random.default_rng(0)):
        estimate = float(bound.estimates(np.array([internal.internal(params)]))[0, 2])
        assert estimate * SIZE_BYTES == pytest.approx(
            lowered(network, space.point(params)[0]).size_bytes, abs=NEGLIGIBLE * SIZE_BYTES
        )


def test_float_layers_make_sizes_estimates(network: nn.Module, tmp_path: Path) -> None:
    knowledge, _, _ = known(network, (4, 8, 32), Records(tmp_path / "r.db"))
    size = knowledge.objectives[2]
    assert isinstance(size, Sum)
    assert size.kind == "estimate"


def test_latencies_and_schedules_are_the_best_known(network: nn.Module, tmp_path: Path) -> None:
    knowledge, space, _ = known(network, (4, 8), Records(tmp_path / "r.db"))
    latency, error = knowledge.objectives[1], knowledge.objectives[0]
    assert isinstance(latency, Sum)
    assert isinstance(error, Sum)
    for leader in space.bit_choices:
        layers = 2 if leader == "3" else 1  # tied layers count together
        for bits in (4, 8):
            # Layer 3 is depthwise, one kernel at all bits, whose last record took 8; it is tied to layer 5.
            wanted = 8 + bits if leader == "3" else bits
            assert latency.terms[f"{leader}/bits"][bits] == pytest.approx(wanted / LATENCY_US)
            assert error.terms[f"{leader}/bits"][bits] == pytest.approx(layers / bits)
    internal = SearchSpace(space.distributions)
    bound = BoundKnowledge(knowledge, internal)
    assert [internal.names[index] for index in bound.free] == sorted(f"{leader}/bits" for leader in space.bit_choices)
    row = bound.improved(np.array([internal.internal(space.candidates(1, np.random.default_rng(5))[0])]))[0]
    bits, schedules = space.point(internal.external(row))
    for layer, knobs in schedules.items():
        assert {k: v for k, v in knobs.items() if k in space.knobs.get(layer, {})} == {
            k: v for k, v in space.defaults[layer][bits[layer].activation].items() if k in space.knobs.get(layer, {})
        }


def test_counts_are_the_conversions_of_the_lowered_network(network: nn.Module, tmp_path: Path) -> None:
    records = Records(tmp_path / "r.db")
    _, space, graphs = known(network, (3, 4, 8), records)
    shared = shared_tensors(network, torch.zeros(1, 3, 12, 12), space.base)
    reference = {"latency_us": LATENCY_US, "size_bytes": SIZE_BYTES}
    knowledge = search_knowledge(space, graphs, reference, BuildOptions(get_target()), records, shared=shared)
    internal = SearchSpace(space.distributions)
    bound, counted = BoundKnowledge(knowledge, internal), set()
    for params in space.candidates(12, np.random.default_rng(1)):
        count = int(bound.counts(np.array([internal.internal(params)]))[0, 1])
        graph = lowered(network, space.point(params)[0])
        assert count == sum(isinstance(node, Requantize) for node in graph)
        counted.add(count)
    assert len(counted) > 1


def test_float_layers_count_as_two_conversions(network: nn.Module, tmp_path: Path) -> None:
    _, space, _ = known(network, (4, 8, 32), Records(tmp_path / "r.db"))
    groups = conversion_groups(space, [])
    assert groups.count((("3/bits",), (4, 8))) == 4  # and as many for the layer that is tied to it
    assert {names for names, _ in groups} == {(f"{leader}/bits",) for leader in space.bit_choices}


def test_without_records_latency_is_not_known(network: nn.Module, tmp_path: Path) -> None:
    _, space, graphs = known(network, (4, 8), Records(tmp_path / "full.db"))
    reference = {"latency_us": LATENCY_US, "size_bytes": SIZE_BYTES}
    knowledge = search_knowledge(space, graphs, reference, BuildOptions(get_target()), Records(tmp_path / "empty.db"))
    error, latency, _ = knowledge.objectives
    assert latency is None
    assert isinstance(error, Sum)
    assert error.terms == {}
    assert error.rest == tuple(f"{leader}/bits" for leader in space.bit_choices)


def test_every_choice_needs_a_graph(network: nn.Module, tmp_path: Path) -> None:
    _, space, graphs = known(network, (4, 8), Records(tmp_path / "r.db"))
    with pytest.raises(ConfigError, match="graphs at"):
        search_knowledge(
            space,
            {8: graphs[8]},
            {"latency_us": 1.0, "size_bytes": 1},
            BuildOptions(get_target()),
            Records(tmp_path / "r.db"),
        )
