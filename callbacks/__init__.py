"""Lightning callbacks, imported when first used: most need neither TVM nor GPyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_baqe.lazy import on_first_use

if TYPE_CHECKING:
    from lightning_baqe.callbacks.bayesian_search import BayesianSearch
    from lightning_baqe.callbacks.distillation import Distillation
    from lightning_baqe.callbacks.freeze_batch_norm import FreezeBatchNorm
    from lightning_baqe.callbacks.learned_bits import LearnedBits
    from lightning_baqe.callbacks.oscillations import Oscillations
    from lightning_baqe.callbacks.pareto_checkpoint import ParetoCheckpoint
    from lightning_baqe.callbacks.reestimate_batch_norm import ReestimateBatchNorm

_HOMES = {
    "bayesian_search": ("BayesianSearch",),
    "distillation": ("Distillation",),
    "freeze_batch_norm": ("FreezeBatchNorm",),
    "learned_bits": ("LearnedBits",),
    "oscillations": ("Oscillations",),
    "pareto_checkpoint": ("ParetoCheckpoint",),
    "reestimate_batch_norm": ("ReestimateBatchNorm",),
}

__getattr__, __dir__ = on_first_use(__name__, _HOMES)

__all__ = [
    "BayesianSearch",
    "Distillation",
    "FreezeBatchNorm",
    "LearnedBits",
    "Oscillations",
    "ParetoCheckpoint",
    "ReestimateBatchNorm",
]
