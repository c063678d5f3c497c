"""Lightning callbacks."""

from lightning_baqe.callbacks.search import BayesianSearch

__all__ = ["BayesianSearch"]
