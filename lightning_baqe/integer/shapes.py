"""Shapes and Python values inside a traced graph, and torch's window arguments in one form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from lightning_baqe.errors import UnsupportedModelError

_BATCH = 2  # a batch size that was fixed somewhere (view(1, -1)) shows as a wrong first dimension


class _Recorder(fx.Interpreter):
    def __init__(self, model: fx.GraphModule) -> None:
        super().__init__(model)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        if isinstance(out, torch.Tensor):
            self.shapes[n] = tuple(out.shape)
        else:
            self.values[n] = out
        return out


class GraphValues:
    """What each node of a graph evaluates to for an input of a given shape.

    Args:
        model: in eval mode.
        shape: of the input, without the batch dimension.

    Raises:
        UnsupportedModelError: the network does not run on that shape.
    """

    def __init__(self, model: fx.GraphModule, shape: tuple[int, ...]) -> None:
        parameter = next(model.parameters(), None)
        dtype = torch.float32 if parameter is None else parameter.dtype
        recorder = _Recorder(model)
        try:
            with torch.no_grad():
                recorder.run(torch.zeros(_BATCH, *shape, dtype=dtype))
        except (RuntimeError, ValueError) as error:
            raise UnsupportedModelError(
                f"the network does not run on a batch of {_BATCH} inputs of shape {shape}: {error}; give the shape it "
                "was made for, and let no operator fix the batch size"
            ) from error
        self._shapes, self._values = recorder.shapes, recorder.values

    def shape(self, node: fx.Node, label: str) -> tuple[int, ...]:
        """Shape of a tensor without the batch dimension."""
        shape = self._shapes[node]
        if not shape or shape[0] != _BATCH:
            raise UnsupportedModelError(
                f"{label!r}: the first dimension must stay the batch; for a batch of {_BATCH} its output is {shape}"
            )
        return shape[1:]

    def resolve(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options with the nodes in them replaced by what they evaluate to."""
        return {name: fx.node.map_arg(value, lambda node: self._values[node]) for name, value in options.items()}


def pair(value: Any) -> tuple[int, int]:
    """``n`` or ``(n,)`` as ``(n, n)``, ``(n, m)`` as it is."""
    if isinstance(value, int):
        return value, value
    numbers = tuple(int(v) for v in value)
    return (numbers[0], numbers[0]) if len(numbers) == 1 else (numbers[0], numbers[1])


def padding_of(layer: nn.Conv2d) -> tuple[int, int, int, int]:
    """A convolution's padding as ``(top, bottom, left, right)``; ``"same"`` puts an odd one at the end, as torch."""
    if layer.padding == "valid":
        return 0, 0, 0, 0
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        (top, bottom), (left, right) = ((total // 2, total - total // 2) for total in totals)
        return top, bottom, left, right
    height, width = pair(layer.padding)
    return height, height, width, width


def pool_window(
    kind: str, options: Mapping[str, Any], shape: tuple[int, ...], label: str
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Kernel and stride of an average pooling without padding.

    Args:
        kind: ``"avg_pool"``, ``"adaptive_avg_pool"`` or ``"mean"`` (over height and width).
        options: by torch's names.
        shape: of the input, ``(channels, height, width)``.

    Raises:
        UnsupportedModelError: padding, a divisor, or an adaptive pooling with uneven windows.
    """
    if len(shape) != 3:
        raise UnsupportedModelError(f"{label!r}: average pooling wants (channels, height, width), got {shape}")
    size = shape[1], shape[2]
    if kind == "mean":
        return size, size
    if kind == "adaptive_avg_pool":
        wanted = options["output_size"]
        out = tuple(
            full if target is None else int(target)
            for full, target in zip(size, wanted if isinstance(wanted, tuple | list) else (wanted, wanted), strict=True)
        )
        if any(full % target for full, target in zip(size, out, strict=True)):
            raise UnsupportedModelError(
                f"{label!r}: adaptive pooling of {size} to {out} has windows of different sizes; choose an output size "
                "that divides the input's"
            )
        kernel = size[0] // out[0], size[1] // out[1]
        return kernel, kernel
    kernel = pair(options["kernel_size"])
    stride = options.get("stride")
    if any(pair(options.get("padding", 0))) or options.get("divisor_override"):
        raise UnsupportedModelError(
            f"{label!r}: average pooling with padding or divisor_override does not lower; pool without padding"
        )
    return kernel, kernel if stride is None or stride == [] else pair(stride)
