"""LightningModules, the networks that they wrap, float training to a cached checkpoint, and the scores of outputs."""

from lightning_baqe.tasks.classifier import ImageClassifier
from lightning_baqe.tasks.networks import network
from lightning_baqe.tasks.pretrain import fit_to_checkpoint, pretrain

__all__ = ["ImageClassifier", "fit_to_checkpoint", "network", "pretrain"]
