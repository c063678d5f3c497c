"""From measured kernels to whole networks: kernels find colder caches there, and each call takes time of its own.

Kernels are measured alone, with all that they read in the fastest cache. In a network they meet weights that the last
image left in a cache further away, or, of large networks, in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

TERMS = ("constant", "kernels", "conversions", "calls", "megabytes", "beyond")


def correction_columns(parts: np.ndarray, cached_mb: float) -> np.ndarray:
    """What :data:`TERMS` multiply, ``(n, 6)``.

    Args:
        parts: ``(n, 4)``: microseconds of kernels, of conversions, number of conversions, megabytes of constants.
        cached_mb: of which caches hold so many.
    """
    beyond = np.maximum(0.0, parts[:, 3:] - cached_mb)
    return np.concatenate([np.ones((len(parts), 1)), parts, beyond], axis=1)


@dataclass(frozen=True)
class Correction:
    """A latency by its parts.

    Args:
        factors: by :data:`TERMS`: microseconds, none, none, microseconds a call, a megabyte, a megabyte beyond.
        cached_mb: megabytes that caches hold from image to image.
    """

    factors: tuple[float, ...]
    cached_mb: float

    def apply(self, parts: np.ndarray) -> np.ndarray:
        """Latencies ``(n,)``, microseconds, of parts ``(n, 4)``."""
        return np.asarray(correction_columns(parts, self.cached_mb) @ np.array(self.factors))

    def record(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {**dict(zip(TERMS, self.factors, strict=True)), "cached_mb": self.cached_mb}

    @classmethod
    def from_record(cls, record: Mapping[str, float]) -> Correction:
        """Of :meth:`record`."""
        return cls(tuple(record[term] for term in TERMS), record["cached_mb"])


PLAIN = Correction((0.0, 1.0, 1.0, 0.0, 0.0, 0.0), 0.0)
