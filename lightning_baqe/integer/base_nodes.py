"""What every operator of the integer graph has, and those at its ends; see :mod:`lightning_baqe.integer.nodes`."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from lightning_baqe.errors import ConfigError

NODE_TYPES: dict[str, type[Node]] = {}  # all operators by kind


@dataclass(frozen=True)
class TensorType:
    """The type of one value, without the batch dimension.

    Args:
        shape: ``(channels, height, width)`` or ``(features,)``.
        low, high: inclusive integer range; both None for a float32 value.
        scale, zero_point: the real value is ``scale * (q - zero_point)``; scale 0 where it differs by channel.
    """

    shape: tuple[int, ...]
    low: int | None = None
    high: int | None = None
    scale: float = 1.0
    zero_point: int = 0

    @property
    def is_integer(self) -> bool:
        return self.low is not None

    @property
    def limits(self) -> tuple[int, int]:
        """Lowest and highest integer."""
        assert self.low is not None
        assert self.high is not None
        return self.low, self.high

    def clip(self, steps: torch.Tensor) -> torch.Tensor:
        """``clip(steps + zero_point)``, steps being int64 and counted from the zero point."""
        return (steps + self.zero_point).clamp(*self.limits)


@dataclass(frozen=True, eq=False, kw_only=True)
class Node(ABC):
    """Base of all operators.

    Args:
        name: unique in its graph.
        inputs: names of the nodes whose outputs it reads.
        type: the type of its output.
    """

    kind: ClassVar[str]  # in files and messages: the name of the class in snake case
    name: str
    inputs: tuple[str, ...]
    type: TensorType

    def __init_subclass__(cls) -> None:
        if "run" in vars(cls):
            cls.kind = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()
            NODE_TYPES[cls.kind] = cls

    @abstractmethod
    def run(self, *values: torch.Tensor) -> torch.Tensor:
        """Compute the output, shape ``(n, *type.shape)``."""

    @property
    def is_float(self) -> bool:
        """Whether it does float arithmetic on values inside the network."""
        return self.kind.startswith("float_")


@dataclass(frozen=True, eq=False, kw_only=True)
class Input(Node):
    """The network's float32 input; of several inputs all elements, one input after the other.

    Args:
        given: its shape as the caller gives it, elements in the same order; None: the type's.
        integers: whether integers are taken, too: the network casts them.
        parts: shapes of several inputs; ``()`` for one.
    """

    given: tuple[int, ...] | None = None
    integers: bool = False
    parts: tuple[tuple[int, ...], ...] = ()

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        return values[0].to(torch.float32).reshape(len(values[0]), *self.type.shape)


@dataclass(frozen=True, eq=False, kw_only=True)
class Literal(Node):
    """A constant tensor, without inputs and without a batch dimension of its own: ``run()`` gives ``(1, *type.shape)``.

    Args:
        value: of the type's shape: int64 within its range, or float32.

    Raises:
        ConfigError: the value is not of its type.
    """

    value: torch.Tensor

    def __post_init__(self) -> None:
        wanted = torch.int64 if self.type.is_integer else torch.float32
        if self.value.dtype != wanted or tuple(self.value.shape) != self.type.shape:
            raise ConfigError(
                f"literal {self.name!r}: its type wants {wanted} of shape {self.type.shape}, got {self.value.dtype} of "
                f"shape {tuple(self.value.shape)}"
            )
        if self.type.is_integer and not torch.equal(self.value.clamp(*self.type.limits), self.value):
            raise ConfigError(
                f"literal {self.name!r} holds {int(self.value.min())}..{int(self.value.max())}, its type only "
                f"{self.type.low}..{self.type.high}; clip it or widen the type"
            )

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        return self.value[None]


@dataclass(frozen=True, eq=False, kw_only=True)
class Quantize(Node):
    """Float to integer: ``clip(round_half_even(x * inverse_scale) + zero_point)``, one float32 multiplication."""

    inverse_scale: float

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        factor = torch.tensor(self.inverse_scale, dtype=torch.float32)
        scaled = torch.round(values[0].to(torch.float32) * factor)
        # Clamp before the cast: what lies outside int64 has no defined conversion.
        low, high = (limit - self.type.zero_point for limit in self.type.limits)
        return scaled.clamp(low, high).to(torch.int64) + self.type.zero_point


@dataclass(frozen=True, eq=False, kw_only=True)
class Dequantize(Node):
    """Integer to float32: ``float32(q - zero_point) * scale``, scale float32 of shape ``()`` or ``(channels,)``."""

    scale: torch.Tensor
    zero_point: int

    def run(self, *values: torch.Tensor) -> torch.Tensor:
        shifted = (values[0] - self.zero_point).to(torch.float32)
        return shifted * per_channel(self.scale.to(torch.float32), shifted)


def per_channel(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Numbers by channel, shape ``()`` or ``(channels,)``, which broadcast to ``like``, ``(n, channels, ...)``."""
    return values if values.ndim == 0 else values.reshape(1, -1, *[1] * (like.ndim - 2))
