"""Three phases in a plain Trainer with somebody's module, and across interruptions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import lightning_baqe as baqe
from lightning_baqe.callbacks import LearnedBits
from lightning_baqe.errors import ConfigError, InfeasibleError
from lightning_baqe.learned_bits.learned_network import LearnedNetwork, learn_bits
from lightning_baqe.learned_bits.pressure import Admm, Pressure, Ramp

Y = torch.arange(32) % 3
X = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0)) + 2 * functional.one_hot(Y, 3)[..., None, None]


class Foreign(pl.LightningModule):
    """Somebody's, with weight decay on everything."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.body = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return functional.cross_entropy(self.body(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 3e-3, weight_decay=0.5)


def learned(bits: int = 8) -> LearnedNetwork:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3)
    ).eval()
    network = learn_bits(net, [X], bits, X)
    network.model.train()
    return network


def make_callback(network: LearnedNetwork, **more: Any) -> LearnedBits:
    options = {"weights": 3, "activations": 4, "every": 2, "pretrain_epochs": 1, "learn_epochs": 8}
    return LearnedBits(network, **(options | more))


class Watch(pl.Callback):
    """Mean bits at the end of each epoch; ends fit after one of them."""

    def __init__(self, network: LearnedNetwork, last: int | None = None) -> None:
        self.network, self.last = network, last
        self.bits: list[list[float]] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.bits.append([float(of.bits().detach()) for of in self.network.quantizers])
        trainer.should_stop = trainer.current_epoch == self.last


def fit(
    network: LearnedNetwork, callbacks: list[pl.Callback], folder: Path, path: Path | None = None, **more: Any
) -> pl.Trainer:
    options: dict[str, Any] = {"max_epochs": 12, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(callbacks=callbacks, default_root_dir=folder, **(options | quiet | more))
    trainer.fit(Foreign(network.model), DataLoader(TensorDataset(X, Y), 4), ckpt_path=path)
    return trainer


def test_three_phases(tmp_path: Path) -> None:
    network = learned()
    of, watch = make_callback(network), Watch(network)
    fit(network, [of, watch], tmp_path)
    assert watch.bits[0] == pytest.approx([8.0] * len(watch.bits[0]), abs=1e-3)
    assert watch.bits[4] != pytest.approx(watch.bits[3], abs=1e-3)
    for bits in watch.bits[9:]:
        assert bits == pytest.approx([round(b) for b in bits], abs=1e-3)
    assert len(of.curve) == 8 * 8 // 2
    assert of.curve[-1][:2] == pytest.approx([3, 4], rel=0.03)
    assert of.bits is not None
    counts = {name: quantizer.values for name, quantizer in network.weights.items()}
    assert sum(of.bits[name].weight * n for name, n in counts.items()) <= 3 * sum(counts.values())
    model = network.deployable(of.bits).eval()
    assert (baqe.lower(model).run(X).argmax(1) == Y).float().mean() > 0.9


@pytest.mark.parametrize(("last", "pressure"), [(0, None), (3, None), (8, None), (10, None), (3, Admm)])
def test_an_interrupted_fit_goes_on_exactly(last: int, pressure: type[Pressure] | None, tmp_path: Path) -> None:
    def callback(network: LearnedNetwork) -> LearnedBits:
        return make_callback(network, pressure=pressure and [pressure(), pressure()])

    whole = learned()
    of = callback(whole)
    fit(whole, [of], tmp_path)
    first = learned()
    trainer = fit(first, [callback(first), Watch(first, last)], tmp_path)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    second = learned()
    again = callback(second)
    fit(second, [again], tmp_path, tmp_path / "half.ckpt")
    assert again.bits == of.bits
    assert again.curve == of.curve
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name


def test_gradients_that_are_accumulated_count_as_one_step(tmp_path: Path) -> None:
    network = learned()
    of = make_callback(network, learn_epochs=4, learning_rate=0.5)
    fit(network, [of], tmp_path, max_epochs=6, accumulate_grad_batches=2)
    assert len(of.curve) == 4 * 8 // 2 // 2
    assert max(of.curve[-1][:2]) < 7


def test_the_optimisers_of_the_module_leave_quantizers_alone(tmp_path: Path) -> None:
    network = learned()
    before = [parameter.detach().clone() for of in network.quantizers for parameter in of.parameters()]
    of = make_callback(network, learning_rate=1e-12, pressure=[Ramp(1e-9), Ramp(1e-9)])
    fit(network, [of], tmp_path, max_epochs=10, limit_train_batches=2)
    after = [parameter.detach() for of in network.quantizers for parameter in of.parameters()]
    moved = [float((a - b).abs().max()) for a, b in zip(before, after, strict=True)]
    # Ranges; levels are those of the last epoch's whole bits.
    assert max(moved[0::2]) < 1e-6


def test_multipliers_reach_the_target_too(tmp_path: Path) -> None:
    network = learned()
    of = make_callback(network, pressure=[Admm(), Admm()])
    fit(network, [of], tmp_path)
    assert of.curve[-1][:2] == pytest.approx([3, 4], rel=0.15)
    assert of.bits is not None
    counts = {name: quantizer.values for name, quantizer in network.weights.items()}
    assert sum(of.bits[name].weight * n for name, n in counts.items()) <= 3 * sum(counts.values())


class Overflow(pl.Callback):
    """Gradients of some steps overflow, as in mixed precision; their step is left out."""

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if trainer.global_step % 5 == 2:
            for parameter in pl_module.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(torch.inf if id(parameter) in self.quantizers else 0.0)

    def __init__(self, network: LearnedNetwork) -> None:
        self.quantizers = set(map(id, network.parameters()))


def test_gradients_that_overflow_are_left_out(tmp_path: Path) -> None:
    network = learned()
    of = make_callback(network)
    fit(network, [Overflow(network), of], tmp_path)
    assert all(bool(torch.isfinite(parameter).all()) for parameter in network.parameters())
    assert of.curve[-1][:2] == pytest.approx([3, 4], rel=0.05)


def test_every_quantizer_has_a_gradient_in_every_phase() -> None:
    network = learned(4)
    for quantizer in network.quantizers:
        quantizer.fix(3)
    functional.cross_entropy(network.model(X), Y).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_bits_of_pretraining_in_turn(tmp_path: Path) -> None:
    network = learned(7)
    of, watch = make_callback(network, pretrain_epochs=5, learn_epochs=1, start=(7, 5, 3)), Watch(network)
    fit(network, [of, watch], tmp_path, max_epochs=7)
    layers = len(network.weights) + len(network.activations)
    for bits, wanted in zip(watch.bits, (7, 7, 5, 5, 3), strict=False):
        assert bits[:layers] == pytest.approx([wanted] * layers, abs=1e-3)


def test_targets_in_bytes_count_what_is_not_quantized(tmp_path: Path) -> None:
    network = learned()
    apart = 2 * (2 * 8 + 8 + 8 + 3)  # a batch norm and three biases
    assert network.unquantized_bytes == apart
    weights, activations = network.bytes_of(3)
    of = make_callback(
        network, weights=None, activations=None, weight_bytes=weights + apart, activation_bytes=activations
    )
    assert of.targets == make_callback(network, weights=3, activations=3).targets
    message = "weight_bytes=300 cannot be reached: the smallest network, of 2 bits, has 294 bytes of weights, and 70 "
    with pytest.raises(InfeasibleError, match=message):
        make_callback(network, weights=None, weight_bytes=300)
    for both in ({"weight_bytes": 900}, {"weights": None}):
        with pytest.raises(ConfigError, match="but one of the two is wanted, the other None"):
            make_callback(network, **both)
    for start, wanted in (((), "one or more"), ((9,), "2 to 8"), ((8, 4), "2 bits in turn for 1 epochs")):
        with pytest.raises(ConfigError, match=wanted):
            make_callback(network, start=start)


def test_what_cannot_be_right(tmp_path: Path) -> None:
    network = learned()
    with pytest.raises(
        InfeasibleError, match=r"weights=1.5 mean bits .* smallest network, of 2 bits, has 294 bytes of weights"
    ):
        make_callback(network, weights=1.5)
    for option, message in (
        ({"every": 0}, "every"), ({"learn_epochs": 0}, "learn_epochs"), ({"learning_rate": 0.0}, "learning_rate=0.0"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            make_callback(network, **option)
    with pytest.raises(ConfigError, match="max_epochs=9, but 1 epochs at fixed bits and 8 of learning"):
        fit(network, [make_callback(network)], tmp_path, max_epochs=9)
    with pytest.raises(ConfigError, match="learn_epochs=8 are 64 steps; the quantizers learn at every 65th"):
        fit(network, [make_callback(network, every=65)], tmp_path)
    with pytest.raises(ConfigError, match="max_steps=20 ends fit before"):
        fit(network, [make_callback(network)], tmp_path, max_steps=20)
    other = learned()
    with pytest.raises(ConfigError, match=r"Foreign does not hold the learned network"):
        fit(other, [make_callback(network)], tmp_path)
