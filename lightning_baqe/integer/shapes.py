"""Shapes and Python values inside a traced graph, and torch's window arguments in one form."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from lightning_baqe.errors import UnsupportedModelError
from lightning_baqe.integer.movement import of_one
from lightning_baqe.quantization.aten import origin

_BATCH = 2  # a batch size that was fixed somewhere (view(1, -1)) shows as a wrong first dimension


class GraphValues(fx.Interpreter):
    """What each node of a graph evaluates to for an input of a given shape: ``values``.

    Of a tensor that is no constant only the shape is kept, as zeros without memory.

    Args:
        model: in eval mode.
        shapes: of the inputs, without the batch dimension.
        constants: nodes that are constants of the network.
        batch: how many images.

    Raises:
        UnsupportedModelError: the network does not run on that shape.
    """

    def __init__(
        self,
        model: fx.GraphModule,
        shapes: Sequence[tuple[int, ...]],
        constants: Collection[fx.Node] = (),
        batch: int = _BATCH,
    ) -> None:
        super().__init__(model)
        self._constants = constants
        self.values: dict[fx.Node, Any] = {}
        parameter = next(model.parameters(), None)
        dtype = torch.float32 if parameter is None else parameter.dtype
        inputs = [getattr(torch, origin(node).dtype) for node in model.graph.find_nodes(op="placeholder")]
        dtypes = [dtype if given.is_floating_point else given for given in inputs]
        try:
            with torch.no_grad():
                self.run(*(torch.zeros(batch, *shape, dtype=kind) for shape, kind in zip(shapes, dtypes, strict=True)))
        except (RuntimeError, ValueError) as error:
            raise UnsupportedModelError(
                f"the network does not run on batches of {_BATCH} inputs of shapes {list(shapes)}: {error}; give the "
                "shape it was made for, and let no operator fix the batch size"
            ) from error

    def run_node(self, n: fx.Node) -> Any:
        """As the base class, and keep what the node evaluates to."""
        out = super().run_node(n)
        is_activation = isinstance(out, torch.Tensor) and n not in self._constants
        self.values[n] = torch.zeros(()).expand(out.shape) if is_activation else out
        return out

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Shape of a tensor without the batch dimension."""
        shape = tuple(self.values[node].shape)
        if not shape or shape[0] % _BATCH:
            raise UnsupportedModelError(
                "the batch must stay the outermost dimension of tensors, but for a batch of "
                f"{_BATCH} its output is {shape}: move it there"
            )
        return of_one(shape)

    def resolve(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options with the nodes in them replaced by what they evaluate to."""
        return {name: fx.node.map_arg(value, self.values.__getitem__) for name, value in options.items()}


def pair(value: Any) -> tuple[int, int]:
    """``n`` or ``(n,)`` as ``(n, n)``, ``(n, m)`` as it is."""
    if isinstance(value, int):
        return value, value
    numbers = tuple(int(v) for v in value)
    return (numbers[0], numbers[0]) if len(numbers) == 1 else (numbers[0], numbers[1])


def stride_of(options: Mapping[str, Any], kernel: tuple[int, int]) -> tuple[int, int]:
    """The stride of a pooling: by default the kernel's size."""
    stride = options.get("stride")
    return kernel if stride is None or stride == [] else pair(stride)


def as_image(options: Mapping[str, Any], is_signal: bool) -> dict[str, Any]:
    """A pooling's options; those of a signal of one dimension as those of an image of one row."""
    if not is_signal:
        return dict(options)
    alone = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1, "output_size": 1}
    found = dict(options)
    for key in alone.keys() & options.keys():
        value = options[key]
        numbers = [value] if isinstance(value, int) else list(value or ())
        found[key] = (alone[key], *numbers) if numbers else numbers
    return found


def adaptive_sizes(options: Mapping[str, Any], shape: Sequence[int]) -> list[int]:
    """Height and width of an adaptive pooling's output; None leaves a size as it is."""
    wanted = options["output_size"]
    sizes = wanted if isinstance(wanted, tuple | list) else (wanted, wanted)
    return [full if size is None else int(size) for full, size in zip(shape[1:], sizes, strict=True)]


def padding_of(layer: nn.Conv2d | nn.Conv1d) -> tuple[int, int, int, int]:
    """A convolution's padding as ``(top, bottom, left, right)``; ``"same"`` puts an odd one at the end, as torch."""
    spare = [0] * (2 - len(layer.kernel_size))  # of a signal, an image of one row
    if layer.padding == "valid":
        return 0, 0, 0, 0
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        (top, bottom), (left, right) = ((total // 2, total - total // 2) for total in (*spare, *totals))
        return top, bottom, left, right
    height, width = (*spare, *(int(size) for size in layer.padding))
    return height, height, width, width


def pool_windows(
    kind: str, options: Mapping[str, Any], shape: tuple[int, ...], label: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Windows of an average pooling, as torch has them, and what each sum is divided by.

    Args:
        kind: ``"avg_pool"`` or ``"adaptive_avg_pool"``.
        options: by torch's names.
        shape: of the input, ``(channels, height, width)``.

    Returns:
        rows, columns: int64, ``(out, 2)``: first and one past the last of each window, within the image.
        divisors: float64, shape ``()``, or ``(out_height * out_width,)`` where they differ.

    Raises:
        UnsupportedModelError: the input is no image, or a window lies in the padding alone.
    """
    if len(shape) != 3:
        raise UnsupportedModelError(f"{label!r}: average pooling wants (channels, height, width), got {shape}")
    if kind == "avg_pool":
        kernel, ceil_mode = pair(options["kernel_size"]), bool(options.get("ceil_mode", False))
        steps, padding = stride_of(options, kernel), pair(options.get("padding", 0))
        padded = [
            _strided_windows(*numbers, ceil_mode) for numbers in zip(shape[1:], kernel, steps, padding, strict=True)
        ]
    else:
        sizes = adaptive_sizes(options, shape)
        padded = [
            [(i * size // out, -(-(i + 1) * size // out)) for i in range(out)]
            for size, out in zip(shape[1:], sizes, strict=True)
        ]
    inside = [[(max(a, 0), min(b, size)) for a, b in windows] for windows, size in zip(padded, shape[1:], strict=True)]
    if any(a >= b for windows in inside for a, b in windows):
        raise UnsupportedModelError(f"{label!r}: a pooling window lies in the padding alone; pad less")
    counted = padded if options.get("count_include_pad", True) else inside
    heights, widths = (torch.tensor([b - a for a, b in windows], dtype=torch.float64) for windows in counted)
    divisors = torch.outer(heights, widths)
    if override := options.get("divisor_override"):
        divisors.fill_(override)
    same = bool((divisors == divisors[0, 0]).all())
    return torch.tensor(inside[0]), torch.tensor(inside[1]), divisors[0, 0] if same else divisors.flatten()


def _strided_windows(size: int, kernel: int, step: int, padding: int, ceil_mode: bool) -> list[tuple[int, int]]:
    """Windows along one dimension of an image and its padding."""
    out = (size + 2 * padding - kernel + (step - 1 if ceil_mode else 0)) // step + 1
    if ceil_mode and (out - 1) * step >= size + padding:
        out -= 1  # torch: a window starts within the image or its first padding
    return [(i * step - padding, min(i * step - padding + kernel, size + padding)) for i in range(out)]
