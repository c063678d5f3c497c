"""The exactness gate: every integer node of an artifact against the interpreter, given the artifact's own inputs."""

from __future__ import annotations

import torch

from lightning_baqe.deploy.artifact import Artifact
from lightning_baqe.integer import nodes as ir
from lightning_baqe.integer.graph import evaluate


def verify(artifact: Artifact, x: torch.Tensor) -> dict[str, int]:
    """Count wrong elements node by node.

    Each integer node is computed again by the interpreter from the values that the compiled module itself produced, so
    that one wrong kernel shows at its own node only, and float layers before it do not matter.

    Args:
        artifact: what was compiled.
        x: float images, shape ``(n, *input_shape)``.

    Returns:
        ``{integer node: elements that differ}``; all 0 in a correct artifact. A residual sum inside a convolution's
        kernel is checked with it, and both names stand.
    """
    values = artifact.run_all(x)
    by_name = {node.name: node for node in artifact.graph}
    computed_in = {name: by_name[call.result] for call in artifact.plan.calls for name in call.nodes[:-1]}
    differing = {}
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
    :meth:`~lightning_baqe.deploy.artifact.Artifact.run_all`.
    """
    want = evaluate(node, [_input(name, artifact, values, x) for name in node.inputs], x)
    name = node.name if node.name in values else f"{node.name}.output"
    if name not in values:  # a flatten that shares its input's buffer
        assert isinstance(node, ir.Flatten)
        return want, want
    return values[name].reshape(want.shape), want


def _input(name: str, artifact: Artifact, values: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    if name in values:
        return values[name]
    node = artifact.graph[name]
    # A flatten has no kernel, and a convolution may live in its residual sum's: take them from their own inputs.
    return evaluate(node, [_input(source, artifact, values, x) for source in node.inputs], x)
