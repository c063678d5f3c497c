"""The operators of the integer graph, each with its bit-exact meaning in plain torch.

A node is a frozen record: its name, the names of its inputs, the type of its output and its constants. ``run`` computes
the output from the inputs; values carry a leading batch dimension, types do not. Integer values travel as int64 tensors
here: a target decides on storage types. The real value behind an integer ``q`` is ``scale * (q - zero_point)``.

Integer convolutions are computed in float64, where sums of products below 2^53 are exact: the worst case of every layer
is checked to fit 32 bits on construction, so no rounding can occur. Operators whose name begins with Float do float32
arithmetic on values inside the network: layers that stay float, and what stands between them.
"""

from __future__ import annotations

from lightning_baqe.integer.base_nodes import (
    NODE_TYPES,
    Dequantize,
    Input,
    Literal,
    Node,
    Quantize,
    TensorType,
    per_channel,
)
from lightning_baqe.integer.layer_nodes import (
    INT32_MAX,
    Conv,
    FloatConv,
    FloatLayer,
    FloatLinear,
    Layer,
    Linear,
    check_accumulator,
)
from lightning_baqe.integer.movement_nodes import Concat, Flatten, Gather, Move, select_elements
from lightning_baqe.integer.pointwise_nodes import (
    Add,
    Affine,
    Clip,
    FloatAdd,
    FloatAffine,
    FloatFunction,
    FloatMul,
    FloatPRelu,
    Mul,
    PRelu,
    Requantize,
    Table,
)
from lightning_baqe.integer.window_nodes import AvgPool, FloatAvgPool, MaxPool, MaxWindows, over_windows, window_sums

__all__ = [
    "INT32_MAX",
    "NODE_TYPES",
    "Add",
    "Affine",
    "AvgPool",
    "Clip",
    "Concat",
    "Conv",
    "Dequantize",
    "Flatten",
    "FloatAdd",
    "FloatAffine",
    "FloatAvgPool",
    "FloatConv",
    "FloatFunction",
    "FloatLayer",
    "FloatLinear",
    "FloatMul",
    "FloatPRelu",
    "Gather",
    "Input",
    "Layer",
    "Linear",
    "Literal",
    "MaxPool",
    "MaxWindows",
    "Move",
    "Mul",
    "Node",
    "PRelu",
    "Quantize",
    "Requantize",
    "Table",
    "TensorType",
    "check_accumulator",
    "over_windows",
    "per_channel",
    "select_elements",
    "window_sums",
]
