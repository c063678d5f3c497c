"""Soft labels from a float teacher, in anybody's Trainer and with anybody's LightningModule."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_baqe.callbacks.host import network_of
from lightning_baqe.errors import ConfigError
from lightning_baqe.quantization.convert import QuantizedModel
from lightning_baqe.quantization.sensitivity import output_divergence

STEP = "training_step"
LOGGED = "distillation_loss"


class Distillation(pl.Callback):
    """Train a network on the soft labels of a float teacher as well as on its task.

    The loss of each training step becomes ``(1 - weight) * task loss + weight * distillation_loss(...)``. The teacher
    sees the very tensors that the student sees, before the student does, once for each forward of the student that
    records gradients; several in one step count by their mean. Loss, optimiser and loaders stay the module's own:
    its ``training_step`` returns a tensor, a dict with ``"loss"`` or None (a skipped batch), and is wrapped from
    ``on_fit_start`` to the end of fit. The student is looked up in each step, so other callbacks may replace it
    meanwhile, as :class:`BayesianSearch` does.

    The teacher is no part of the module: not of its parameters, its state_dict or its checkpoints. It runs without
    gradients and, while fit lasts, in eval mode and on the module's device.

    ``distillation_loss`` is logged in each step. Source: Hinton et al., "Distilling the Knowledge in a Neural Network",
    2015, section 2; HAWQ-V3 (Yao et al., 2021) tunes its quantized networks so.

    Args:
        network: attribute of the LightningModule that holds the student, ``x`` to logits ``(n, classes, ...)``; dots
            reach deeper.
        teacher: of the same inputs and outputs. None: a copy of the student before fit restores any checkpoint, which
            must still be float then.
        weight: share of the soft labels, 0 to 1.
        temperature: T, above 0; larger ones show more of what the teacher thinks of the wrong classes.
        independent: the outputs are labels of which any may hold (sigmoid), not classes (softmax); a single one always
            is.

    Raises:
        ConfigError: ``weight`` or ``temperature`` out of range. When fit starts: no such network, a quantized one
            without a teacher, a teacher that is part of the module, or manual optimisation. In training: a step that
            never calls the network or returns something else, or logits that do not fit.
    """

    def __init__(
        self,
        network: str = "net",
        teacher: nn.Module | None = None,
        weight: float = 0.5,
        temperature: float = 4.0,
        independent: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= weight <= 1:
            raise ConfigError(f"weight={weight!r}, but a number of 0 to 1 is wanted: change weight.")
        if not 0 < temperature < float("inf"):
            raise ConfigError(f"temperature={temperature!r}, but a finite number above 0 is wanted: change it.")
        self.network, self.teacher, self.weight, self.temperature = network, teacher, weight, temperature
        self.independent = independent
        self._teacher: nn.Module | None = None  # the one of the present fit
        self._undo: Callable[[], None] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the teacher, before a checkpoint that fit resumes from changes the student.

        Raises:
            ConfigError: see the class.
        """
        if stage != "fit":
            return
        student = network_of(pl_module, self.network)
        if not pl_module.automatic_optimization:
            raise ConfigError(
                f"{type(pl_module).__name__} optimises manually, so that nobody sees its loss before it is used: "
                "distillation needs automatic_optimization = True."
            )
        if self.teacher is None:
            if isinstance(student, QuantizedModel):
                raise ConfigError(
                    f"{type(pl_module).__name__}.{self.network} is quantized already, and teacher=None takes its float "
                    "copy as the teacher: give Distillation(teacher=float_network)."
                )
            self._teacher = copy.deepcopy(student)
            return
        theirs = {id(part) for part in (*self.teacher.modules(), *self.teacher.parameters())}
        if any(id(part) in theirs for part in (*pl_module.modules(), *pl_module.parameters())):
            raise ConfigError(
                f"the teacher shares modules or parameters with {type(pl_module).__name__}, which would train them: "
                "give teacher=copy.deepcopy(network), or teacher=None, which copies the float network."
            )
        self._teacher = self.teacher

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prepare the teacher and wrap ``training_step``."""
        assert self._teacher is not None
        modes = {part: part.training for part in self._teacher.modules()}
        self._teacher.to(pl_module.device).eval()
        before, step = pl_module.__dict__.get(STEP), getattr(pl_module, STEP)

        @functools.wraps(step)
        def distilled(*args: Any, **kwargs: Any) -> Any:
            return self._step(pl_module, step, *args, **kwargs)

        def undo() -> None:
            # Somebody who wrapped ours puts it back later; without a teacher it only passes calls on.
            if pl_module.__dict__.get(STEP) is distilled:
                if before is None:
                    delattr(pl_module, STEP)
                else:
                    setattr(pl_module, STEP, before)
            for part, training in modes.items():
                part.training = training

        self._undo = undo
        setattr(pl_module, STEP, distilled)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give ``training_step`` and the teacher back as they were."""
        if self._undo is not None:
            self._undo()
        self._teacher = self._undo = None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """The same as ``on_fit_end``."""
        self.on_fit_end(trainer, pl_module)

    def _step(self, module: pl.LightningModule, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A training step with the teacher's share in its loss."""
        teacher = self._teacher
        if teacher is None:
            return step(*args, **kwargs)
        waiting: list[Tensor] = []
        pairs: list[tuple[Tensor, Tensor]] = []

        def ask(student: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
            if torch.is_grad_enabled():
                with torch.no_grad():
                    waiting.append(teacher(*inputs, **options))

        def remember(student: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if torch.is_grad_enabled():
                pairs.append((output, waiting.pop()))

        student = network_of(module, self.network)
        # Hooks that outlived the step would be copied along with the network.
        handles = (
            student.register_forward_pre_hook(ask, with_kwargs=True),
            student.register_forward_hook(remember),
        )
        try:
            result = step(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        if result is None:
            return None
        loss = result.get("loss") if isinstance(result, Mapping) else result
        if not isinstance(loss, Tensor):
            raise ConfigError(
                f"{type(module).__name__}.training_step returned {type(result).__name__} without a loss; distillation "
                'wants a tensor, a dict with the tensor "loss", or None.'
            )
        if not pairs:
            raise ConfigError(
                f"{type(module).__name__}.training_step returned a loss without calling {self.network}: network= must "
                "name the module that it calls, by module(x) and not by module.forward(x)."
            )
        losses = [distillation_loss(*pair, self.temperature, self.independent) for pair in pairs]
        soft = torch.stack(losses).mean()
        module.log(LOGGED, soft.detach(), batch_size=sum(len(output) for output, _ in pairs))
        total = (1 - self.weight) * loss + self.weight * soft
        return {**result, "loss": total} if isinstance(result, Mapping) else total


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float, independent: bool = False) -> Tensor:
    """``T^2 KL(softmax(teacher / T) || softmax(student / T))``, in nats; the mean over all but the classes.

    ``T^2`` keeps the size of the gradients independent of T (Hinton et al., 2015, section 2). Of a single output,
    and of independent labels, it is the sum over them with the sigmoid in place of the softmax.

    Args:
        student: logits ``(n, classes, ...)``.
        teacher: logits of the same shape; no gradient flows there.
        temperature: T, above 0.
        independent: whether the outputs are labels of which any may hold.

    Returns:
        float32, shape ``()``.

    Raises:
        ConfigError: not both tensors, other shapes, or no dimension of classes.
    """
    for whose, logits in (("student", student), ("teacher", teacher)):
        if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.ndim < 2:
            found = f"{logits.dtype} {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise ConfigError(
                f"the {whose} gives {found}; distillation wants logits (n, classes, ...): name or give a network that "
                "returns them alone."
            )
    if student.shape != teacher.shape:
        raise ConfigError(
            f"the student gives logits {tuple(student.shape)} and the teacher {tuple(teacher.shape)}: give a teacher "
            "of the same classes."
        )
    soft = (teacher.float() / temperature, student.float() / temperature)
    return temperature**2 * output_divergence(*soft, "labels" if independent else "classes")
