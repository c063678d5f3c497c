"""Index maps that are selections of channels, rows and columns, and those that are not."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_baqe.integer import movement
from lightning_baqe.integer.nodes import select_elements

SHAPES = st.tuples(*[st.integers(1, 4)] * 3)


@given(SHAPES, st.data())
def test_selections_are_found_again(shape: tuple[int, int, int], data: st.DataObject) -> None:
    """Whatever is picked of each dimension, with holes: the same elements are read by what is found."""
    sources = [st.lists(st.integers(-1, size - 1), min_size=1, max_size=5) for size in shape]
    picked = [torch.tensor(data.draw(source)) for source in sources]
    index = select_elements(movement.start(shape), picked, 0)
    found = movement.select(index, shape)
    assert found is not None
    assert torch.equal(select_elements(movement.start(shape), found, 0), index)


@given(SHAPES, st.randoms(use_true_random=False))
def test_other_maps_are_no_selections(shape: tuple[int, int, int], random: object) -> None:
    """An order of elements is a selection only if one index for each dimension makes it; images stay apart."""
    order = list(range(torch.Size(shape).numel()))
    random.shuffle(order)  # type: ignore[attr-defined]
    index = movement.start(shape).flatten(1)[:, order].reshape(2, *shape)
    found = movement.select(index, shape)
    if found is not None:
        assert torch.equal(select_elements(movement.start(shape), found, 0), index)
    assert movement.select(index.flip(0), shape) is None


def test_maps_that_are_far_from_selections_are_told_at_once() -> None:
    """Rows of one image as channels of another: each dimension alone would pick from the whole of the value."""
    shape = (1, 1, 2**17)
    index = movement.start(shape).reshape(2, 256, 512, 1)
    assert movement.select(index, shape) is None  # built, it would have 2^34 elements
