from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantization.small_networks import images, settled

from lightning_baqe import BitConfig, LayerBits, calibrate, lower, quantize
from lightning_baqe.errors import ConfigError, DataError
from lightning_baqe.integer.serialize import graph_from_parts, graph_to_parts, pack_bits, unpack_bits


@given(st.data(), st.integers(1, 32), st.integers(0, 40))
def test_packing_round_trips(data: st.DataObject, bits: int, count: int) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    values = data.draw(st.lists(st.integers(low, high), min_size=count, max_size=count))
    packed = pack_bits(torch.tensor(values, dtype=torch.int64), bits)
    assert packed.dtype == np.uint8
    assert packed.size == (count * bits + 7) // 8
    assert unpack_bits(packed, bits, count).tolist() == values


def test_layout() -> None:
    assert pack_bits(torch.tensor([1, -1, 7]), 4).tolist() == [0xF1, 0x07]
    assert pack_bits(torch.tensor([[1, -2], [-1, 0]]), 2).tolist() == [0b00_11_10_01]
    assert pack_bits(torch.tensor([-127, 5]), 8).tolist() == [129, 5]


def test_packing_refuses_what_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="do not fit 4 signed bits"):
        pack_bits(torch.tensor([8]), 4)
    with pytest.raises(ConfigError, match="1 to 32 bits"):
        pack_bits(torch.tensor([0]), 33)
    with pytest.raises(ConfigError, match="damaged"):
        unpack_bits(np.zeros(3, dtype=np.uint8), 4, 4)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("residual", {"block1.conv1": LayerBits(4, 4), "block2.conv1": LayerBits(3, 5)}),
        ("residual", {"block1.conv2": LayerBits(32, 32)}),
        ("functional", {}),
        ("mlp", {"1": LayerBits(32, 32)}),
    ],
)
def test_graph_round_trips_through_json_and_npz(name: str, changes: dict[str, LayerBits]) -> None:
    model = settled(name)
    quantized = calibrate(quantize(model, BitConfig.uniform(model).replace(changes), images()), [images()])
    graph = lower(quantized)
    description, arrays = graph_to_parts(graph)
    file = io.BytesIO()
    np.savez(file, **arrays)
    file.seek(0)
    with np.load(file, allow_pickle=False) as stored:
        again = graph_from_parts(json.loads(json.dumps(description)), stored)
    assert torch.equal(again.run(images()), graph.run(images()))
    assert again.bits == graph.bits
    assert (again.size_bytes, again.macs, again.bops) == (graph.size_bytes, graph.macs, graph.bops)
    assert [node.type for node in again] == [node.type for node in graph]
    assert graph_to_parts(again)[0] == description


def test_foreign_parts_are_refused() -> None:
    model = settled("mlp")
    description, arrays = graph_to_parts(
        lower(calibrate(quantize(model, BitConfig.uniform(model), images()), [images()]))
    )
    with pytest.raises(DataError, match="version 99"):
        graph_from_parts({**description, "version": 99}, arrays)
    nodes = description["nodes"]
    with pytest.raises(DataError, match=r"nodes\.0: .*lstm"):
        graph_from_parts({**description, "nodes": [{**nodes[0], "kind": "lstm"}, *nodes[1:]]}, arrays)
    with pytest.raises(DataError, match=r"nodes\.0\.input\.color: Extra"):
        graph_from_parts({**description, "nodes": [{**nodes[0], "color": 1}, *nodes[1:]]}, arrays)
    with pytest.raises(DataError, match="is missing"):
        graph_from_parts(description, {})
