"""The exactness gate: every integer node of an artifact, and its float operators within a tolerance, against the
interpreter, given the artifact's own inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_baqe.deploy.artifact import Artifact
from lightning_baqe.integer import nodes as ir
from lightning_baqe.integer.float_operators import FloatOperator
from lightning_baqe.integer.graph import as_images, evaluate

TOLERANCE = 1e-3  # of the largest value: many operators may follow each other in an island


def verify(artifact: Artifact, x: torch.Tensor | Sequence[torch.Tensor]) -> dict[str, int]:
    """Count wrong elements node by node.

    Each integer node is computed again by the interpreter from the values that the compiled module itself produced, so
    that one wrong kernel shows at its own node only, and float layers before it do not matter. No two float
    implementations agree to the last bit, so float layers are not checked here; but float operators, whose code TVM's
    translator makes, are: the results of each island within :data:`TOLERANCE`, given what the island read.

    Args:
        artifact: what was compiled.
        x: float images, shape ``(n, *input_shape)``, or a tuple for several inputs.

    Returns:
        ``{integer node or result of an island: elements that differ}``; all 0 in a correct artifact. A residual sum
        inside a convolution's kernel is checked with it, and both names stand.
    """
    x = as_images(x, artifact.graph, "artifact")
    values = artifact.run_all(x)
    by_name = {node.name: node for node in artifact.graph}
    computed_in = {name: by_name[call.result] for call in artifact.plan.calls for name in call.nodes[:-1]}
    differing = {}
    islands = [name for name in values if isinstance(by_name.get(name), FloatOperator)]
    for name in islands:
        got, want = recomputed(by_name[name], artifact, values, x)
        differing[name] = int((~torch.isclose(got, want, 0, TOLERANCE * float(want.abs().max()), True)).sum())
    for name, node in by_name.items():
        if not (isinstance(node, ir.Input) or node.is_float):
            got, want = recomputed(computed_in.get(name, node), artifact, values, x)
            differing[name] = int((got != want).sum())
    return differing


def recomputed(
    node: ir.Node, artifact: Artifact, values: dict[str, torch.Tensor], x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A node's value in the module, and the interpreter's from the module's inputs to it.

    The node has a kernel of its own, or is the last one in a kernel; ``values`` are of
    :meth:`~lightning_baqe.deploy.artifact.Artifact.run_all`; what has none there, and is computed here, is added.
    """
    want = evaluate(node, [_input(name, artifact, values, x) for name in node.inputs], x)
    name = node.name if node.name in values else f"{node.name}.output"
    if name not in values:  # a flatten that shares its input's buffer, or an operator inside an island
        assert isinstance(node, ir.Flatten | FloatOperator)
        return want, want
    return values[name].reshape(want.shape), want


def _input(name: str, artifact: Artifact, values: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    if name in values:
        return values[name]
    node = artifact.graph[name]
    # A flatten has no kernel, a convolution may live in its residual sum's, a float operator inside an island: take
    # them from their own inputs, once.
    values[name] = evaluate(node, [_input(source, artifact, values, x) for source in node.inputs], x)
    return values[name]
