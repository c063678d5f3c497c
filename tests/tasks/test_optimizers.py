"""Optimizers and schedules in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import TinyData, tiny_net

import lightning_baqe as baqe
from lightning_baqe.tasks.optimizers import make_optimizer, make_scheduler


def rates(name: str, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 2.0)
    scheduler, found = make_scheduler(name, optimizer, steps), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_the_rate_rises_evenly_and_falls_as_a_cosine() -> None:
    found = rates("warmup_cosine", 100)
    assert found[:4] == pytest.approx([2.0 * (step + 1) / 5 for step in range(4)])
    assert found[4:] == pytest.approx([1 + math.cos(math.pi * step / 96) for step in range(96)])
    assert rates("warmup_cosine", 2)[0] == pytest.approx(1.0)  # at least one step of warm-up


@pytest.mark.parametrize("name", ["adamw", "sgd", "rmsprop"])
def test_quantizers_move_in_proportion_to_their_scales(name: str) -> None:
    data, net = TinyData(), tiny_net()
    model = baqe.quantize(net, baqe.BitConfig.uniform(net, 4, 4), data.example_input)
    baqe.calibrate(model, data.train_dataloader())
    groups = {group["name"]: group for group in make_optimizer(name, model, 1e-2, 0.1).param_groups}
    assert groups["weights"]["weight_decay"] == 0.1
    assert groups["vectors"]["weight_decay"] == 0.0
    of = groups["weight_scale_4bit"]
    scale = sum(float(p.detach().mean()) for p in of["params"]) / len(of["params"])
    assert of["lr"] == pytest.approx(1e-2 if name == "sgd" else 1e-2 * scale)


def test_rmsprop_is_that_of_the_paper() -> None:
    """Momentum of 0.9 over steps of the gradient's sign, at first: the squares have no past."""
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    holder = torch.nn.ParameterList([parameter])
    optimizer = make_optimizer("rmsprop", holder, 1e-3, 0.0)
    parameter.grad = torch.tensor([[1.0, -2.0], [0.5, 4.0]])
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), -1e-3 * parameter.grad.sign() / math.sqrt(0.1), rtol=1e-4, atol=0)
