"""Which float operators are compiled together: islands."""

from __future__ import annotations

from lightning_baqe.integer import nodes as ir
from lightning_baqe.integer.float_operators import FloatOperator
from lightning_baqe.integer.graph import IntegerGraph

Island = tuple[FloatOperator, ...]


def find_islands(graph: IntegerGraph) -> tuple[list[ir.Node], dict[str, Island]]:
    """Group operators that read each other.

    Every node has a phase: of an operator the latest phase of its inputs, of any other node one more where it reads an
    operator. Connected operators of one phase are an island, for whatever leads from one operator to another through
    other nodes raises the phase: no island waits for itself.

    Returns:
        the nodes, each after all that its island reads, and ``{an island's last operator: its operators in order}``.
    """
    phases: dict[str, int] = {}
    leaders: dict[str, str] = {}
    operators = {node.name: node for node in graph if isinstance(node, FloatOperator)}

    def leader(name: str) -> str:
        while leaders[name] != name:
            name = leaders[name]
        return name

    for node in graph:
        later = 0 if node.name in operators else 1
        phases[node.name] = max((phases[name] + later * (name in operators) for name in node.inputs), default=0)
        if node.name in operators:
            leaders[node.name] = node.name
            for name in node.inputs:
                if name in operators and phases[name] == phases[node.name]:
                    leaders[leader(name)] = leader(node.name)
    order = sorted(graph, key=lambda node: (phases[node.name], node.name in operators))  # stable
    groups: dict[str, list[FloatOperator]] = {}
    for node in order:
        if node.name in operators:
            groups.setdefault(leader(node.name), []).append(operators[node.name])
    return order, {group[-1].name: tuple(group) for group in groups.values()}


def results(graph: IntegerGraph, island: Island) -> list[str]:
    """The operators of an island whose values are read outside of it, or are the network's output."""
    inside = {node.name for node in island}
    read = {name for node in graph if node.name not in inside for name in node.inputs} | {graph.output.name}
    return [node.name for node in island if node.name in read]
