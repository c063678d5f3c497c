"""What code is generated for: one value from the recipe to the kernel."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_baqe.errors import ConfigError
from lightning_baqe.hardware.target import CpuTarget, get_target


@dataclass(frozen=True)
class BuildOptions:
    """All that a plan depends on, the graph and the knobs apart.

    Args:
        target: the CPU; by default this one.
        threads: of every convolution.
        fuse_residual: whether a convolution's kernel may end with a residual sum; else sums have kernels of their own.

    Raises:
        ConfigError: fewer threads than one.
    """

    target: CpuTarget = field(default_factory=get_target)
    threads: int = 1
    fuse_residual: bool = True

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ConfigError(f"threads must be at least 1, got {self.threads}")
