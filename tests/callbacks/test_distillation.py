"""Distillation in plain Trainers and somebody else's module."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from foreign_module import ForeignModule, SmallResNet, random_loader
from torch import Tensor, nn
from torch.distributions import Bernoulli, kl_divergence
from torch.nn import functional

import lightning_baqe as baqe
from lightning_baqe.callbacks import Distillation
from lightning_baqe.callbacks.distillation import distillation_loss
from lightning_baqe.errors import ConfigError

NETWORK = "body.classifier"


class Recorder(pl.Callback):
    """Losses that Lightning trained on."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        if outputs:
            self.losses.append(float(outputs["loss"]))


def fit(module: pl.LightningModule, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    plain = {"max_steps": 2, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
             "enable_model_summary": False, "accelerator": "cpu", "limit_val_batches": 0}  # fmt: skip
    trainer = pl.Trainer(**{**plain, **options}, callbacks=list(callbacks))
    trainer.fit(module, random_loader(), random_loader())
    return trainer


def make(kind: type[ForeignModule] = ForeignModule, seed: int = 0) -> ForeignModule:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind()


def other_net() -> SmallResNet:
    found = make(seed=1).body.classifier
    assert isinstance(found, SmallResNet)
    return found


def quantized() -> ForeignModule:
    module = make()
    net = module.body.classifier
    bits = baqe.BitConfig.uniform(net, 8, 8)
    module.body.classifier = baqe.calibrate(baqe.quantize(net, bits, torch.zeros(1, 3, 32, 32)), random_loader())
    return module


def test_the_loss_is_the_closed_form() -> None:
    student = torch.tensor([[1.0, 2.0, -1.0], [0.0, 0.0, 3.0]], requires_grad=True)
    teacher = torch.tensor([[2.0, 0.0, 1.0], [0.5, -0.5, 1.0]], requires_grad=True)
    loss = distillation_loss(student, teacher, 3.0)
    p, q = (teacher / 3).softmax(1), (student / 3).softmax(1)
    assert torch.allclose(loss, 9 * (p * (p / q).log()).sum(1).mean())
    loss.backward()
    assert student.grad is not None
    assert torch.allclose(student.grad, 3 * (q - p).detach() / 2, atol=1e-6)
    assert teacher.grad is None
    assert float(distillation_loss(teacher, teacher, 3.0).detach().abs()) < 1e-6


def test_maps_of_classes_count_by_place() -> None:
    student, teacher = torch.randn(2, 2, 5, 3, 4).unbind()
    rows = [logits.movedim(1, -1).reshape(-1, 5) for logits in (student, teacher)]
    assert torch.allclose(distillation_loss(student, teacher, 2.0), distillation_loss(rows[0], rows[1], 2.0))


def test_one_output_and_labels_have_probabilities_of_their_own() -> None:
    student, teacher = torch.randn(2, 6, 3).unbind()
    for logits, of, independent in ((student, teacher, True), (student[:, :1], teacher[:, :1], False)):
        truth, model = (Bernoulli(logits=x / 2) for x in (of, logits))
        wanted = 4 * kl_divergence(truth, model).sum(1).mean()
        assert torch.allclose(distillation_loss(logits, of, 2.0, independent), wanted)


class Dictionary(ForeignModule):
    def training_step(self, batch: Any, index: int) -> Any:
        return {"loss": super().training_step(batch, index), "images": len(batch[0])}


@pytest.mark.parametrize("kind", [ForeignModule, Dictionary])
def test_the_step_is_that_of_the_mixed_loss(kind: type[ForeignModule]) -> None:
    module, teacher, recorder = make(kind), other_net(), Recorder()
    expected = copy.deepcopy(module).train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    trainer = fit(module, Distillation(NETWORK, teacher, 0.3, 2.5), recorder, max_steps=1)

    torch.manual_seed(0)
    x, y = next(iter(random_loader()))
    logits = expected.body.classifier(x)
    soft = distillation_loss(logits, teacher.eval()(x), 2.5)
    loss = 0.7 * functional.cross_entropy(logits, y, label_smoothing=0.05) + 0.3 * soft
    assert recorder.losses == pytest.approx([float(loss.detach())], rel=1e-5)
    assert float(trainer.callback_metrics["distillation_loss"]) == pytest.approx(float(soft.detach()), rel=1e-5)
    loss.backward()
    for (name, got), start in zip(module.named_parameters(), expected.parameters(), strict=True):
        assert start.grad is not None
        assert torch.allclose(got, start - 0.01 * start.grad, atol=1e-6), name
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name])  # batch norm's running means, too
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_all_weight_on_the_teacher_teaches() -> None:
    module, teacher = make(), other_net()
    module.body.classifier.load_state_dict(teacher.state_dict())
    nn.init.zeros_(module.body.classifier.head.weight)
    x = next(iter(random_loader()))[0]

    def distance() -> float:
        module.eval()
        teacher.eval()
        return float(distillation_loss(module.body.classifier(x), teacher(x), 1.0).detach())

    before = distance()
    module.train()
    fit(module, Distillation(NETWORK, teacher, 1.0, 1.0), max_steps=20)
    assert distance() < 0.5 * before


def test_nothing_of_it_is_left_behind(tmp_path: Path) -> None:
    module, teacher = make(), other_net().train()
    names = list(module.state_dict())
    trainer = fit(module, Distillation(NETWORK, teacher))
    assert list(module.state_dict()) == names
    assert "training_step" not in vars(module)
    assert teacher.training
    assert teacher.block.bn1.training
    net = module.body.classifier
    assert not net._forward_hooks
    assert not net._forward_pre_hooks
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert list(content["state_dict"]) == names
    assert not content["callbacks"]


def test_an_own_training_step_of_the_object_comes_back() -> None:
    module = make()
    original = module.training_step

    def step(self: ForeignModule, batch: Any, index: int) -> Tensor:
        return original(batch, index)

    own = MethodType(step, module)
    module.training_step = own  # type: ignore[method-assign]
    fit(module, Distillation(NETWORK))
    assert module.training_step is own


def test_two_teachers_at_once() -> None:
    module, recorder = make(), Recorder()
    fit(module, Distillation(NETWORK, other_net()), Distillation(NETWORK, weight=0.1), recorder)
    assert len(recorder.losses) == 2
    steps = random_loader()
    loss = module.training_step(next(iter(steps)), 0)  # what is left of them passes calls on
    assert torch.isfinite(loss)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_training_step_comes_back_after_an_error(error: type[BaseException]) -> None:
    class Broken(ForeignModule):
        def training_step(self, batch: Any, index: int) -> Tensor:
            raise error("on purpose")

    module = make(Broken)
    with pytest.raises((error, SystemExit)):
        fit(module, Distillation(NETWORK))
    assert "training_step" not in vars(module)
    assert not module.body.classifier._forward_hooks


def test_the_copy_is_the_teacher() -> None:
    module, recorder = make(), Recorder()
    reference = copy.deepcopy(module.body.classifier)
    fit(module, Distillation(NETWORK, weight=1.0, temperature=1.0), recorder, max_steps=2)
    batches = [x for x, _ in random_loader()]
    with torch.no_grad():
        theirs = [reference.eval()(x) for x in batches]
        ours = reference.train()(batches[0])
        first = distillation_loss(ours, theirs[0], 1.0)  # not 0: batch statistics against running ones
    assert recorder.losses[0] == pytest.approx(float(first), rel=1e-4)
    assert recorder.losses[1] != recorder.losses[0]


def test_a_quantized_student_with_a_teacher() -> None:
    module, recorder = quantized(), Recorder()
    fit(module, Distillation(NETWORK, make().body.classifier, 0.9, 2.0), recorder)
    assert len(recorder.losses) == 2


def test_the_network_is_found_again_in_every_step() -> None:
    seen: list[nn.Module] = []

    class Swap(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, index: int) -> None:
            module.body.classifier = other_net()
            module.body.classifier.register_forward_hook(lambda net, inputs, output: seen.append(net))
            trainer.strategy.setup_optimizers(trainer)

    recorder = Recorder()
    fit(make(), Distillation(NETWORK), Swap(), recorder)
    assert len({id(net) for net in seen}) == len(recorder.losses) == 2


def test_it_works_in_a_search(foreign: Callable[..., Any], search: Callable[..., Any], digits: Any) -> None:
    module, recorder = foreign(), Recorder()
    kind = type(module.body.classifier)
    trainer = pl.Trainer(max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                         enable_model_summary=False, accelerator="cpu",
                         callbacks=[Distillation(NETWORK), search(trials=2), recorder])  # fmt: skip
    trainer.fit(module, digits)
    assert type(module.body.classifier) is kind
    assert "training_step" not in vars(module)
    assert len(recorder.losses) >= 3


def test_the_teacher_sees_what_the_student_saw() -> None:
    class Scribbler(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(0.5))

    class Watch(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            inputs.append(x.clone())
            return super().forward(x)

    inputs: list[Tensor] = []
    module = make()
    module.body.classifier = Scribbler(other_net())
    fit(module, Distillation(NETWORK, Watch(other_net())), max_steps=1)
    (seen,) = inputs
    assert torch.equal(seen, next(iter(random_loader()))[0])


@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_skipped_batches_stay_skipped() -> None:
    class Skips(ForeignModule):
        def training_step(self, batch: Any, index: int) -> Any:
            return None if index == 0 else super().training_step(batch, index)

    recorder = Recorder()
    fit(make(Skips), Distillation(NETWORK), recorder, max_steps=-1, max_epochs=1)
    assert len(recorder.losses) == 1


class NeverCalls(ForeignModule):
    def training_step(self, batch: Any, index: int) -> Tensor:
        return functional.cross_entropy(self.body.classifier.forward(batch[0]), batch[1])


class Strange(ForeignModule):
    def training_step(self, batch: Any, index: int) -> Any:
        super().training_step(batch, index)
        return {"value": 1}


class Manual(ForeignModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"weight=1\.5, but a number of 0 to 1"):
        Distillation(weight=1.5)
    with pytest.raises(ConfigError, match=r"temperature=0, but a finite number above 0"):
        Distillation(temperature=0)
    for module, callback, message in (
        (make(), Distillation("net"), r"has no 'net'; .* it has \['body'\]"),
        (make(), Distillation("installed"), "is a list"),
        (quantized(), Distillation(NETWORK), r"give Distillation\(teacher=float_network\)"),
        (make(NeverCalls), Distillation(NETWORK), "without calling body.classifier"),
        (make(Strange), Distillation(NETWORK), 'a dict with the tensor "loss"'),
        (make(Manual), Distillation(NETWORK), "automatic_optimization = True"),
        (make(), Distillation(NETWORK, SmallResNet(classes=7)), r"\(32, 10\) and the teacher \(32, 7\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            fit(module, callback)
        assert "training_step" not in vars(module)
    module = make()
    with pytest.raises(ConfigError, match="shares modules or parameters"):
        fit(module, Distillation(NETWORK, module.body.classifier))


def test_logits_alone_are_wanted() -> None:
    with pytest.raises(ConfigError, match="the teacher gives tuple"):
        distillation_loss(torch.zeros(2, 3), (torch.zeros(2, 3),), 1.0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"the student gives torch.float32 \(2,\)"):
        distillation_loss(torch.zeros(2), torch.zeros(2, 3), 1.0)
