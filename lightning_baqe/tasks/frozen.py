"""What a pretrained network keeps while it is fitted to other pictures."""

from __future__ import annotations

from collections.abc import Iterable

import pytorch_lightning as pl
from torch import nn

from lightning_baqe.errors import ConfigError
from lightning_baqe.quantization.config import near


class Frozen(pl.Callback):
    """Train a network without some of its modules, for one fit.

    With few pictures these are better left as they are: early layers have learned all that there is to learn from the
    pictures that they were made with. Modules in front of all that is trained cost no backward pass. After the fit
    everything learns again as before.

    Args:
        network: the network, or a part of the LightningModule that is fitted.
        modules: names of modules of it, as ``named_modules`` gives them; their weights are not trained, and they stay
            in eval mode.

    Raises:
        ConfigError: there is no such module.
    """

    def __init__(self, network: nn.Module, modules: Iterable[str]) -> None:
        super().__init__()
        known = dict(network.named_modules())
        for name in (modules := tuple(modules)):
            if not name or name not in known:
                names = {other: None for other in known if other}
                raise ConfigError(f"{type(network).__name__} has no module {name!r} to be frozen{near(name, names)}")
        self._modules = [known[name] for name in modules]
        self._parameters: list[nn.Parameter] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take the parameters from those that are trained, before an optimizer is made."""
        if stage == "fit":
            parameters = (parameter for module in self._modules for parameter in module.parameters())
            self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
            for parameter in self._parameters:
                parameter.requires_grad_(False)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep modules still, which Lightning has set to train."""
        for module in self._modules:
            module.eval()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let everything learn again."""
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        for module in self._modules:
            module.train(pl_module.training)
        self._parameters = []
