"""Lightning callbacks."""

from lightning_baqe.callbacks.bayesian_search import BayesianSearch
from lightning_baqe.callbacks.distillation import Distillation
from lightning_baqe.callbacks.freeze_batch_norm import FreezeBatchNorm
from lightning_baqe.callbacks.pareto_checkpoint import ParetoCheckpoint

__all__ = ["BayesianSearch", "Distillation", "FreezeBatchNorm", "ParetoCheckpoint"]
