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
    """By layer: its inputs ``(n, ...)``, one for each time that it is called, and gradients of the mean loss, of the
    shapes of what they belong to.
    """

    inputs: dict[str, list[torch.Tensor]]
    at_weight: dict[str, torch.Tensor]
    at_input: dict[str, list[torch.Tensor]]
    at_output: dict[str, list[torch.Tensor]]


def layer_gradients(evidence: Evidence, x: torch.Tensor, y: torch.Tensor) -> LayerGradients:
    """Of one batch, by one forward and one backward pass. The gradient at an input is that of this layer's reading.

    Raises:
        DataError: the loss is not finite.
    """
    paths, network = evidence.layerwise.paths, evidence.layerwise.network
    weights: dict[str, Any] = {name: network.get_submodule(path).weight for name, path in paths.items()}
    with (
        torch.enable_grad(),
        learning(dict.fromkeys(weights.values(), True)),
        watched_inputs(network, paths) as (inputs, at_inputs),
        _watched_outputs(network, paths) as at_outputs,
    ):
        loss = evidence.loss(network(x), y)
        called = [tensor for kind in (at_inputs, at_outputs) for tensors in kind.values() for tensor in tensors]
        wanted = [*weights.values(), *called]
        found = iter(torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True))
    at_weight = {name: next(found).detach() for name in weights}
    at_input, at_output = (
        {name: [next(found).detach() for _ in tensors] for name, tensors in kind.items()}
        for kind in (at_inputs, at_outputs)
    )
    return LayerGradients(inputs, at_weight, at_input, at_output)


@torch.no_grad()
def layer_inputs(evidence: Evidence, x: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    """``{layer: (n, ...) of each call}``, the float network's."""
    with watched_inputs(evidence.layerwise.network, evidence.layerwise.paths) as (inputs, _):
        evidence.layerwise.network(x)
    return inputs


@contextmanager
def learning(wanted: Mapping[nn.Parameter, bool]) -> Iterator[None]:
    """Which parameters are differentiated by, inside the block."""
    before = {parameter: parameter.requires_grad for parameter in wanted}
    try:
        for parameter, learns in wanted.items():
            parameter.requires_grad_(learns)
        yield
    finally:
        for parameter, learns in before.items():
            parameter.requires_grad_(learns)


@contextmanager
def watched_inputs(
    network: nn.Module, paths: Mapping[str, str]
) -> Iterator[tuple[dict[str, list[torch.Tensor]], dict[str, list[torch.Tensor]]]]:
    """Within the block, every layer's inputs in the network's last run, one a call, and zeros that are added to them,
    to take derivatives by.
    """
    inputs: dict[str, list[torch.Tensor]] = {}
    shifts: dict[str, list[torch.Tensor]] = {}

    def begin(*_: Any) -> None:
        inputs.clear()
        shifts.clear()

    def watch(name: str) -> Callable[..., Any]:
        def add(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            x, *others = args or (kwargs["input"],)
            shift = torch.zeros_like(x, requires_grad=torch.is_grad_enabled())
            inputs.setdefault(name, []).append(x.detach())
            shifts.setdefault(name, []).append(shift)
            return (x + shift, *others), {key: value for key, value in kwargs.items() if key != "input"}

        return add

    handles = [network.register_forward_pre_hook(begin)]
    handles += [
        network.get_submodule(path).register_forward_pre_hook(watch(name), with_kwargs=True)
        for name, path in paths.items()
    ]
    try:
        yield inputs, shifts
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _watched_outputs(network: nn.Module, paths: Mapping[str, str]) -> Iterator[dict[str, list[torch.Tensor]]]:
    shifts: dict[str, list[torch.Tensor]] = {}

    def watch(name: str) -> Callable[..., Any]:
        def add(_: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            shift = torch.zeros_like(output, requires_grad=True)
            shifts.setdefault(name, []).append(shift)
            return output + shift

        return add

    handles = [network.get_submodule(path).register_forward_hook(watch(name)) for name, path in paths.items()]
    try:
        yield shifts
    finally:
        for handle in handles:
            handle.remove()
