"""What ATen operators are, and where each operator of a traced graph comes from."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from lightning_baqe.quantization.pointwise import is_pointwise

aten = torch.ops.aten
ORIGIN = "lightning_baqe.origin"  # in the meta of a traced graph's nodes


@dataclass(frozen=True)
class Origin:
    """Where a node of a traced graph comes from.

    Args:
        label: its readable name: the path of the layer or of torch's own module that it is, or the path of the module
            around it and the operator's name.
        path: of the module whose forward called it.
        kind: that module's class.
        shape: of its value, None for what depends on the size of the batch; ``()`` where it is no tensor.
        dtype: of its value, as PyTorch names it.
    """

    label: str
    path: str = ""
    kind: str = ""
    shape: tuple[int | None, ...] = ()
    dtype: str = "float32"


def origin(node: fx.Node) -> Origin:
    """Where a node comes from; of one that was added afterwards its name alone is known."""
    return cast(Origin, node.meta.get(ORIGIN) or Origin(node.name))


# Modules of which eval mode leaves nothing, by full name: they drop branches or regions in training.
STOCHASTIC = frozenset({
    "torchvision.ops.stochastic_depth.StochasticDepth", "torchvision.ops.drop_block.DropBlock2d",
    "timm.layers.drop.DropPath", "timm.layers.drop.DropBlock2d",
})  # fmt: skip
# By the operator's name without overload.
_MOVEMENTS = (
    "view reshape _unsafe_view view_as reshape_as flatten unflatten squeeze unsqueeze transpose permute t mT numpy_T "
    "movedim moveaxis swapaxes swapdims chunk split split_with_sizes tensor_split unbind narrow slice select index "
    "index_select flip roll rot90 channel_shuffle native_channel_shuffle pixel_shuffle pixel_unshuffle expand "
    "expand_as repeat tile repeat_interleave constant_pad_nd pad reflection_pad1d reflection_pad2d replication_pad1d "
    "replication_pad2d upsample_nearest1d upsample_nearest2d unfold im2col diagonal broadcast_to atleast_3d"
)
_SPELLINGS: dict[str, str] = {
    "add": "add sub rsub",
    "mul": "mul",
    "div": "div",
    "max_pool": "max_pool2d max_pool1d",
    "adaptive_max_pool": "adaptive_max_pool2d adaptive_max_pool1d",
    "avg_pool": "avg_pool2d avg_pool1d",
    "adaptive_avg_pool": "adaptive_avg_pool2d adaptive_avg_pool1d",
    "mean": "mean",
    "sum": "sum",
    "amax": "amax",
    "concat": "cat",
    "prelu": "prelu",
    "resize": "upsample_bilinear2d",
    "movement": _MOVEMENTS,
    "identity": "contiguous clone detach alias dropout to _to_copy lift_fresh_copy lift_fresh",
}
KINDS: dict[str, str] = {name: kind for kind, names in _SPELLINGS.items() for name in names.split()}
COLLECTIONS = frozenset({"chunk", "split", "split_with_sizes", "tensor_split", "unbind"})
LAYERS = frozenset({"conv2d", "conv1d", "conv_transpose2d", "linear"})
NORMS = frozenset({"batch_norm", "_native_batch_norm_legit_no_training"})
DROPOUTS = frozenset({"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"})
# What torch.export leaves of assignments to a part of a tensor, and of constants in the shape of a tensor.
WRITES = frozenset({"slice_scatter", "select_scatter", "copy"})
FILLS = frozenset({
    "zeros_like", "ones_like", "full_like", "zeros", "ones", "full", "new_zeros", "new_ones", "new_full",
})  # fmt: skip
# Float islands keep these whole, since compilers know them.
WHOLE = frozenset({
    "layer_norm", "group_norm", "instance_norm", "softmax", "log_softmax", "scaled_dot_product_attention", "matmul",
    "bmm", "rms_norm",
})  # fmt: skip


# Others are written in their place when the graph is built.
REWRITTEN = frozenset({"stack", "col2im"})


def adaptive_max_pool2d(input: torch.Tensor, output_size: Any) -> torch.Tensor:
    """The values alone of PyTorch's operator of this name."""
    return aten.adaptive_max_pool2d.default(input, output_size)[0]


def adaptive_max_pool1d(input: torch.Tensor, output_size: Any) -> torch.Tensor:
    """The values alone of PyTorch's operator of this name."""
    return aten.adaptive_max_pool1d.default(input, output_size)[0]


# Of their several outputs the first alone has a meaning here; these operators return it alone.
FIRST_OF: dict[Any, Any] = {
    aten.max_pool2d_with_indices.default: aten.max_pool2d.default,
    aten.adaptive_max_pool2d.default: adaptive_max_pool2d,
    aten.adaptive_max_pool1d.default: adaptive_max_pool1d,
    aten.max.dim: aten.amax.default,
    aten.min.dim: aten.amin.default,
}


def name_of(node: fx.Node) -> str:
    """An operator's name without its overload: ``"add"``; the name of any other function."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1]
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def is_known(node: fx.Node) -> bool:
    """Whether a recorded call has a meaning of its own here; others are to be taken apart."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten" or is_python(node):
        return True
    name = name_of(node).removesuffix("_")
    if name == "rrelu" or name in WRITES or name in FILLS or not node.all_input_nodes:
        return True
    known = name in KINDS or name in LAYERS or name in NORMS or name in DROPOUTS or name in WHOLE | REWRITTEN
    return known or node.target in FIRST_OF or is_pointwise(node.target) or node.target._schema.is_mutable


def is_random(node: fx.Node) -> bool:
    """Whether a recorded call draws random numbers in eval mode."""
    name = name_of(node).removesuffix("_")
    spared = name in DROPOUTS or name in WHOLE or name in KINDS or name == "rrelu"
    tags = node.target.tags if isinstance(node.target, torch._ops.OpOverload) else ()
    return torch.Tag.nondeterministic_seeded in tags and not spared


def bound(node: fx.Node) -> dict[str, Any]:
    """A call's arguments by the names of its schema, defaults included."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        names = ("input", "output_size")
        return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    schema = target._schema.arguments
    found = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    found |= dict(zip((argument.name for argument in schema), node.args, strict=False))
    return found | dict(node.kwargs)


def is_python(node: fx.Node) -> bool:
    """Whether a call computes a Python number, such as the size of a tensor."""
    if node.target in (operator.getitem, adaptive_max_pool2d, adaptive_max_pool1d):
        return False
    return not isinstance(node.target, torch._ops.OpOverload) or name_of(node).startswith("sym_")
