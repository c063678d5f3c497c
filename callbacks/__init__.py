"""Lightning callbacks, imported when first used: most need neither TVM nor GPyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_baqe.lazy import on_first_use

if TYPE_CHECKING:
    from lightning_baqe.callbacks.bayesian_search import BayesianSearch
    from lightning_baqe.callbacks.distillation import Distillation
    from lightning_baqe.callbacks.freeze_batch_norm import FreezeBatchNorm
    from lightning_baqe.callbacks.learned_bits import LearnedBits
    from lightning_baqe.callbacks.pareto_checkpoint import ParetoCheckpoint

_HOMES = {
    "bayesian_search": ("BayesianSearch",),
    "distillation": ("Distillation",),
    "freeze_batch_norm": ("FreezeBatchNorm",),
    "learned_bits": ("LearnedBits",),
    "pareto_checkpoint": ("ParetoCheckpoint",),
}

__getattr__, __dir__ = on_first_use(__name__, _HOMES)

__all__ = ["BayesianSearch", "Distillation", "FreezeBatchNorm", "LearnedBits", "ParetoCheckpoint"]
