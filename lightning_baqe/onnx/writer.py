"""Nodes and constants of an ONNX graph, one after the other, each under a name of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper

from lightning_baqe.integer.serialize import pack_bits

# An 8-bit grid: names of a float32 scale and of a zero point of the type in which the integers are stored, scalars.
Grid = tuple[str, str]


class Writer:
    """An ONNX graph under construction. No node and no constant may take a reserved name: those of the graph's input
    and output.
    """

    def __init__(self, reserved: Sequence[str] = ()) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._names = set(reserved)
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def name(self, wish: str) -> str:
        """``wish``, or the next free name like it."""
        name, count = wish, 1
        while name in self._names:
            name, count = f"{wish}_{count}", count + 1
        self._names.add(name)
        return name

    def constant(self, wish: str, array: np.ndarray) -> str:
        """A constant; equal ones are stored once. Returns its name."""
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.own_constant(wish, array)
        return self._constants[key]

    def own_constant(self, wish: str, array: np.ndarray) -> str:
        """A constant that is stored for itself even if it equals another."""
        name = self.name(wish)
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name))
        return name

    def scalar(self, wish: str, value: float) -> str:
        """A float32 scalar."""
        return self.constant(wish, np.array(value, np.float32))

    def shape(self, wish: str, values: Sequence[int]) -> str:
        """An int64 vector: axes, sizes, indices."""
        return self.constant(wish, np.array(values, np.int64))

    def int4(self, wish: str, array: np.ndarray) -> str:
        """Integers within -8..7 as INT4, two a byte."""
        name = self.name(wish)
        packed = pack_bits(torch.from_numpy(array), 4).tobytes()
        self.initializers.append(helper.make_tensor(name, onnx.TensorProto.INT4, array.shape, packed, raw=True))
        return name

    def node(self, op: str, inputs: Sequence[str], wish: str, **attributes: Any) -> str:
        """An operator with one output. Returns the output's name, which is also the node's."""
        out = self.name(wish)
        self.nodes.append(helper.make_node(op, list(inputs), [out], name=out, **attributes))
        return out

    def grid(
        self, wish: str, scale: float, zero_point: int, storage: type[np.unsignedinteger | np.signedinteger]
    ) -> Grid:
        """The constants of a grid."""
        return self.scalar(f"{wish}.scale", scale), self.constant(f"{wish}.zero_point", np.array(zero_point, storage))

    def quantize(self, real: str, grid: Grid, wish: str) -> str:
        """QuantizeLinear; returns the name of the integers."""
        return self.node("QuantizeLinear", [real, *grid], f"{wish}.quantized")

    def dequantize(self, integers: str, grid: Grid, wish: str) -> str:
        """DequantizeLinear; returns the name of the real values."""
        return self.node("DequantizeLinear", [integers, *grid], wish)

    def rename(self, old: str, new: str) -> None:
        """Give a node's output another name, which is reserved."""
        for node in self.nodes:
            node.input[:] = [new if name == old else name for name in node.input]
            node.output[:] = [new if name == old else name for name in node.output]
