"""Oscillating weights: damping's gradient in closed form, weights that are held, fits that go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_baqe as baqe
from lightning_baqe.callbacks import Oscillations
from lightning_baqe.errors import ConfigError
from lightning_baqe.quantization.layers import outputs_first
from lightning_baqe.quantization.sensitivity import quantizers_of_layers

X = torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Foreign(pl.LightningModule):
    """Somebody's; the gradient of every weight turns at each step."""

    def __init__(self, net: nn.Module, rate: float) -> None:
        super().__init__()
        self.net, self.rate, self.sign = net, rate, 1.0
        self.seen: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        sign = 2 * (self.global_step % 2) - 1
        self.seen.append(next(p for p in self.net.parameters() if p.ndim > 1).detach().clone())
        return sign * sum(p.sum() for p in self.net.parameters() if p.ndim > 1) + 0 * self.net(batch[0]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.net.parameters() if p.ndim > 1], self.rate)


def quantized(bits: int = 3) -> baqe.QuantizedModel:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 4, 2, groups=2), nn.Flatten(), nn.Linear(100, 2)
    ).eval()
    uniform = baqe.BitConfig.uniform(net, bits, 8, first_last=None)
    return baqe.calibrate(baqe.quantize(net, uniform, X), [X]).train()


def fit(net: nn.Module, callbacks: list[pl.Callback], rate: float, steps: int, path: Path | None = None) -> Foreign:
    module = Foreign(net, rate)
    trainer = pl.Trainer(
        max_steps=steps, callbacks=callbacks, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(X), 6), ckpt_path=path)
    return module


def own(layer: nn.Module) -> Tensor:
    return outputs_first(layer).detach()


def layers(net: nn.Module) -> list[Any]:
    return [net.get_submodule(of.path) for of in quantizers_of_layers(net).values()]  # type: ignore[arg-type]


class NoGradients(pl.Callback):
    """Of the loss."""

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for parameter in pl_module.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()


def test_damping_pulls_to_the_middle_of_integers() -> None:
    """Alone, with a rate of a half, the last step, which is at full strength, ends on the grid: w - rate * 2 (w - q);
    the first one, at none, leaves all as it is."""
    net = quantized()
    before = [own(layer).clone() for layer in layers(net)]
    on_grid = [layer.weight_quantizer(own(layer)).detach() for layer in layers(net)]
    fit(net, [NoGradients(), Oscillations(damping=1.0)], 0.5, 2)
    for layer, old, wanted in zip(layers(net), before, on_grid, strict=True):
        weight, scale = own(layer), layer.weight_quantizer.scale.detach()
        inside = (old - wanted).abs() <= scale.reshape(-1, *[1] * (weight.ndim - 1)) / 2
        assert inside.float().mean() > 0.5
        torch.testing.assert_close(weight[inside], wanted[inside])
        assert torch.equal(weight[~inside], old[~inside])  # beyond the range clipping decides


def test_weights_that_turn_are_held() -> None:
    net = quantized()
    scale = float(layers(net)[0].weight_quantizer.scale.detach().mean())
    free = fit(quantized(), [Oscillations(freeze_above=1.0)], 0.9 * scale, 40)
    assert not torch.equal(free.seen[-1], free.seen[-2])
    of = Oscillations(freeze_above=0.05)
    held = fit(net, [of], 0.9 * scale, 40)
    assert of.frozen > 0.3
    for layer in layers(net):
        integers, step = layer.weight_quantizer.integers(own(layer))
        track = of._tracks[next(name for name, module in net.named_modules() if module is layer)]
        assert torch.equal(integers[track["held"]].float(), track["integers"][track["held"]])
        shaped = (integers * step.reshape(-1, *[1] * (integers.ndim - 1))).float()
        torch.testing.assert_close(own(layer)[track["held"]], shaped[track["held"]])
    first = of._tracks[next(name for name, module in net.named_modules() if module is layers(net)[0])]["held"]
    assert torch.equal(held.seen[-1][first], held.seen[-2][first])
    assert not torch.equal(held.seen[-1][~first], held.seen[-2][~first])


def test_a_fit_goes_on(tmp_path: Path) -> None:
    whole, at_once, rate = quantized(), Oscillations(freeze_above=0.03), 0.1
    fit(whole, [at_once], rate, 12)
    half, of = quantized(), Oscillations(freeze_above=0.03)
    module = Foreign(half, rate)
    trainer = pl.Trainer(
        max_steps=9, callbacks=[of], accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(X), 6))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    rest, later = quantized(), Oscillations(freeze_above=0.03)
    fit(rest, [later], rate, 12, tmp_path / "half.ckpt")
    assert of.frozen > 0 or any(bool(track["often"].any()) for track in of._tracks.values())
    for name, track in at_once._tracks.items():
        for key, values in track.items():
            torch.testing.assert_close(values, later._tracks[name][key], msg=f"{name} {key}")
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(tensor, rest.state_dict()[name], msg=name)


@pytest.mark.parametrize("options", [{"damping": -1.0}, {"freeze_above": 0.0}, {"freeze_above": 2.0}])
def test_what_cannot_be_right(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(options))}={next(iter(options.values()))}"):
        Oscillations(**options)
    with pytest.raises(ConfigError, match="'net' is a Linear, whose weights have no integers"):
        fit(nn.Linear(3, 2), [Oscillations(damping=1.0)], 0.1, 1)
