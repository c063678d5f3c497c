"""The two parts of a loss's Hessian, J' S J + R, each probed where it costs least.

| symbol | meaning | shape |
| --- | --- | --- |
| w | what is probed, of one layer | any |
| J | first derivatives of the network's output by w | (size of the output, size of w) |
| u, S | first and second derivatives of the loss by the output | (size of the output,), and squared |
| R | second derivatives of the output by w, weighted by u | (size of w, size of w) |
| z, v | probes, entries of 1 and -1 with equal chance | as the output, as w |

The trace of the first part, the Gauss-Newton matrix, is the expectation of (J' S^½ z)' (J' S^½ z): one gradient serves
all layers, and they do not disturb each other. The trace of R is that of v' R v, a Hessian-vector product of one layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_baqe.allocation.evidence import Loss
from lightning_baqe.errors import ConfigError, DataError

Tensors = Mapping[str, Sequence[torch.Tensor]]  # by layer; several layers may have one in common
_FACTORED = 4096  # numbers of the output, up to which S is formed and factored


class Curvature:
    """Of a network's output for some images.

    Args:
        output: a tensor, or tensors in lists and dicts.
        y: targets.
        loss_fn: ``loss_fn(output, y)``.
        tensors: that the output was computed with.
        generator: of probes.

    Raises:
        ConfigError: the loss depends on the tensors by itself.
        DataError: the loss is not finite.
    """

    def __init__(
        self, output: Any, y: torch.Tensor, loss_fn: Loss, tensors: Tensors, generator: torch.Generator
    ) -> None:
        leaves, structure = tree_flatten(output)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        self._outputs = [leaves[place] for place in places]
        self._ends = [tensor.detach().requires_grad_() for tensor in self._outputs]  # the loss's graph ends here
        for place, end in zip(places, self._ends, strict=True):
            leaves[place] = end
        loss = loss_fn(tree_unflatten(leaves, structure), y)
        if not bool(torch.isfinite(loss)):
            raise DataError(f"the loss is {loss.item()}, but traces need a finite one: see to data and network")
        self._tensors, self._generator = tensors, generator
        self._unique = list({id(tensor): tensor for several in tensors.values() for tensor in several}.values())
        if loss.requires_grad and any(
            found is not None for found in torch.autograd.grad(loss, self._unique, retain_graph=True, allow_unused=True)
        ):
            raise ConfigError("the loss knows weights by itself, not through the output alone: leave that part out")
        self._first = _in_a_row(_gradients(loss, self._ends, create_graph=True))
        self._factors = self._factor(len(y)) if 0 < self._first.numel() <= _FACTORED else None

    def _factor(self, images: int) -> tuple[torch.Tensor, torch.Tensor]:
        """S^½ and the eigenvalues' signs, ``(n, m, m)`` and ``(n, m)``: one block an image, where images do not meet in
        the loss, else one of all.
        """
        size = self._first.numel()
        second = torch.stack([self._second(row) for row in torch.eye(size).to(self._first)])
        blocks = second[None]
        if len(self._ends) == 1 and len(self._ends[0]) == images:
            apart = second.view(images, size // images, images, size // images)
            within = torch.stack([apart[i, :, i] for i in range(images)])
            if torch.count_nonzero(within) == torch.count_nonzero(second):
                blocks = within
        values, vectors = torch.linalg.eigh((blocks + blocks.mT) / 2)
        rounding = torch.finfo(values.dtype).eps * values.shape[1] * values.abs().max()
        values = torch.where(values.abs() > rounding, values, torch.zeros_like(values))
        return vectors * values.abs().sqrt()[:, None], values.sign()

    def _second(self, row: torch.Tensor) -> torch.Tensor:
        """S times it."""
        if not self._first.requires_grad:  # a loss that is straight in the output
            return torch.zeros_like(row)
        return _in_a_row(_gradients(self._first, self._ends, row, retain_graph=True))

    def gauss_newton(self) -> dict[str, float]:
        """An estimate of the first part's trace, by layer."""
        z = _signs(self._first, self._generator)
        if self._factors is None:
            left, right = z, self._second(z)  # noisier; both sides of S are not at hand
        else:
            root, signs = self._factors
            of_blocks = z.view(signs.shape)[:, :, None]
            left, right = ((root @ (s * of_blocks)).reshape(-1) for s in (1.0, signs[:, :, None]))
        at_left = self._at_tensors(left)
        at_right = at_left if torch.equal(left, right) else self._at_tensors(right)
        return {
            name: sum(float((at_left[id(t)] * at_right[id(t)]).sum()) for t in several)
            for name, several in self._tensors.items()
        }

    def _at_tensors(self, row: torch.Tensor, create_graph: bool = False) -> dict[int, torch.Tensor]:
        """J' times it, by tensor's id."""
        if not self._outputs:
            return {id(tensor): torch.zeros_like(tensor) for tensor in self._unique}
        parts = [
            part.view(end.shape)
            for part, end in zip(row.split([end.numel() for end in self._ends]), self._ends, strict=True)
        ]
        found = torch.autograd.grad(
            self._outputs, self._unique, parts, retain_graph=True, create_graph=create_graph, allow_unused=True,
            materialize_grads=True,
        )  # fmt: skip
        return {id(tensor): gradient for tensor, gradient in zip(self._unique, found, strict=True)}

    def residual(self, probes: Mapping[str, int]) -> dict[str, list[float]]:
        """So many estimates of the second part's trace, by layer."""
        if not probes:
            return {}
        gradients = self._at_tensors(self._first.detach(), create_graph=True)
        by_tensors: dict[tuple[int, ...], list[float]] = {}  # layers with the same weights have the same estimates
        found = {}
        for name, count in probes.items():
            curved = [t for t in self._tensors.get(name, ()) if gradients[id(t)].requires_grad]
            same = tuple(map(id, curved))
            if same not in by_tensors:
                by_tensors[same] = [self._product(curved, gradients) for _ in range(count)]
            found[name] = by_tensors[same]
        return found

    def _product(self, tensors: Sequence[torch.Tensor], gradients: Mapping[int, torch.Tensor]) -> float:
        if not tensors:
            return 0.0
        probes = [_signs(tensor, self._generator) for tensor in tensors]
        products = torch.autograd.grad(
            [gradients[id(tensor)] for tensor in tensors], tensors, probes, retain_graph=True, allow_unused=True,
            materialize_grads=True,
        )  # fmt: skip
        return sum(float((product * probe).sum()) for product, probe in zip(products, probes, strict=True))


def _gradients(
    of: torch.Tensor, by: Sequence[torch.Tensor], times: torch.Tensor | None = None, **options: bool
) -> tuple[torch.Tensor, ...]:
    if not by or not of.requires_grad:
        return tuple(torch.zeros_like(tensor) for tensor in by)
    return torch.autograd.grad(of, by, times, allow_unused=True, materialize_grads=True, **options)


def _in_a_row(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors]) if tensors else torch.zeros(0)


def _signs(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    signs = torch.randint(0, 2, tensor.shape, generator=generator, dtype=torch.int8)  # the same on every device
    return torch.empty_like(tensor, requires_grad=False).copy_(signs).mul_(2).sub_(1)
