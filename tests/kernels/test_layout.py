"""Storage layouts and packed weights."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_graphs import Maker

from lightning_baqe.deploy.plan import make_plan
from lightning_baqe.hardware.options import BuildOptions
from lightning_baqe.hardware.target import get_target
from lightning_baqe.kernels.x86.conv_knobs import check_knobs
from lightning_baqe.kernels.x86.conv_spec import ConvSpec
from lightning_baqe.kernels.x86.conv_weights import pack_weights, weight_quads
from lightning_baqe.kernels.x86.layout import SLACK, VECTOR, Layout, storage_dtype, stored_channels

HALO = st.tuples(st.integers(0, 3), st.integers(0, 3))


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 6), HALO)
def test_unpack_finds_every_value(channels: int, height: int, width: int, halo: tuple[int, int]) -> None:
    layout = Layout(channels, height, width, stored_channels(channels), halo, "int32")
    buffer = np.full(layout.length, -1, np.int32)
    values = np.arange(channels * height * width, dtype=np.int32).reshape(channels, height, width)
    for (c, y, x), value in np.ndenumerate(values):
        buffer[layout.origin() + y * layout.row + x * layout.stored + c] = value
    assert (layout.unpack(buffer) == values).all()
    assert layout.origin(*halo) == 0
    assert layout.full == (height + 2 * halo[0], width + 2 * halo[1])
    assert layout.length == (height + 2 * halo[0]) * (width + 2 * halo[1]) * layout.stored + SLACK
    packed = layout.pack(values, 7)
    assert (layout.unpack(packed) == values).all()
    assert packed.shape == buffer.shape
    outside = np.ones((*layout.full, layout.stored), bool)
    outside[halo[0] : halo[0] + height, halo[1] : halo[1] + width] = False
    assert (packed[: -SLACK or None].reshape(outside.shape)[outside][:channels] == 7).all()


@given(HALO, st.sampled_from([(0, 16), (16, 5), (32, 48)]))
def test_a_part_is_found_in_the_whole(halo: tuple[int, int], part: tuple[int, int]) -> None:
    whole = Layout(96, 3, 2, 96, halo, "int32")
    values = np.arange(whole.length, dtype=np.int32)
    first, count = part
    inside = whole.part(first, count)
    assert (inside.unpack(values) == whole.unpack(values)[first : first + count]).all()
    assert (inside.part(0, 3).unpack(values) == whole.unpack(values)[first : first + 3]).all()
    assert (inside.length, inside.row, inside.pitch) == (whole.length, whole.row, 96)
    assert inside.alone == Layout(count, 3, 2, stored_channels(count), halo, "int32")


@pytest.mark.parametrize(
    ("low", "high", "dtype"),
    [(0, 255, "uint8"), (0, 3, "uint8"), (-1, 3, "int8"), (-128, 127, "int8"), (-129, 0, "int32"), (0, 256, "int32")],
)
def test_storage_is_the_narrowest(low: int, high: int, dtype: str) -> None:
    assert storage_dtype(low, high) == dtype


def test_stored_channels_are_whole_vectors() -> None:
    assert [stored_channels(n) for n in (1, VECTOR, VECTOR + 1)] == [VECTOR, VECTOR, 2 * VECTOR]


@pytest.fixture(params=["vnni512", "avxvnni", "avx2", "portable"])
def spec(request: pytest.FixtureRequest) -> ConvSpec:
    maker = Maker(20, 6)
    maker.conv(out=24, padding=1, weight_bits=4)
    found = make_plan(maker.graph(), BuildOptions(get_target(request.param))).calls[1].spec
    assert isinstance(found, ConvSpec)
    return found


def test_weights_are_packed_without_loss(spec: ConvSpec) -> None:
    weight = np.random.default_rng(0).integers(-8, 8, (24, 20, 3, 3))
    quads = weight_quads(spec, weight)
    assert quads.shape[:2] == (spec.result.stored, spec.segments())
    assert quads.sum() == weight.sum()
    values = pack_weights(spec, check_knobs(spec, {"weights": "bytes"}), weight)
    assert values.sum() == weight.sum()
    assert (values != 0).sum() == (weight != 0).sum()
    if spec.arithmetic.nibbles:
        packed = pack_weights(spec, check_knobs(spec, {"weights": "packed"}), weight)
        assert packed.dtype == np.uint8
        assert sum(int((part.astype(np.int64) - 8).sum()) for part in (packed & 15, packed >> 4)) == weight.sum()


def test_wide_dilation_has_more_segments(spec: ConvSpec) -> None:
    assert spec.segments() == 3
    dilated = dataclasses.replace(spec, dilation=(1, 2))
    assert dilated.segments() == 9
    assert dilated.run() * 3 == spec.run()
