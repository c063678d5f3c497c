"""Small random graphs of all integer operators, drawn with hypothesis."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import strategies as st
from small_graphs import INT8, UINT8, WIDE, Maker

from lightning_baqe.integer import nodes as ir

LIMITS = (UINT8, INT8, WIDE, (0, 3), (0, 90), (-5, 300))
INTEGER_NODES = (
    ir.Conv, ir.Linear, ir.Add, ir.Mul, ir.Affine, ir.Table, ir.Requantize, ir.Clip, ir.MaxPool, ir.AvgPool, ir.Concat,
    ir.Gather, ir.Flatten,
)  # fmt: skip
LARGEST = 60  # channels


def draw_graph(data: st.DataObject) -> Maker:
    """Some operators one after the other, each reading any earlier values that suit it."""
    size = data.draw(st.integers(4, 9)), data.draw(st.integers(4, 9))
    zero_point = data.draw(st.integers(0, 3))
    maker = Maker(
        data.draw(st.integers(1, 20)), size, data.draw(st.integers(2, 8)), zero_point, data.draw(st.integers(0, 99))
    )
    graph = _Drawn(maker, data)
    for _ in range(data.draw(st.integers(4, 9))):
        data.draw(st.sampled_from(_OPERATORS))(graph)
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


def _is_narrow(kind: ir.TensorType) -> bool:
    """No accumulators: 20 bits at most."""
    return kind.low is not None and kind.high is not None and kind.high - kind.low < 2**20


def _conv(graph: _Drawn) -> None:
    name = graph.value(lambda kind: _is_image(kind) and _is_bytes(kind))
    assert name is not None  # the image itself
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
    b = graph.value(lambda kind: kind.shape == graph.kind(a).shape)
    assert b is not None
    graph.maker.add(a, b, graph.limits(), 2 ** graph.number(4, 26))


def _mul(graph: _Drawn) -> None:
    a = graph.value(_is_bytes)
    assert a is not None
    shape = graph.kind(a).shape
    b = graph.value(lambda kind: _is_bytes(kind) and kind.shape in (shape, (shape[0], 1, 1)))
    assert b is not None
    graph.maker.mul(a, b, graph.limits())


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


def _avg_pool(graph: _Drawn) -> None:
    name = graph.value(lambda kind: _is_image(kind) and _is_narrow(kind))
    assert name is not None
    height, width = graph.kind(name).shape[1:]
    if graph.data.draw(st.booleans()):
        graph.maker.avg_pool(name, graph.number(1, min(height, width)), graph.number(1, 3), graph.limits())
        return
    bounds = []
    for size in (height, width):
        firsts = graph.data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=5))
        bounds.append([(first, graph.number(first + 1, size)) for first in firsts])
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
    _gather, _flatten,
)  # fmt: skip
