"""Inputs of a network's layers, and gradients at them, at their outputs and at their weights, in one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_baqe.allocation.evidence import Evidence


@dataclass(frozen=True)
class LayerGradients:
    """By layer: its input ``(n, ...)``, and gradients of the mean loss, of the shapes of what they belong to."""

    inputs: dict[str, torch.Tensor]
    at_weight: dict[str, torch.Tensor]
    at_input: dict[str, torch.Tensor]
    at_output: dict[str, torch.Tensor]


def layer_gradients(evidence: Evidence, x: torch.Tensor, y: torch.Tensor) -> LayerGradients:
    """Of one batch, by one forward and one backward pass. The gradient at an input is that of this layer's reading.

    Raises:
        DataError: the loss is not finite.
    """
    paths, network = evidence.layerwise.paths, evidence.layerwise.network
    weights = {name: network.get_submodule(path).weight for name, path in paths.items()}
    with (
        torch.enable_grad(),
        watched_inputs(network, paths) as (inputs, at_inputs),
        _watched_outputs(network, paths) as at_outputs,
    ):
        loss = evidence.loss(network(x), y)
        kinds: tuple[Mapping[str, Any], ...] = (weights, at_inputs, at_outputs)
        wanted = [tensor for kind in kinds for tensor in kind.values()]
        found = iter(torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True))
    at_weight, at_input, at_output = ({name: next(found).detach() for name in kind} for kind in kinds)
    return LayerGradients(inputs, at_weight, at_input, at_output)


@torch.no_grad()
def layer_inputs(evidence: Evidence, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """``{layer: (n, ...)}``, the float network's."""
    with watched_inputs(evidence.layerwise.network, evidence.layerwise.paths) as (inputs, _):
        evidence.layerwise.network(x)
    return inputs


@contextmanager
def watched_inputs(
    network: nn.Module, paths: Mapping[str, str]
) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """Within the block, every layer's last input, and zeros that are added to it, to take derivatives by."""
    inputs: dict[str, torch.Tensor] = {}
    shifts: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Callable[..., Any]:
        def add(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            inputs[name] = args[0].detach()
            shifts[name] = torch.zeros_like(args[0], requires_grad=torch.is_grad_enabled())
            return (args[0] + shifts[name], *args[1:])

        return add

    handles = [network.get_submodule(path).register_forward_pre_hook(watch(name)) for name, path in paths.items()]
    try:
        yield inputs, shifts
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _watched_outputs(network: nn.Module, paths: Mapping[str, str]) -> Iterator[dict[str, torch.Tensor]]:
    shifts: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Callable[..., Any]:
        def add(_: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            shifts[name] = torch.zeros_like(output, requires_grad=True)
            return output + shifts[name]

        return add

    handles = [network.get_submodule(path).register_forward_hook(watch(name)) for name, path in paths.items()]
    try:
        yield shifts
    finally:
        for handle in handles:
            handle.remove()
