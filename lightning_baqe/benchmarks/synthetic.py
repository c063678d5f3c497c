"""A made-up search with the structure of the real one, for when no measured landscape is at hand.

| symbol | meaning                                                          | shape |
| ------ | ---------------------------------------------------------------- | ----- |
| l      | layer                                                            |       |
| b      | bits of each layer                                               | L     |
| s      | sensitivity of each layer                                        | L     |
| u      | share of the network's multiplications of each layer             | L     |
| p      | share of the network's weights of each layer                     | L     |
| q      | position of each knob on a scale from 0 to 1                     | L x k |

error = floor + (worst - floor) (1 - exp(-sum_l s_l 4^(2 - b_l))): additive, and saturated at chance.
latency = sum_l u_l rate(b_l) prod_k (1 + c_lk |q_lk - q*_lk(b_l)|): each kernel's best knobs depend on its bits.
size = sum_l p_l b_l / 8. Latency and size are relative to the network at 8 bit with the best knobs.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution

from lightning_baqe.errors import ConfigError
from lightning_baqe.landscapes.measured import Landscape
from lightning_baqe.landscapes.problem import Problem
from lightning_baqe.search import spanning_pool
from lightning_baqe.search.knowledge import Knowledge, Sum

BITS = (2, 4, 8)
KNOB_VALUES = (1, 2, 4, 8, 16, 32)
_RATE = {2: 0.8, 4: 0.55, 8: 1.0}  # without instructions for them, two bits are unpacked and do not pay
_FLOOR, _WORST = 0.05, 0.99


class Additive:
    """An additive problem; see the module.

    Args:
        layers: of the network: 21 is ResNet-18 with its shortcuts, 54 is ResNet-50.
        knobs: of each kernel.
        seed: of all its constants.
    """

    objectives: tuple[str, ...] = ("error", "latency", "size")
    reference_point: tuple[float, ...] = (1.0, 1.5, 1.1)

    def __init__(self, layers: int = 21, knobs: int = 1, seed: int = 0) -> None:
        if layers < 1 or knobs < 0:
            raise ConfigError(f"layers={layers}, knobs={knobs}; wanted at least one layer and no negative knobs")
        rng = np.random.default_rng(seed)
        self.name = f"additive{layers}x{knobs}"
        self.layers, self.knobs = layers, knobs
        self._sensitivity = rng.lognormal(-1.5, 1.2, layers) * 3 / layers
        self._macs = rng.lognormal(0.0, 0.6, layers)
        self._macs /= self._macs.sum()
        self._weights = rng.lognormal(0.0, 1.0, layers) * np.linspace(0.2, 2.0, layers)
        self._weights /= self._weights.sum()
        self._penalty = rng.uniform(0.2, 1.5, (layers, knobs))
        self._best = rng.choice(np.linspace(0, 1, len(KNOB_VALUES)), (len(BITS), layers, knobs))
        # In the order of the layers; samplers sort names for themselves.
        bits = {f"bits{layer:02d}": CategoricalDistribution(BITS) for layer in range(layers)}
        knob_names = [f"knob{layer:02d}_{knob}" for layer in range(layers) for knob in range(knobs)]
        self.distributions: Mapping[str, BaseDistribution] = {
            **bits,
            **{name: CategoricalDistribution(KNOB_VALUES) for name in knob_names},
        }
        self._names = list(self.distributions)

    def evaluate(self, params: Mapping[str, Any]) -> tuple[float, ...]:
        """(error, latency, size) of a point."""
        values = [params[name] for name in self._names]
        bits = np.array(values[: self.layers])
        place = np.array([BITS.index(b) for b in values[: self.layers]])
        knobs = np.array([KNOB_VALUES.index(v) for v in values[self.layers :]]).reshape(self.layers, self.knobs)
        scale = knobs / (len(KNOB_VALUES) - 1)
        noise = float((self._sensitivity * 4.0 ** (2 - bits)).sum())
        error = _FLOOR + (_WORST - _FLOOR) * (1 - np.exp(-noise))
        rate = np.array([_RATE[b] for b in values[: self.layers]])
        best = self._best[place, np.arange(self.layers)]
        slow = (1 + self._penalty * np.abs(scale - best)).prod(1)
        latency = float((self._macs * rate * slow).sum())
        return float(error), latency, float((self._weights * bits).sum() / 8)

    def candidates(self, n: int, rng: np.random.Generator) -> list[dict[str, Any]]:
        """Points that span the space: the fixed pool of BAQE III-C."""
        return spanning_pool(self.distributions, n, rng)

    def seconds(self, params: Mapping[str, Any]) -> float:
        """0: nothing real is evaluated."""
        return 0.0

    def knowledge(self) -> Knowledge:
        """Sizes, and latencies with the best knobs; of the error, that it depends on bits alone."""
        names, slots = self._names[: self.layers], np.array(self._names[self.layers :]).reshape(self.layers, self.knobs)
        best = {
            name: {
                b: {
                    str(slot): KNOB_VALUES[round(float(self._best[place, layer, k]) * (len(KNOB_VALUES) - 1))]
                    for k, slot in enumerate(slots[layer])
                }
                for place, b in enumerate(BITS)
            }
            for layer, name in enumerate(names)
        }
        latency = {name: {b: float(self._macs[i] * _RATE[b]) for b in BITS} for i, name in enumerate(names)}
        size = {name: {b: float(self._weights[i] * b / 8) for b in BITS} for i, name in enumerate(names)}
        error = Sum({}, 0.0, "score", tuple(names))
        return Knowledge([error, Sum(latency), Sum(size, kind="exact")], best)

    def preparation_s(self) -> float:
        """0: nothing real is measured."""
        return 0.0


@functools.cache
def problem_named(name: str, noise_seed: int | None = None) -> Problem:
    """A problem by its name: `additive<layers>x<knobs>`, or a measured landscape, as `Landscape.load` takes it.

    Args:
        noise_seed: of a landscape's noise; None: none.

    Raises:
        ConfigError: there is none of that name, or none of its noise.
    """
    made_up = re.fullmatch(r"additive(\d+)x(\d+)", name)
    if made_up and noise_seed is not None:
        raise ConfigError(f"{name} is made up and has no noise; wanted a measured landscape, or no noise")
    if made_up:
        return Additive(int(made_up[1]), int(made_up[2]))
    return cast(Problem, Landscape.load(name, noise_seed=noise_seed))
