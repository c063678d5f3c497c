"""The exactness gate: every integer node of an artifact against the interpreter, given the artifact's own inputs."""

from __future__ import annotations

import torch

from lightning_baqe.deploy.artifact import Artifact
from lightning_baqe.integer import nodes as ir

FLOAT_TOLERANCE = 1e-5  # two float convolutions never agree to the last bit; more than this is a wrong kernel


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
    fused = {name: call.result for call in artifact.plan.calls for name in call.nodes[:-1]}
    differing: dict[str, int] = {}
    for node in artifact.graph:
        if isinstance(node, ir.Input) or node.is_float:
            continue
        found = _computed(node, artifact, values, x, fused)
        if found is None:  # computed inside its reader's kernel
            continue
        got, want = found
        wrong = int((got != want).sum())
        differing[node.name] = wrong
        for inside, result in fused.items():
            if result == node.name:
                differing[inside] = wrong
    return {node.name: differing[node.name] for node in artifact.graph if node.name in differing}


def float_errors(artifact: Artifact, x: torch.Tensor) -> dict[str, float]:
    """Largest error of every float node relative to its largest value, given the artifact's own inputs."""
    values = artifact.run_all(x)
    errors: dict[str, float] = {}
    for node in artifact.graph:
        if node.is_float:
            found = _computed(node, artifact, values, x, {})
            if found is not None:
                got, want = found
                errors[node.name] = float((got - want).abs().max() / want.abs().max().clamp(min=1e-30))
    return errors


def _computed(
    node: ir.Node, artifact: Artifact, values: dict[str, torch.Tensor], x: torch.Tensor, fused: dict[str, str]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """A node's value in the module, and the interpreter's from the module's inputs to it."""
    if node.name in fused:
        return None
    inputs = [_input(name, artifact, values, x) for name in node.inputs]
    want = node.run(*inputs)
    name = node.name if node.name in values else f"{node.name}.output"
    if name not in values:  # a flatten that shares its input's buffer
        assert isinstance(node, ir.Flatten)
        return want, want
    return values[name].reshape(want.shape), want


def _input(name: str, artifact: Artifact, values: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    if name in values:
        return values[name]
    node = artifact.graph[name]
    if isinstance(node, ir.Input):
        return node.run(x)
    # A flatten has no kernel, and a convolution may live in its residual sum's: take them from their own inputs.
    return node.run(*(_input(source, artifact, values, x) for source in node.inputs))
