"""Small random graphs of all integer operators, drawn with hypothesis."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from hypothesis import strategies as st
from small_graphs import INT8, UINT8, WIDE, Maker

from lightning_baqe.integer import nodes as ir

LIMITS = (UINT8, INT8, WIDE, (0, 3), (0, 90), (-5, 300))
INTEGER_NODES = (
    ir.Conv, ir.Linear, ir.Add, ir.Mul, ir.Affine, ir.Table, ir.Requantize, ir.Clip, ir.MaxPool, ir.AvgPool, ir.Concat,
    ir.Gather, ir.Flatten, ir.Literal, ir.Move, ir.PRelu, ir.MaxWindows,
)  # fmt: skip
LARGEST = 60  # channels


def draw_graph(data: st.DataObject) -> Maker:
    """Some operators one after the other, each reading any earlier values that suit it; of an image or a vector."""
    is_vector = data.draw(st.integers(0, 4)) == 4
    size = None if is_vector else (data.draw(st.integers(4, 9)), data.draw(st.integers(4, 9)))
    zero_point = data.draw(st.integers(0, 3))
    maker = Maker(
        data.draw(st.integers(1, 20)), size, data.draw(st.integers(2, 8)), zero_point, data.draw(st.integers(0, 99))
    )
    graph = _Drawn(maker, data)
    for operator in data.draw(st.permutations(_OPERATORS))[: data.draw(st.integers(5, 11))]:
        operator(graph)
    return maker


class _Drawn:
    def __init__(self, maker: Maker, data: st.DataObject) -> None:
        self.maker, self.data = maker, data

    def number(self, low: int, high: int) -> int:
        return self.data.draw(st.integers(low, high))

    def limits(self) -> tuple[int, int]:
        return self.data.draw(st.sampled_from(LIMITS))

    def value(self, suits: Callable[[ir.TensorType], bool] = lambda kind: True) -> str | None:
        """A value of a suitable type, rather a late one; None if there is none."""
        names = [node.name for node in self.maker.nodes if node.type.is_integer and suits(node.type)]
        return self.data.draw(st.sampled_from(names[::-1])) if names else None

    def kind(self, name: str) -> ir.TensorType:
        return self.maker[name].type


def _is_image(kind: ir.TensorType) -> bool:
    return len(kind.shape) == 3 and kind.shape[0] <= LARGEST


def _is_bytes(kind: ir.TensorType) -> bool:
    return kind.low is not None and kind.high is not None and kind.low >= 0 and kind.high <= 255


def _is_joint(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether operands of these shapes go together."""
    return len(one) == len(other) and all(1 in pair or pair[0] == pair[1] for pair in zip(one, other, strict=True))


def _is_narrow(kind: ir.TensorType) -> bool:
    """No accumulators: 20 bits at most."""
    return kind.low is not None and kind.high is not None and kind.high - kind.low < 2**20


def _conv(graph: _Drawn) -> None:
    name = graph.value(lambda kind: _is_image(kind) and _is_bytes(kind))
    if name is None:
        return
    channels, *sizes = graph.kind(name).shape
    groups = graph.data.draw(st.sampled_from([n for n in range(1, channels + 1) if channels % n == 0]))
    depthwise = graph.data.draw(st.booleans())
    out = channels if depthwise and groups == channels else groups * graph.number(1, max(1, 40 // groups))
    kernel = graph.number(1, 4), graph.number(1, 4)
    dilation = graph.number(1, 3), graph.number(1, 3)
    padding = []
    for size, taps, step in zip(sizes, kernel, dilation, strict=True):
        before, reach = graph.number(0, 3), step * (taps - 1) + 1
        padding += [before, max(graph.number(0, 3), reach - size - before)]
    kind = graph.kind(name)
    graph.maker.conv(
        name,
        out=out,
        kernel=kernel,
        stride=(graph.number(1, 3), graph.number(1, 3)),
        padding=(padding[0], padding[1], padding[2], padding[3]),
        dilation=dilation,
        groups=groups,
        weight_bits=graph.number(2, 8),
        limits=graph.data.draw(st.sampled_from([UINT8, *LIMITS, None])),
        pad_value=graph.data.draw(st.sampled_from([None, kind.low, kind.high])),
    )


def _flatten(graph: _Drawn) -> None:
    name = graph.value(lambda kind: len(kind.shape) == 1 or kind.shape[0] * kind.shape[1] * kind.shape[2] <= 2000)
    if name is not None:
        graph.maker.flatten(name)


def _linear(graph: _Drawn) -> None:
    name = graph.value(lambda kind: len(kind.shape) == 1 and _is_bytes(kind))
    if name is None:
        image = graph.value(lambda kind: _is_image(kind) and _is_bytes(kind))
        assert image is not None
        name = graph.maker.flatten(image)
    limits = graph.data.draw(st.sampled_from([*LIMITS, None]))
    graph.maker.linear(name, graph.number(1, 40), limits, graph.number(2, 8))


def _add(graph: _Drawn) -> None:
    a = graph.value()
    assert a is not None
    b = graph.value(lambda kind: _is_joint(kind.shape, graph.kind(a).shape))
    assert b is not None
    graph.maker.add(a, b, graph.limits(), 2 ** graph.number(4, 26))


def _mul(graph: _Drawn) -> None:
    a = graph.value(_is_bytes)
    assert a is not None
    b = graph.value(lambda kind: _is_bytes(kind) and _is_joint(kind.shape, graph.kind(a).shape))
    assert b is not None
    graph.maker.mul(a, b, graph.limits())


def _literal(graph: _Drawn) -> None:
    like = graph.value(lambda kind: kind.shape[0] <= LARGEST)
    if like is not None:
        shape = graph.kind(like).shape
        one = graph.data.draw(st.sampled_from([(), (), (0,), (1, 2), (0, 1, 2)]))
        graph.maker.literal(tuple(1 if dim in one else size for dim, size in enumerate(shape)), graph.limits())


def _move(graph: _Drawn) -> None:
    name = graph.value(lambda kind: math.prod(kind.shape) <= 3000)
    if name is None:
        return
    shape = graph.kind(name).shape
    index = torch.arange(math.prod(shape)).reshape(shape)
    how = graph.data.draw(st.sampled_from(["permuted", "shaped", "any"]))
    if how == "permuted":
        index = index.permute(*graph.data.draw(st.permutations(range(len(shape)))))
    elif how == "shaped":
        outer = graph.data.draw(st.sampled_from([n for n in range(1, 9) if index.numel() % n == 0]))
        index = index.reshape(index.numel() // outer, outer, 1)
    else:
        new = (graph.number(1, LARGEST), *[graph.number(1, 6) for _ in range(graph.data.draw(st.sampled_from([0, 2])))])
        index = graph.maker.integers(-1, index.numel() - 1, *new)
    if index.shape[0] <= 4 * LARGEST:
        graph.maker.move(name, index)


def _prelu(graph: _Drawn) -> None:
    name = graph.value()
    assert name is not None
    by_channel = graph.data.draw(st.booleans()), graph.data.draw(st.booleans())
    graph.maker.prelu(name, graph.limits(), by_channel, graph.data.draw(st.sampled_from([1e-4, 1.0, 900.0])))


def _affine(graph: _Drawn) -> None:
    name = graph.value(_is_narrow)
    assert name is not None
    graph.maker.affine(name, graph.limits())


def _table(graph: _Drawn) -> None:
    name = graph.value(lambda kind: _is_narrow(kind) and (kind.high or 0) - (kind.low or 0) <= 2**17)
    assert name is not None
    graph.maker.table(name, graph.limits())


def _requantize(graph: _Drawn) -> None:
    name = graph.value()
    assert name is not None
    graph.maker.requantize(name, graph.limits(), graph.data.draw(st.sampled_from([1e-5, 0.01, -0.7, 1.0, 900.0])))


def _clip(graph: _Drawn) -> None:
    name = graph.value()
    assert name is not None
    low, high = graph.kind(name).low, graph.kind(name).high
    assert low is not None
    assert high is not None
    graph.maker.clip(name, (max(low, -graph.number(0, 50)), min(high, graph.number(50, 300))))


def _max_pool(graph: _Drawn) -> None:
    name = graph.value(lambda kind: _is_image(kind) and min(kind.shape[1:]) >= 4)
    if name is not None:
        kernel, dilation = (graph.number(1, 3), graph.number(1, 3)), (graph.number(1, 2), 1)
        reach = [min(k // 2, 1) for k in kernel]
        padding = graph.number(0, reach[0] if dilation[0] == 1 else 0), graph.number(0, reach[1])
        if (kernel[0] - 1) * dilation[0] < graph.kind(name).shape[1]:
            stride = graph.number(1, 3), graph.number(1, 3)
            graph.maker.max_pool(name, kernel, stride, padding, graph.data.draw(st.booleans()), dilation)


def _any_windows(graph: _Drawn, sizes: Sequence[int]) -> list[list[tuple[int, int]]]:
    bounds = []
    for size in sizes:
        firsts = graph.data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=5))
        bounds.append([(first, graph.number(first + 1, size)) for first in firsts])
    return bounds


def _max_windows(graph: _Drawn) -> None:
    name = graph.value(_is_image)
    if name is not None:
        graph.maker.max_windows(name, *_any_windows(graph, graph.kind(name).shape[1:]))


def _avg_pool(graph: _Drawn) -> None:
    name = graph.value(lambda kind: _is_image(kind) and _is_narrow(kind))
    if name is None:
        return
    height, width = graph.kind(name).shape[1:]
    if graph.data.draw(st.booleans()):
        graph.maker.avg_pool(name, graph.number(1, min(height, width)), graph.number(1, 3), graph.limits())
        return
    bounds = _any_windows(graph, (height, width))
    graph.maker.avg_windows(name, bounds[0], bounds[1], graph.limits(), graph.data.draw(st.booleans()))


def _concat(graph: _Drawn) -> None:
    first = graph.value(lambda kind: kind.shape[0] <= LARGEST)
    if first is not None:
        names = [first]
        for _ in range(graph.number(0, 3)):
            other = graph.value(lambda kind: kind.shape[0] <= LARGEST and kind.shape[1:] == graph.kind(first).shape[1:])
            assert other is not None
            names.append(other)
        graph.maker.concat(*names)


def _gather(graph: _Drawn) -> None:
    name = graph.value()
    assert name is not None
    indices: list[list[int] | None] = []
    for dim, size in enumerate(graph.kind(name).shape):
        how = graph.data.draw(st.sampled_from(["all", "run", "any"]))
        if how == "run":
            first = graph.number(0, size - 1)
            indices.append(list(range(first, graph.number(first + 1, size))))
        elif how == "any":
            longest = LARGEST if dim == 0 else 9
            indices.append(graph.data.draw(st.lists(st.integers(-1, size - 1), min_size=1, max_size=longest)))
        else:
            indices.append(None)
    graph.maker.gather(name, *indices)


_OPERATORS = (
    _conv, _conv, _conv, _linear, _add, _mul, _affine, _table, _requantize, _clip, _max_pool, _avg_pool, _concat,
    _gather, _flatten, _literal, _move, _prelu, _max_windows,
)  # fmt: skip
