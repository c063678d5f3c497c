"""The kernel calls that a network is compiled to."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_baqe.deploy.digest import code_digest
from lightning_baqe.errors import BuildError
from lightning_baqe.hardware.options import BuildOptions
from lightning_baqe.kernels.specs import Spec, TunableSpec, alone, build_kernel, kernel_key
from lightning_baqe.kernels.x86.layout import Layout

Maker = Callable[[], np.ndarray]


class Constants(Mapping[str, np.ndarray]):
    """Arrays by name, each made when it is first asked for: whoever wants a plan's specs alone packs no weights.

    Args:
        makers: ``{name: what makes the array}``.
    """

    def __init__(self, makers: Mapping[str, Maker]) -> None:
        self._makers = dict(makers)
        self.made: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.made:
            self.made[name] = np.ascontiguousarray(self._makers[name]())
        return self.made[name]

    def __contains__(self, name: object) -> bool:
        return name in self._makers

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


@dataclass(frozen=True, eq=False)
class Call:
    """One kernel call.

    Args:
        nodes: the graph's nodes that it computes; the last one's value is its result, unless ``written`` names others.
        layer: the layer whose knobs it takes, if any.
        spec, knobs: what its code depends on.
        arguments: its arguments but the results: names of values, or of the plan's constants, literals among them.
        written: the values that it writes, where an island has other results than its last node's.
    """

    nodes: tuple[str, ...]
    layer: str | None
    spec: Spec
    knobs: Mapping[str, Any]
    arguments: tuple[str, ...]
    written: tuple[str, ...] = ()

    @property
    def result(self) -> str:
        return self.nodes[-1]

    @property
    def results(self) -> tuple[str, ...]:
        """The values that it writes, its last arguments."""
        return self.written or (self.result,)

    def function(self) -> Any:
        """The kernel's TIR; BuildError where TVM cannot import an operator of an island."""
        try:
            return build_kernel(self.spec, self.knobs)
        except BuildError as error:
            raise BuildError(f"{', '.join(map(repr, self.nodes))}: {error}") from error

    @property
    def key(self) -> str:
        """Identifies the kernel's code among kernels of one target."""
        return kernel_key(self.spec, self.knobs)


@dataclass(frozen=True, eq=False)
class Plan:
    """The kernel calls of one network, in order.

    Args:
        calls: of all kernels.
        output: the value that is the network's output, float32 of shape ``(1, features)``.
        layouts: of every value in our layout.
        plain: ``{value: its size}`` of float32 values that lie row-major, in buffers ``(1, size)``: what islands read
            and write, and the network's output.
        buffers: ``{value: the value whose buffer it lies in}``, of those that have none of their own.
        schedules: the knobs that every tunable layer got.
        options: that it was made with.
        constants: what calls take besides values, by name.
    """

    calls: tuple[Call, ...]
    output: str
    layouts: Mapping[str, Layout]
    plain: Mapping[str, int]
    buffers: Mapping[str, str]
    schedules: dict[str, dict[str, Any]]
    options: BuildOptions
    constants: Constants

    def tunable(self) -> dict[str, TunableSpec]:
        """``{layer: its kernel}`` of those with knobs, on buffers of their own, as they are measured and kept."""
        return {c.layer: alone(c.spec) for c in self.calls if c.layer is not None and isinstance(c.spec, TunableSpec)}

    def buffer(self, name: str) -> str:
        """The value whose buffer a value lies in: itself, or a concatenation."""
        return self.buffers.get(name, name)

    @property
    def digest(self) -> str:
        """Identifies all code of the network and what generated it: equal digests run equally fast."""
        keys = [call.key for call in self.calls]
        text = json.dumps([keys, dataclasses.asdict(self.options.target), self.options.threads, code_digest()])
        return hashlib.sha256(text.encode()).hexdigest()
