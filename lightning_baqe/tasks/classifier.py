"""The classifier as a LightningModule, float or quantized, whose checkpoints restore either structure."""

from __future__ import annotations

from typing import Any, cast

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import Metric

from lightning_baqe.entrance.quantize import quantize
from lightning_baqe.errors import ConfigError, check_at_least
from lightning_baqe.quantization.activation import ACTIVATION_QUANTIZERS
from lightning_baqe.quantization.batch_norm import fold_batch_norm, is_folded
from lightning_baqe.quantization.batches import input_and_labels, network_input
from lightning_baqe.quantization.config import BitConfig
from lightning_baqe.quantization.convert import QuantizedModel
from lightning_baqe.tasks.optimizers import OPTIMIZERS, SCHEDULERS, make_optimizer, make_scheduler
from lightning_baqe.tasks.scoring import align, check_metric, default_metric, kind_of

CHECKPOINT_KEY = "lightning_baqe"
STAGES = ("train", "val", "test")


class ImageClassifier(pl.LightningModule):
    """The loss and the accuracy that outputs and targets call for; batches are ``(x, y)``, ``x`` ``(n, 3, h, w)``.

    Class indices, ``(n,)`` for outputs ``(n, classes)`` or ``(n, h, w)`` for ``(n, classes, h, w)``: cross entropy.
    0 or 1, of the shape of the outputs or ``(n,)`` for a single one ``(n, 1)``: binary cross entropy, of logits.

    Dicts with both under usual names will do, too: see :mod:`lightning_baqe.quantization.batches`.

    A checkpoint of it knows whether the network was quantized, and how: the structure is restored before the weights,
    whatever the structure of the module that loads it. So all of these continue exactly where the checkpoint was
    written, with ``net`` the float network each time::

        ImageClassifier.load_from_checkpoint(path, net=net)
        trainer.fit(ImageClassifier(net, 10), datamodule, ckpt_path=path)      # also validate, test, predict

    It logs ``{train,val,test}/{loss,acc}``, each with ``log_prefix`` before it.

    Attributes:
        net: the network as it is trained: what was given, or its fake-quantized copy.

    Args:
        net: logits ``(n, num_classes, ...)`` of ``x``. Kept out of the hyperparameters.
        num_classes: outputs of ``net``: classes, independent labels, or 1 for two classes.
        learning_rate: the largest, if there is a scheduler.
        weight_decay: of weights, not of biases, batch norms and quantizers.
        optimizer: ``"adamw"``, ``"sgd"`` or ``"rmsprop"``; see :func:`lightning_baqe.tasks.optimizers.make_optimizer`.
        scheduler: ``"none"``, ``"cosine"``, ``"warmup_cosine"`` or ``"onecycle"``; all but the first need a Trainer
            with an end.
        label_smoothing: 0 to below 1.
        log_prefix: ``"float/"`` logs ``float/train/loss``.
        metric: what ``acc`` is, a torchmetrics metric of which higher is better; each stage has a copy. Kept out of the
            hyperparameters. None: :func:`lightning_baqe.tasks.scoring.default_metric` of the first batch.

    Raises:
        ConfigError: an argument out of range; in the first step, outputs and targets without a known loss or metric.
    """

    def __init__(
        self,
        net: nn.Module,
        num_classes: int,
        learning_rate: float = 1e-4,
        weight_decay: float = 1e-2,
        optimizer: str = "adamw",
        scheduler: str = "none",
        label_smoothing: float = 0.0,
        log_prefix: str = "",
        metric: Metric | None = None,
    ) -> None:
        super().__init__()
        check_at_least("num_classes", num_classes, 1)
        if metric is not None:
            check_metric(metric)
        for argument, value, fits, wanted in (
            ("learning_rate", learning_rate, learning_rate > 0, "a number above 0"),
            ("weight_decay", weight_decay, weight_decay >= 0, "a number of 0 or more"),
            ("label_smoothing", label_smoothing, 0 <= label_smoothing < 1, "a number of 0 to below 1"),
            ("optimizer", optimizer, optimizer in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}"),
            ("scheduler", scheduler, scheduler in SCHEDULERS, f"one of {', '.join(SCHEDULERS)}"),
        ):
            if not fits:
                raise ConfigError(f"{argument}={value!r}, but {wanted} is wanted: change {argument}.")
        self.save_hyperparameters(ignore=["net", "metric"])
        self.net = net
        # In a tuple, so that it is no submodule: the float network that every quantized structure is made from.
        self._float = (net,)
        self._metric = (metric,)
        self.accuracy = nn.ModuleDict()
        if metric is not None:
            self._copy(metric)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(n, num_classes, ...)`` of ``(n, 3, h, w)``."""
        logits: Tensor = self.net(x)
        return logits

    @property
    def metric(self) -> Metric | None:
        """What was given."""
        return self._metric[0]

    def quantize(self, bits: BitConfig, example_input: Tensor, **options: str) -> QuantizedModel:
        """Replace ``net`` by its fake-quantized copy, which then needs ``baqe.calibrate`` before training.

        Args:
            bits: for each layer of ``net``.
            example_input: a batch of any size, ``(n, 3, h, w)``.
            options: of :func:`lightning_baqe.quantize`.

        Returns:
            the new ``net``.

        Raises:
            ConfigError: ``net`` is quantized already, or bits or options that do not fit.
            UnsupportedModelError: ``net`` cannot be traced.
        """
        quantized = quantize(self.net, bits, example_input=example_input, **options)
        self._float = (self.net,)
        self.net = quantized
        return quantized

    @property
    def structure(self) -> dict[str, Any]:
        """What a checkpoint says about ``net``, of plain values: ``bits`` (JSON; None: float), ``example_shape``
        (one image's; None: unknown), ``options`` of ``quantize`` and whether batch norms were ``folded``."""
        if not isinstance(self.net, QuantizedModel):
            return {"bits": None, "example_shape": None, "options": {}, "folded": False}
        record = self.net.record
        options = {}
        for name, kind in ACTIVATION_QUANTIZERS.items():
            for quantizer in self.net.quantizers().values():
                if isinstance(quantizer, kind):
                    options = {"activation_quantizer": name, "activation_range": quantizer.range_method}
        shape = list(record.input_shape)
        folded = is_folded(self.net)
        return {"bits": record.bits.to_json(), "example_shape": shape, "options": options, "folded": folded}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the structure."""
        checkpoint[CHECKPOINT_KEY] = self.structure

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give ``net`` the checkpoint's structure; Lightning calls this before it loads the weights.

        Raises:
            ConfigError: ``net`` has another structure and cannot be rebuilt: it was quantized when it was given, or
                the Trainer's strategy makes the optimizer before it reads checkpoints.
        """
        if CHECKPOINT_KEY not in checkpoint:
            return
        wanted = {"folded": False} | checkpoint[CHECKPOINT_KEY]  # of earlier versions: not folded
        if wanted == self.structure:
            return
        strategy = None if self._trainer is None else self._trainer.strategy
        if strategy is not None and strategy.restore_checkpoint_after_setup:
            raise ConfigError(
                f"{type(strategy).__name__} makes the optimizer before it reads the checkpoint, and the checkpoint has "
                "another structure than net: use ImageClassifier.load_from_checkpoint(path, net=net) first."
            )
        if isinstance(self.net, QuantizedModel) and wanted == self.structure | {"folded": True}:
            fold_batch_norm(self.net)
            return
        (float_net,) = self._float
        if isinstance(float_net, QuantizedModel):
            raise ConfigError(
                "the checkpoint has another structure than net, and net was quantized when it was given: give the "
                "float network, ImageClassifier(net=float_network, ...); the checkpoint quantizes it."
            )
        device, self.net = self.device, float_net
        if wanted["bits"] is not None:
            shape = wanted["example_shape"]
            example = None if shape is None else torch.zeros(1, *shape)
            bits = BitConfig.from_json(wanted["bits"])
            quantized = quantize(float_net, bits, example_input=example, **wanted["options"])
            self.net = fold_batch_norm(quantized) if wanted["folded"] else quantized
        self.net.to(device).train(self.training)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of one batch, scalar."""
        return self._step("train", batch)

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of one batch, scalar."""
        return self._step("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of one batch, scalar."""
        return self._step("test", batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Logits ``(n, num_classes, ...)``."""
        logits: Tensor = self(network_input(batch, "the predict loader", ConfigError))
        return logits

    def _step(self, stage: str, batch: Any) -> Tensor:
        x, y = input_and_labels(batch, f"the {stage} loader", ConfigError)
        logits = self(x)
        is_training = stage == "train"
        smoothing = self.hparams["label_smoothing"] if is_training else 0.0
        loss = loss_of(logits, y, smoothing)
        if not self.accuracy:
            self._copy(default_metric(logits.detach(), y))
        metric = cast(Metric, self.accuracy[f"{stage}_accuracy"])
        metric.update(*align(metric, logits.detach(), y, logits=True))
        prefix = f"{self.hparams['log_prefix']}{stage}"
        options: dict[str, Any] = {"batch_size": len(y), "prog_bar": stage != "test"}
        self.log(f"{prefix}/loss", loss, on_step=is_training, on_epoch=not is_training, **options)
        self.log(f"{prefix}/acc", metric, on_step=False, on_epoch=True, **options)
        return loss

    def _copy(self, metric: Metric) -> None:
        """Give each stage a metric of its own."""
        for stage in STAGES:
            fresh = metric.clone().to(self.device)
            fresh.reset()
            self.accuracy[f"{stage}_accuracy"] = fresh

    def configure_optimizers(self) -> Any:
        """The optimizer, and the scheduler, if there is one, stepped after each batch.

        Raises:
            CalibrationError: AdamW, and a quantizer has no scale yet.
            ConfigError: a scheduler, and a Trainer without an end.
        """
        options = self.hparams
        optimizer = make_optimizer(options["optimizer"], self.net, options["learning_rate"], options["weight_decay"])
        if options["scheduler"] == "none":
            return optimizer
        scheduler = make_scheduler(options["scheduler"], optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def loss_of(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The loss that logits and targets call for, the mean over all targets.

    Args:
        logits: ``(n, classes, ...)`` for class indices ``(n, ...)``: cross entropy. Otherwise of the targets' shape, or
            ``(n, 1)`` for targets ``(n,)``, which are 0 or 1: binary cross entropy.
        targets: of the same batch.
        label_smoothing: 0 to below 1.

    Raises:
        ConfigError: neither of them.
    """
    kind = kind_of(logits.detach(), targets)
    if kind == "classes":
        return functional.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    if kind == "labels":
        wanted = targets.reshape(logits.shape).to(logits.dtype)
        smooth = wanted * (1 - label_smoothing) + label_smoothing / 2
        return functional.binary_cross_entropy_with_logits(logits, smooth)
    raise ConfigError(
        f"ImageClassifier has no loss for outputs {tuple(logits.shape)} and targets {targets.dtype} "
        f"{tuple(targets.shape)}: it takes class indices (n, ...) for outputs (n, classes, ...), or 0 and 1 of the "
        "outputs' shape. Use a LightningModule of your own for other tasks."
    )
