"""Shapes and Python values inside a traced graph, and torch's window arguments in one form."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from lightning_baqe.errors import UnsupportedModelError

_BATCH = 2  # a batch size that was fixed somewhere (view(1, -1)) shows as a wrong first dimension


class _Recorder(fx.Interpreter):
    def __init__(self, model: fx.GraphModule, keep: Collection[fx.Node]) -> None:
        super().__init__(model)
        self.keep = keep
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        if isinstance(out, torch.Tensor):
            self.shapes[n] = tuple(out.shape)
        if n in self.keep or not isinstance(out, torch.Tensor | tuple | list) or _is_plain(out):
            self.values[n] = out
        return out


def _is_plain(out: Any) -> bool:
    """Whether a tuple or list holds no tensor: a shape."""
    return isinstance(out, tuple | list) and not any(isinstance(part, torch.Tensor) for part in out)


class GraphValues:
    """What each node of a graph evaluates to for an input of a given shape.

    Args:
        model: in eval mode.
        shape: of the input, without the batch dimension.
        constants: nodes that are constants of the network; their values are kept.

    Raises:
        UnsupportedModelError: the network does not run on that shape.
    """

    def __init__(self, model: fx.GraphModule, shape: tuple[int, ...], constants: Collection[fx.Node] = ()) -> None:
        parameter = next(model.parameters(), None)
        dtype = torch.float32 if parameter is None else parameter.dtype
        recorder = _Recorder(model, constants)
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

    def value(self, node: fx.Node) -> Any:
        """What a node of numbers, or a constant, evaluates to; of a tensor, zeros of its shape."""
        return self._values[node] if node in self._values else torch.zeros(self._shapes[node])

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


@dataclass(frozen=True, eq=False)
class Windows:
    """The windows of a pooling and what each sum is divided by.

    Args:
        rows, columns: int64, ``(out, 2)``: first and one past the last of each window, within the image.
        divisors: float64, shape ``()``, or ``(out_height * out_width,)`` where they differ.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    divisors: torch.Tensor


def pool_windows(kind: str, options: Mapping[str, Any], shape: tuple[int, ...], label: str) -> Windows:
    """Windows of an average pooling, as torch has them.

    Args:
        kind: ``"avg_pool"``, ``"adaptive_avg_pool"`` or ``"mean"`` (over height and width).
        options: by torch's names.
        shape: of the input, ``(channels, height, width)``.

    Raises:
        UnsupportedModelError: the input is no image, or a window lies in the padding alone.
    """
    if len(shape) != 3:
        raise UnsupportedModelError(f"{label!r}: average pooling wants (channels, height, width), got {shape}")
    if kind == "mean":
        return _windows([(0, shape[1])], [(0, shape[2])], [shape[1]], [shape[2]])
    if kind == "adaptive_avg_pool":
        wanted = options["output_size"]
        sizes = wanted if isinstance(wanted, tuple | list) else (wanted, wanted)
        rows, columns = (
            adaptive_windows(full, full if size is None else int(size))
            for full, size in zip(shape[1:], sizes, strict=True)
        )
        return _windows(rows, columns, [b - a for a, b in rows], [b - a for a, b in columns])
    kernel = pair(options["kernel_size"])
    stride = options.get("stride")
    step = kernel if stride is None or stride == [] else pair(stride)
    padding = pair(options.get("padding", 0))
    ceil_mode, override = bool(options.get("ceil_mode", False)), options.get("divisor_override")
    bounds: list[list[tuple[int, int]]] = []
    counts: list[list[int]] = []
    for size, k, s, p in zip(shape[1:], kernel, step, padding, strict=True):
        out = (size + 2 * p - k + (s - 1 if ceil_mode else 0)) // s + 1
        if ceil_mode and (out - 1) * s >= size + p:
            out -= 1  # torch: a window starts within the image or its first padding
        padded = [(i * s - p, min(i * s - p + k, size + p)) for i in range(out)]
        inside = [(max(a, 0), min(b, size)) for a, b in padded]
        if any(a >= b for a, b in inside):
            raise UnsupportedModelError(f"{label!r}: a pooling window lies in the padding alone; pad less")
        bounds.append(inside)
        counts.append([b - a for a, b in (padded if options.get("count_include_pad", True) else inside)])
    found = _windows(bounds[0], bounds[1], counts[0], counts[1])
    return found if not override else Windows(found.rows, found.columns, torch.tensor(float(override)).double())


def adaptive_windows(size: int, out: int) -> list[tuple[int, int]]:
    """torch's adaptive pooling along one dimension: window i is ``floor(i size / out) .. ceil((i + 1) size / out)``."""
    return [(i * size // out, -(-(i + 1) * size // out)) for i in range(out)]


def _windows(
    rows: list[tuple[int, int]], columns: list[tuple[int, int]], heights: list[int], widths: list[int]
) -> Windows:
    divisors = torch.outer(torch.tensor(heights, dtype=torch.float64), torch.tensor(widths, dtype=torch.float64))
    same = bool((divisors == divisors[0, 0]).all())
    return Windows(torch.tensor(rows), torch.tensor(columns), divisors[0, 0] if same else divisors.flatten())
