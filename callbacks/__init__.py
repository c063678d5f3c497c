"""Lightning callbacks."""

from lightning_baqe.callbacks.distillation import Distillation
from lightning_baqe.callbacks.search import BayesianSearch

__all__ = ["BayesianSearch", "Distillation"]
