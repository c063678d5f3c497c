"""HAWQ-V3's strategy for batch norm, in anybody's Trainer and with anybody's LightningModule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_baqe.callbacks.host import Host, RepeatsTraining, network_of
from lightning_baqe.errors import ConfigError
from lightning_baqe.quantization.batch_norm import Foldable, fold_batch_norm, foldable, freeze_batch_norm
from lightning_baqe.quantization.convert import QuantizedModel
from lightning_baqe.quantization.layers import QuantConv2d, QuantLinear


class FreezeBatchNorm(pl.Callback):
    """Train with batch norms unfolded, freeze their running statistics after some epochs, and perhaps fold them then.

    When epoch ``after_epochs`` (the first is 0) begins, every batch norm of the network starts to normalise by its
    running statistics and stops updating them, in training mode, too; see :func:`freeze_batch_norm`. Gains and shifts
    go on learning. HAWQ-V3 (Yao et al., 2021), section III-B, trains so.

    With ``fold`` the network, a fake-quantized one, is also folded at that moment, and training goes on at its bits;
    see :func:`fold_batch_norm`. Its parameters are then others, so that ``configure_optimizers`` is called again:

    - what a weight or weight scale had gathered (momentum, second moments) is dropped: their gradients have new units;
    - a layer's bias takes the place of the batch norm's shift and takes over what that had gathered, since their
      gradients are the same; what all other parameters had gathered stays;
    - schedulers go on where they were: learning rates are those that ``configure_optimizers`` now gives, times what
      the schedulers had made of them; other options of parameter groups stay as they were.

    A fit that is resumed is frozen from the start if it was frozen before. A checkpoint of a folded network loads into
    a network of the same bits, which is folded first; one that was written before the folding loads into an unfolded
    network only (:class:`lightning_baqe.tasks.ImageClassifier` restores either).

    Args:
        network: attribute of the LightningModule that holds the network; dots reach deeper.
        after_epochs: epochs of training before; 0 freezes from the start.
        fold: also fold.

    Raises:
        ConfigError: ``after_epochs`` out of range. When fit starts: no such network, or a
            :class:`~lightning_baqe.callbacks.BayesianSearch` beside it, whose trials share one count of epochs; with
            ``fold``, a network that is not fake-quantized, or a strategy other than one device and DDP. When folding: a
            ``configure_optimizers`` that leaves the layers' new biases out, or gives another number of optimizers,
            groups or schedulers than before.
        UnsupportedModelError: a batch norm without running statistics.
    """

    def __init__(self, network: str = "net", after_epochs: int = 1, fold: bool = False) -> None:
        super().__init__()
        if isinstance(after_epochs, bool) or not isinstance(after_epochs, int) or after_epochs < 0:
            raise ConfigError(
                f"after_epochs={after_epochs!r}, but a whole number of 0 or more is wanted: change after_epochs."
            )
        self.network, self.after_epochs, self.fold = network, after_epochs, fold
        self._frozen = False
        self._handle: RemovableHandle | None = None

    @property
    def state_key(self) -> str:
        """One for each network."""
        return self._generate_state_key(network=self.network)

    def state_dict(self) -> dict[str, Any]:
        """``frozen``: whether the statistics are."""
        return {"frozen": self._frozen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._frozen = bool(state_dict["frozen"])

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        network_of(pl_module, self.network)
        if self.fold:
            self._handle = pl_module.register_load_state_dict_pre_hook(self._follow)
        if stage != "fit":
            return
        if any(isinstance(callback, RepeatsTraining) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            raise ConfigError(
                "FreezeBatchNorm counts the epochs of one training, but each trial of BayesianSearch is a training of "
                "its own: leave one of the two callbacks out."
            )
        if self.fold and not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise ConfigError(
                f"fold=True makes the optimizer anew, which {type(trainer.strategy).__name__} does not allow: train on "
                "one device or with DDP, or give fold=False."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        network = network_of(pl_module, self.network)
        if self.fold and not isinstance(network, QuantizedModel):
            raise ConfigError(
                f"fold=True folds what lightning_baqe.quantize returned, but {type(pl_module).__name__}.{self.network} "
                f"is a {type(network).__name__}: quantize it first, or give fold=False."
            )
        if self._frozen:
            freeze_batch_norm(network)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch < self.after_epochs:
            return
        network = freeze_batch_norm(network_of(pl_module, self.network))
        self._frozen = True
        if self.fold:
            assert isinstance(network, QuantizedModel)
            self._fold(Host(trainer, pl_module, self.network), network)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _follow(self, module: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
        """Fold the network if the state that is about to be loaded is of a folded one."""
        network = network_of(module, self.network)
        if not isinstance(network, QuantizedModel):
            return
        within = f"{prefix}{self.network}."
        norms = tuple(f"{within}{name}." for pair in foldable(network) for name in pair.names)
        if norms and any(key.startswith(within) for key in state) and not any(key.startswith(norms) for key in state):
            fold_batch_norm(network)

    def _fold(self, host: Host, network: QuantizedModel) -> None:
        pairs = foldable(network)
        if not pairs:
            return
        fold_batch_norm(network)
        trainer, configure = host.trainer, f"{type(host.module).__name__}.configure_optimizers"
        optimizers = list(trainer.optimizers)
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        host.renew_optimizers()
        before, after = ([len(each.param_groups) for each in both] for both in (optimizers, trainer.optimizers))
        count = len(trainer.lr_scheduler_configs)
        if before != after or len(schedulers) != count:
            raise ConfigError(
                f"{configure} gave optimizers with {before} parameter groups and {len(schedulers)} schedulers before "
                f"the batch norms were folded, and {after} and {count} afterwards, so that what they had gathered "
                "cannot be handed over: let their number not depend on there being batch norms, or give fold=False."
            )
        for old, new in zip(optimizers, trainer.optimizers, strict=True):
            _hand_over(old, new, pairs)
        shifts, biases = _trained(optimizers), _trained(trainer.optimizers)
        left_out = [p.names[0] for p in pairs if id(p.norm.bias) in shifts and id(p.layer.bias) not in biases]
        if left_out:
            raise ConfigError(
                f"{configure} leaves out the bias that took the place of the shift of batch norm {left_out[0]!r} "
                f"({len(left_out)} in all): let it collect the parameters when it is called, or give fold=False."
            )
        for stood, config in zip(schedulers, trainer.lr_scheduler_configs, strict=True):
            _go_on(stood, config.scheduler)


def _trained(optimizers: list[torch.optim.Optimizer]) -> set[int]:
    return {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}


def _hand_over(old: torch.optim.Optimizer, new: torch.optim.Optimizer, pairs: tuple[Foldable, ...]) -> None:
    """Give a new optimizer what the old one had gathered about parameters whose gradients are still the same."""
    source: dict[int, nn.Parameter | None] = {}
    for pair in pairs:
        source[id(pair.layer.weight)] = None
        source[id(pair.layer.bias)] = pair.norm.bias
        if isinstance(pair.layer, QuantConv2d | QuantLinear):
            source[id(pair.layer.weight_quantizer.scale)] = None
    for before, group in zip(old.param_groups, new.param_groups, strict=True):
        for parameter in group["params"]:
            known = source.get(id(parameter), parameter)
            if known is not None and known in old.state:
                new.state[parameter] = old.state[known]
        group.update({key: value for key, value in before.items() if not key.startswith("param") and "lr" not in key})
        if before.get("initial_lr"):
            group["lr"] = group.get("initial_lr", group["lr"]) * (before["lr"] / before["initial_lr"])


def _go_on(old: Any, new: Any) -> None:
    """Let a new scheduler stand where the old one stood, on the learning rates of its own optimizer."""
    state = old.state_dict()
    own = {
        "base_lrs": getattr(new, "base_lrs", None),
        "_last_lr": [group["lr"] for group in new.optimizer.param_groups],
    }
    new.load_state_dict({key: own.get(key, value) for key, value in state.items()})
