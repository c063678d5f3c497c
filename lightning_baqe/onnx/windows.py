"""Pooling windows and selections of elements as standard ONNX operators, on real values."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lightning_baqe.integer.nodes import MaxPool
from lightning_baqe.onnx.writer import Writer

LOWEST = float(np.finfo(np.float32).min)
EVEN = 1e-5  # relative: on 255 steps far less than one


@dataclass(frozen=True)
class Stride:
    """Regular windows along one dimension: window i begins at ``i * step - before`` and is ``kernel`` long. ``after``
    is the padding after the image that the last window needs.
    """

    kernel: int
    step: int
    before: int
    after: int

    def windows(self, size: int, count: int) -> list[tuple[int, int]]:
        """The windows, cut at the ends of the image."""
        begins = [i * self.step - self.before for i in range(count)]
        return [(max(begin, 0), min(begin + self.kernel, size)) for begin in begins]


def regular(windows: Sequence[tuple[int, int]], size: int) -> Stride | None:
    """Kernel, stride and padding of windows, ``(first, one past the last)`` within ``0..size``, that are cut at the
    image's ends; None if no operator has them.
    """
    for candidate in _candidates(windows, size):
        outputs = (size + candidate.before + candidate.after - candidate.kernel) // candidate.step + 1
        fits = 0 <= candidate.before < candidate.kernel and candidate.after < candidate.kernel
        if fits and outputs == len(windows) and candidate.windows(size, len(windows)) == list(windows):
            return candidate
    return None


def _candidates(windows: Sequence[tuple[int, int]], size: int) -> Iterator[Stride]:
    """All that the windows' first and last elements allow; where the padding hides what is what, several."""
    last = len(windows) - 1
    steps = {b - a for (a, _), (b, _) in itertools.pairwise(windows) if 0 < a < b} or range(1, size + 1)
    for step in steps:
        first = windows[-1][0]
        for before in [step * last - first] if first > 0 else range(step * last, step * last + size):
            inside = [end + before - step * i for i, (_, end) in enumerate(windows) if end < size]
            kernel = inside[0] if inside else size + before
            yield Stride(kernel, step, before, max(step * last + kernel - size - before, 0))


def average_pool(
    writer: Writer,
    x: str,
    wish: str,
    shape: Sequence[int],
    rows: torch.Tensor,
    columns: torch.Tensor,
    factors: np.ndarray,
    count_padding: bool = True,
) -> str:
    """``sum * factor`` over windows.

    Where the factor is one over the window's size, or over the kernel's with the padding counted, it is one
    (Global)AveragePool. Other factors are a product after it. Windows that no kernel and stride make (an adaptive
    pooling to a size that does not divide the image's) are slices and their means, first of rows, then of columns.

    Args:
        x: name of ``(n, channels, height, width)``.
        shape: of x without n.
        rows, columns: as in :class:`lightning_baqe.integer.nodes.AvgPool`.
        factors: float64, ``()`` or ``(out_height * out_width,)``.
        count_padding: False makes even counted padding a product.
    """
    spans = [[(int(a), int(b)) for a, b in windows.tolist()] for windows in (rows, columns)]
    lengths = [np.array([b - a for a, b in windows], np.float64) for windows in spans]
    factors = np.broadcast_to(factors.reshape(-1), (len(spans[0]) * len(spans[1]),)).reshape(len(spans[0]), -1)
    ratio = factors * np.outer(*lengths)
    if all(windows == [(0, size)] for windows, size in zip(spans, shape[1:], strict=True)):
        return _times(writer, writer.node("GlobalAveragePool", [x], f"{wish}.mean"), ratio, wish)
    found = (regular(windows, size) for windows, size in zip(spans, shape[1:], strict=True))
    strides = [stride for stride in found if stride is not None]
    if len(strides) < 2:
        by_row = _reduced(writer, "ReduceMean", x, spans[0], 2, f"{wish}.rows")
        return _times(writer, _reduced(writer, "ReduceMean", by_row, spans[1], 3, f"{wish}.columns"), ratio, wish)
    kernel, pads = [s.kernel for s in strides], [*(s.before for s in strides), *(s.after for s in strides)]
    whole = factors * math.prod(kernel)
    counted = count_padding and any(pads) and not _is_one(ratio) and _is_one(whole)
    pooled = writer.node(
        "AveragePool", [x], f"{wish}.mean",
        kernel_shape=kernel, strides=[s.step for s in strides], pads=pads, count_include_pad=int(counted),
    )  # fmt: skip
    return _times(writer, pooled, whole if counted else ratio, wish)


def _is_one(values: np.ndarray) -> bool:
    return bool((np.abs(values - 1) < EVEN).all())


def _times(writer: Writer, x: str, factors: np.ndarray, wish: str) -> str:
    """The product with factors ``(height, width)``, left out where they are 1."""
    if _is_one(factors):
        return x
    same = bool(np.ptp(factors) <= EVEN * np.abs(factors).max())
    numbers = np.array(factors.flat[0] if same else factors[None, None], np.float32)
    return writer.node("Mul", [x, writer.constant(f"{wish}.factors", numbers)], f"{wish}.scaled")


def max_windows(
    writer: Writer, x: str, wish: str, shape: Sequence[int], rows: torch.Tensor, columns: torch.Tensor
) -> str:
    """The largest of each window: one MaxPool where kernel, stride and padding make the windows, else slices and their
    largest. Arguments as for :func:`average_pool`.
    """
    spans = [[(int(a), int(b)) for a, b in windows.tolist()] for windows in (rows, columns)]
    found = (regular(windows, size) for windows, size in zip(spans, shape[1:], strict=True))
    strides = [stride for stride in found if stride is not None]
    if len(strides) < 2:
        by_row = _reduced(writer, "ReduceMax", x, spans[0], 2, f"{wish}.rows")
        return _reduced(writer, "ReduceMax", by_row, spans[1], 3, f"{wish}.columns")
    return writer.node(
        "MaxPool", [x], f"{wish}.max",
        kernel_shape=[s.kernel for s in strides], strides=[s.step for s in strides],
        pads=[*(s.before for s in strides), *(s.after for s in strides)],
    )  # fmt: skip


def _reduced(writer: Writer, op: str, x: str, windows: Sequence[tuple[int, int]], axis: int, wish: str) -> str:
    """Each window along one axis as one element."""
    axes, parts = writer.shape("axis", [axis]), []
    for first, end in windows:
        bounds = [writer.shape("index", [index]) for index in (first, end)]
        part = writer.node("Slice", [x, *bounds, axes], f"{wish}.slice")
        parts.append(writer.node(op, [part, axes], f"{wish}.part", keepdims=1))
    return writer.node("Concat", parts, wish, axis=axis) if len(parts) > 1 else parts[0]


def max_pool(writer: Writer, x: str, wish: str, node: MaxPool, shape: Sequence[int]) -> str:
    """A max pooling; ``shape`` is that of x without n. What ``ceil_mode`` adds is padding after the image, since
    engines differ in that mode.
    """
    before, after = list(node.padding), []
    for size, out, kernel, stride, padding, dilation in zip(
        shape[1:], node.type.shape[1:], node.kernel, node.stride, node.padding, node.dilation, strict=True
    ):
        after.append(max((out - 1) * stride + dilation * (kernel - 1) + 1 - size - padding, 0))
    if any(pad >= kernel for pad, kernel in zip([*before, *after], node.kernel * 2, strict=True)):
        # Operators refuse padding of a whole kernel, which a dilated window can reach.
        pads = writer.shape(f"{wish}.pads", [0, 0, *before, 0, 0, *after])
        x = writer.node("Pad", [x, pads, writer.scalar("lowest", LOWEST)], f"{wish}.padded")
        before, after = [0, 0], [0, 0]
    return writer.node(
        "MaxPool", [x], f"{wish}.max",
        kernel_shape=node.kernel, strides=node.stride, dilations=node.dilation, pads=[*before, *after],
    )  # fmt: skip


def select(writer: Writer, x: str, wish: str, indices: Sequence[torch.Tensor | None], shape: Sequence[int]) -> str:
    """Selected elements along each dimension, 0 where an index is -1.

    Even steps are one Slice, zeros before and after one Pad, whole repetitions one Resize, all else a Gather by
    dimension (with zeros in between, times 0 or 1).

    ``indices`` are as in :class:`lightning_baqe.integer.nodes.Gather`, ``shape`` is that of x without n.
    """
    wanted = {axis: index.tolist() for axis, index in enumerate(indices, 1) if index is not None}
    pads = {axis: _outer(index) for axis, index in wanted.items()}
    inner = {axis: index[pads[axis][0] : len(index) - pads[axis][1]] for axis, index in wanted.items()}
    slices = {axis: span for axis, index in inner.items() if (span := _slice(index, shape[axis - 1])) is not None}
    repeats = {axis: len(index) // shape[axis - 1] for axis, index in inner.items() if axis not in slices}
    repeats = {
        axis: times
        for axis, times in repeats.items()
        if axis > 1 and times > 1 and inner[axis] == [i for i in range(shape[axis - 1]) for _ in range(times)]
    }
    moved = {axis: span for axis, span in slices.items() if span != (0, shape[axis - 1], 1)}
    if moved:
        spans = [writer.shape("index", column) for column in zip(*moved.values(), strict=True)]
        parts = [x, spans[0], spans[1], writer.shape("axes", list(moved)), spans[2]]
        x = writer.node("Slice", parts, f"{wish}.slice")
    if repeats:
        scales = np.array([repeats.get(axis, 1) for axis in range(len(shape) + 1)], np.float32)
        x = writer.node(
            "Resize", [x, "", writer.constant(f"{wish}.scales", scales)], f"{wish}.resize",
            mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor",
        )  # fmt: skip
    present = np.ones(1, np.float32)
    for axis, index in inner.items():
        if axis not in slices and axis not in repeats:
            places = writer.shape(f"{wish}.index", [max(i, 0) for i in index])
            x = writer.node("Gather", [x, places], f"{wish}.gather", axis=axis)
            present = present * (np.array(index) >= 0).astype(np.float32).reshape(-1, *[1] * (len(shape) - axis))
    if not present.all():  # in the end: OpenVINO 2026.4 crashes on a Gather after it, as on one from a padded tensor
        x = writer.node("Mul", [x, writer.constant(f"{wish}.present", present)], f"{wish}.zeros")
    sides = [[pads.get(axis, (0, 0))[side] for axis in range(len(shape) + 1)] for side in (0, 1)]
    if not any(sides[0] + sides[1]):
        return x
    return writer.node("Pad", [x, writer.shape(f"{wish}.pads", sides[0] + sides[1])], f"{wish}.pad")


def rearrange(writer: Writer, x: str, wish: str, index: torch.Tensor, shape: Sequence[int]) -> str:
    """Elements in any other order and shape: a Reshape or a Transpose where it is one, else a Gather of all elements.

    ``index`` is as in :class:`lightning_baqe.integer.nodes.Move`, ``shape`` is that of x without n.
    """
    count = math.prod(shape)
    numbers = torch.arange(count).reshape(tuple(shape))
    target = writer.shape(f"{wish}.shape", [0, *index.shape])
    if torch.equal(index.flatten(), numbers.flatten()):
        return writer.node("Reshape", [x, target], f"{wish}.shaped")
    for order in itertools.permutations(range(len(shape))):
        if torch.equal(index, numbers.permute(order)):
            return writer.node("Transpose", [x], f"{wish}.turned", perm=[0, *(axis + 1 for axis in order)])
    flat = writer.node("Reshape", [x, writer.shape(f"{wish}.flat_shape", [0, count])], f"{wish}.flat")
    places = writer.shape(f"{wish}.index", index.flatten().clamp(min=0).tolist())
    found = writer.node("Gather", [flat, places], f"{wish}.gather", axis=1)
    shaped = writer.node("Reshape", [found, target], f"{wish}.shaped")
    present = (index >= 0).to(torch.float32).numpy()
    if present.all():
        return shaped
    return writer.node("Mul", [shaped, writer.constant(f"{wish}.present", present)], f"{wish}.zeros")


def _outer(index: list[int]) -> tuple[int, int]:
    """How many zeros stand before and after all others; of zeros alone, one is left."""
    inside = [place for place, i in enumerate(index) if i >= 0] or [0]
    return inside[0], len(index) - 1 - inside[-1]


def _slice(index: list[int], size: int) -> tuple[int, int, int] | None:
    """``(start, end, step)`` of an index in even steps upwards, else None."""
    step = index[1] - index[0] if len(index) > 1 else 1
    if step < 1 or index[0] < 0 or index != list(range(index[0], index[-1] + 1, step)):
        return None
    return index[0], index[-1] + 1 if step > 1 or index[-1] + 1 < size else size, step
