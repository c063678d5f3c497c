"""Tables as loops: the same numbers, in few pieces."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_baqe.kernels.relax_tables import TableError, even_pieces, table_function

TABLES = [
    np.ones((3, 4), np.float32), np.full((), -np.inf, np.float32), np.arange(12).reshape(3, 4),
    np.roll(np.arange(9), 2),
    np.tril(np.ones((5, 5))).astype(bool), np.array([0.5, 0.5, 0.25], np.float32), np.full(3, -np.inf, np.float32),
    np.array([7, 7, 7, 1, -1, -3], np.int32), np.array(5), np.arange(6)[::-1].copy(),
]  # fmt: skip


@pytest.mark.parametrize("values", TABLES, ids=lambda values: f"{values.dtype}{values.shape}")
def test_loops_write_the_table(values: np.ndarray) -> None:
    function = table_function(values).with_attr("global_symbol", "main")
    out = tvm.runtime.tensor(np.zeros_like(values))
    tvm.compile(tvm.IRModule({"main": function}), target="llvm")["main"](out)
    assert np.array_equal(out.numpy(), values)


@settings(deadline=None)
@given(values=st.lists(st.integers(-3, 3), min_size=1, max_size=12))
def test_pieces_are_the_values(values: list[int]) -> None:
    pieces = even_pieces(np.array(values, np.int64))
    ends = [first for first, _, _ in pieces[1:]] + [len(values)]
    made = [v + s * i for (first, v, s), end in zip(pieces, ends, strict=True) for i in range(end - first)]
    assert made == values


def test_even_steps_are_one_piece() -> None:
    assert len(even_pieces(np.arange(100) * 3 - 7)) == 1
    assert len(even_pieces(np.roll(np.arange(100), 3))) == 2


def test_a_table_of_many_numbers_is_refused() -> None:
    with pytest.raises(TableError, match="300 numbers"):
        table_function(np.random.default_rng(0).normal(size=300).astype(np.float32))
