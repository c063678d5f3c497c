"""What a search cannot share a Trainer with: refused by name before anything is trained."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from torch import nn

from lightning_baqe.callbacks.host import RepeatsTraining
from lightning_baqe.errors import ConfigError

# Whose weights are float32 wherever a network is quantized, calibrated and lowered.
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")

_AVERAGES = (
    "averages the weights of one network over the whole fit, and would write the averages over the float network in "
    "the end: average them in a fit of the float network before the search"
)
# By name, since some versions of Lightning lack some of them.
_REFUSED = {
    "WeightAveraging": _AVERAGES,  # with EMAWeightAveraging
    "StochasticWeightAveraging": _AVERAGES,
    "BaseFinetuning": "freezes and unfreezes the modules that are there when fit starts: fine-tune before the search",
    "ModelPruning": "prunes the modules that are there when fit starts: prune before the search, and make it permanent "
    "with torch.nn.utils.prune.remove",
    "EarlyStopping": "compares the epochs of one trial with those of another, and would end the search: trials and "
    "epochs_per_trial say how long it lasts, and prune=True gives up hopeless trials",
}


def check_company(trainer: pl.Trainer, network: nn.Module) -> None:
    """Refuse what would make a search in this Trainer wrong.

    Args:
        trainer: before its fit begins.
        network: the float classifier.

    Raises:
        ConfigError: a callback that holds on to one network or counts all trials as one training, another search, or
            weights of another type than float32.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if sum(isinstance(callback, RepeatsTraining) for callback in callbacks) > 1:
        raise ConfigError("the Trainer has several BayesianSearch callbacks: give each a Trainer of its own.")
    for name, why in _REFUSED.items():
        kind = getattr(pl.callbacks, name, None)
        for callback in callbacks:
            if kind is not None and isinstance(callback, kind):
                raise ConfigError(
                    f"{type(callback).__name__} stands beside BayesianSearch, which puts another network in the "
                    f"classifier's place for each trial, but it {why}, and leave it out here."
                )
    check_precision(str(trainer.precision))
    for name, parameter in network.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise ConfigError(
                f"parameter {name!r} of the network is {str(parameter.dtype).removeprefix('torch.')}, but a search "
                "wants float32 weights: call .float() on the network first."
            )


def check_precision(precision: str) -> None:
    """Refuse a Trainer that turns all weights into another type.

    Args:
        precision: ``trainer.precision``.

    Raises:
        ConfigError: names those that will do.
    """
    if precision not in PRECISIONS:
        raise ConfigError(
            f"Trainer(precision={precision!r}) keeps the weights in another type than float32, but networks are "
            "quantized, calibrated and lowered in float32: scales that are rounded otherwise in training than on the "
            f"device would give other integers. Give precision={' or '.join(map(repr, PRECISIONS))}."
        )
