"""Statistics of batch norms that suit the weights as they are, taken anew before each validation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn

from lightning_baqe.callbacks.host import Host, network_of
from lightning_baqe.errors import ConfigError, check_at_least
from lightning_baqe.quantization.batch_norm import BATCH_NORMS
from lightning_baqe.quantization.train_modes import is_frozen


class ReestimateBatchNorm(pl.Callback):
    """Take running statistics anew, from some training batches, before the network is validated and kept.

    Running means lag behind weights that are rounded: one that crosses the border between two integers changes its
    channel's output at once (Nagel et al., ICML 2022, section 5.2). Frozen and folded batch norms stay as they are.

    Args:
        network: attribute of the LightningModule that holds the network; dots reach deeper.
        batches: of the training loader, from its start; what torch's generators and the loader's draw is not used up.

    Raises:
        ConfigError: ``batches`` below 1. When validation starts: no such network, or no training batches.
    """

    def __init__(self, network: str = "net", batches: int = 20) -> None:
        super().__init__()
        check_at_least("batches", batches, 1)
        self.network, self.batches = network, batches

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See the class."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        network = network_of(pl_module, self.network)
        modes = {module: module.training for module in network.modules()}
        with torch.random.fork_rng(), _orders_kept(trainer.train_dataloader):
            images = Host(trainer, pl_module, self.network).training_images(self.batches)
            if not images:
                raise ConfigError("batch norms need training batches, got none")
            _take_anew(network, [x.to(pl_module.device) for x in images])
        for module, training in modes.items():
            module.training = training


@contextmanager
def _orders_kept(loader: Any) -> Iterator[None]:
    """Have a loader's own generators go on as if nothing had been drawn."""
    owners = (loader, getattr(loader, "sampler", None))
    generators = {id(g): g for g in (getattr(owner, "generator", None) for owner in owners) if g is not None}
    states = {key: generator.get_state() for key, generator in generators.items()}
    try:
        yield
    finally:
        for key, generator in generators.items():
            generator.set_state(states[key])


@torch.no_grad()
def _take_anew(network: nn.Module, images: list[Tensor]) -> None:
    """Means over the batches; torch's ``update_bn`` would reset frozen statistics, too."""
    norms = [m for m in network.modules() if isinstance(m, BATCH_NORMS) and m.track_running_stats and not is_frozen(m)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    network.train()
    try:
        for x in images if norms else ():
            network(x)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
