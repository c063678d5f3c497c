"""Traces against Hessians that autograd forms whole, in float64, and against closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian
from torch.nn import functional
from torch.nn.utils import parametrizations

import lightning_baqe as baqe
from lightning_baqe.allocation.hessian import Traces
from lightning_baqe.errors import ConfigError, DataError, UnsupportedModelError


class Net(nn.Module):
    """Small, with batch norm, a residual sum, and functions whose second derivatives are not 0."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.second = nn.Conv2d(3, 3, 3, padding=1, groups=3, bias=False)
        self.classifier = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.silu(self.norm(self.first(x)))
        x = torch.relu(self.second(x) + x)
        return self.classifier(x.mean((2, 3)))


def net_and_batches(seed: int = 0) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(seed)
    net = Net().double()
    net(torch.randn(32, 2, 5, 5, dtype=torch.float64))  # statistics
    data = [(torch.randn(n, 2, 5, 5, dtype=torch.float64), torch.randint(0, 4, (n,))) for n in (4, 3)]
    return net.eval(), data


def exact_traces(net: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """By layer, over the number of weights."""
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    found = {}
    for name in ("first", "second", "classifier"):
        weight = net.get_submodule(name).weight.detach()

        def loss(w: Tensor, name: str = name) -> Tensor:
            return functional.cross_entropy(functional_call(net, {f"{name}.weight": w}, (x,)), y)

        found[name] = float(hessian(loss)(weight).detach().reshape(weight.numel(), -1).trace()) / weight.numel()
    return found


def test_traces_of_weights() -> None:
    net, batches = net_and_batches()
    exact = exact_traces(net, batches)
    found = baqe.hessian_trace(net, functional.cross_entropy, batches, samples=400, tolerance=0.0)
    assert list(found) == ["first", "second", "classifier"]
    assert found.samples == 400
    for name, wanted in exact.items():
        assert 0 < found.standard_errors[name] < 0.2 * max(map(abs, exact.values()))
        assert found[name] == pytest.approx(wanted, abs=3 * found.standard_errors[name]), name


@pytest.mark.parametrize("chunk", [1, 7])
def test_they_are_unbiased(chunk: int) -> None:
    """The mean over 100 seeds is within 3 of its standard errors, and these are what single runs say of themselves."""
    net, batches = net_and_batches(1)
    exact = exact_traces(net, batches)
    runs = [
        baqe.hessian_trace(net, functional.cross_entropy, batches, samples=5, tolerance=0.0, chunk=chunk, seed=seed)
        for seed in range(100)
    ]
    for name, wanted in exact.items():
        values = torch.tensor([run[name] for run in runs], dtype=torch.float64)
        assert float(values.mean()) == pytest.approx(wanted, rel=1e-9, abs=3 * float(values.std()) / 10), name
        told = torch.tensor([run.standard_errors[name] for run in runs]).square().mean().sqrt()
        assert float(told) == pytest.approx(float(values.std()), rel=0.3, abs=1e-9 * abs(wanted))


def test_traces_of_inputs() -> None:
    net, batches = net_and_batches(2)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    found = baqe.hessian_trace(net, functional.cross_entropy, batches, samples=400, of="inputs", tolerance=0.0)
    exact = {}
    for name in ("first", "classifier"):
        kept: dict[str, Tensor] = {}
        handle = net.get_submodule(name).register_forward_pre_hook(lambda m, args: kept.update(x=args[0].detach()))  # noqa: B023
        net(x)
        handle.remove()
        rest = net if name == "first" else net.classifier
        traces = []
        for image, label in zip(kept["x"], y, strict=True):
            of_image = hessian(lambda v: functional.cross_entropy(rest(v[None]), label[None]))(image)  # noqa: B023
            traces.append(float(of_image.detach().reshape(image.numel(), -1).trace()))
        exact[name] = sum(traces) / len(traces) / kept["x"][0].numel()
    for name, wanted in exact.items():
        assert found[name] == pytest.approx(wanted, abs=3 * found.standard_errors[name]), name
    assert found.counts == {"first": 50, "second": 75, "classifier": 3}


def test_the_closed_form_of_a_linear_layer() -> None:
    """Squared loss: the Hessian is the Gauss-Newton matrix, whose trace is outputs times the mean of |x|^2."""
    torch.manual_seed(0)
    linear, x, y = nn.Linear(5, 3), torch.randn(8, 5), torch.randn(8, 3)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return 0.5 * (output - target).square().sum(1).mean()

    found = baqe.hessian_trace(nn.Sequential(linear), loss, [(x, y)], samples=300, tolerance=0.0, chunk=8)
    wanted = 3 * float(x.square().sum(1).mean()) / 15
    assert found["0"] == pytest.approx(wanted, abs=3 * found.standard_errors["0"])
    # Of one image the matrix is diagonal in the outputs, and one probe is exact.
    one = baqe.hessian_trace(nn.Sequential(nn.Linear(1, 3)), loss, [(x[:, :1], y)], samples=2, chunk=1)
    assert one["0"] == pytest.approx(float(x[:, 0].square().mean()), rel=1e-5)
    assert one.standard_errors["0"] == pytest.approx(0, abs=1e-6)


def test_a_piecewise_linear_network_needs_few_probes() -> None:
    """Its residual part is 0, and probing all layers at once would leave far more noise."""
    torch.manual_seed(0)
    body = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(6)]
    net = nn.Sequential(*body, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5))
    data = [(torch.randn(16, 4, 6, 6), torch.randint(0, 5, (16,)))]
    found = baqe.hessian_trace(net, functional.cross_entropy, data, 1000, tolerance=0.1)
    assert found.samples <= 100
    assert min(found.values()) > 0


def test_outputs_that_are_many() -> None:
    """Beyond what is factored, and in a dict."""

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 3, 3, padding=1, bias=False)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"out": self.conv(x), "scale": x.mean()}

    torch.manual_seed(0)
    net, x, y = Dense().double(), torch.randn(2, 1, 32, 32).double(), torch.randint(0, 3, (2, 32, 32))

    def loss(w: Tensor) -> Tensor:
        return functional.cross_entropy(functional.conv2d(x, w, padding=1), y)

    exact = float(hessian(loss)(net.conv.weight.detach()).reshape(27, 27).trace()) / 27
    found = baqe.hessian_trace(
        net, lambda output, target: functional.cross_entropy(output["out"], target), [(x, y)], 200, tolerance=0.0
    )
    assert found["conv"] == pytest.approx(exact, abs=3 * found.standard_errors["conv"])
    assert found.standard_errors["conv"] < 0.2 * exact


def test_images_that_meet_in_the_loss() -> None:
    """Of one chunk, they are no blocks of their own."""
    torch.manual_seed(0)
    net, x, y = nn.Linear(3, 2).double(), torch.randn(4, 3).double(), torch.randn(4, 2).double()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output.mean(0) - target.mean(0)).pow(4).sum() + torch.exp(output[0] * output[1]).sum()

    exact = (
        float(hessian(lambda w: loss(x @ w.T + net.bias.detach(), y))(net.weight.detach()).reshape(6, 6).trace()) / 6
    )
    found = baqe.hessian_trace(nn.Sequential(net), loss, [(x, y)], 400, tolerance=0.0)
    assert found["0"] == pytest.approx(exact, abs=3 * found.standard_errors["0"])


def test_a_straight_loss_has_no_curvature() -> None:
    net = nn.Sequential(nn.Linear(3, 2))
    found = baqe.hessian_trace(net, lambda output, y: (output * y).mean(), [(torch.randn(4, 3), torch.ones(4, 2))])
    assert (found, found.standard_errors) == ({"0": 0.0}, {"0": 0.0})


def test_negative_curvature_is_told() -> None:
    net = nn.Sequential(nn.Linear(3, 2))
    found = baqe.hessian_trace(net, lambda output, y: -output.square().mean(), [(torch.randn(4, 3), torch.ones(4, 2))])
    assert found["0"] < 0


def test_layers_with_one_weight_in_common() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    net[2].weight = net[0].weight
    x, y = torch.randn(6, 4).double(), torch.randint(0, 4, (6,))
    found = baqe.hessian_trace(net, functional.cross_entropy, [(x, y)], samples=400, tolerance=0.0)

    def loss(w: Tensor) -> Tensor:
        return functional.cross_entropy(functional_call(net, {"0.weight": w}, (x,), tie_weights=True), y)

    exact = float(hessian(loss)(net[0].weight.detach()).detach().reshape(16, 16).trace()) / 16
    assert found["0"] == found["2"] == pytest.approx(exact, abs=3 * found.standard_errors["0"])


def test_probing_ends_when_traces_are_known() -> None:
    torch.manual_seed(0)
    net, data = nn.Sequential(nn.Linear(8, 2)), [(torch.randn(8, 8), torch.randn(8, 2))]
    told: list[tuple[int, int]] = []

    def tell(done: int, total: int) -> None:
        told.append((done, total))

    loose = baqe.hessian_trace(net, functional.mse_loss, data, 3000, tolerance=0.3, tell=tell)
    tight = baqe.hessian_trace(net, functional.mse_loss, data, 3000, tolerance=0.05)
    assert 10 <= loose.samples < tight.samples < 3000
    assert (loose.unsure(0.3), tight.unsure(0.05)) == ([], [])
    assert loose.unsure(0.001) == list(loose)
    assert told[-1] == (loose.samples, 3000)


def test_small_traces_need_not_be_known() -> None:
    errors = {"large": 0.04, "small": 4e-4}
    traces = Traces({"large": 1.0, "small": -1e-5}, errors, {"large": 10, "small": 10}, 5)
    assert traces.unsure(0.05) == []
    assert traces.unsure(0.03) == ["large", "small"]


def test_nothing_is_changed_and_seeds_count() -> None:
    net, batches = net_and_batches()
    net.train()
    net.norm.eval()
    net.first.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    state = torch.get_rng_state()
    runs = [baqe.hessian_trace(net, functional.cross_entropy, batches, 4, seed=seed) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]
    assert torch.equal(torch.get_rng_state(), state)
    assert (net.training, net.norm.training) == (True, False)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert [p.requires_grad for p in net.parameters()] == [False, *[True] * 6]
    assert all(p.grad is None for p in net.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in net.modules())
    with torch.no_grad():
        assert baqe.hessian_trace(net, functional.cross_entropy, batches, 4) == runs[0]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.classifier = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q = self.query(x)
        return self.classifier(functional.scaled_dot_product_attention(q, x, x).mean(1))


def test_attention() -> None:
    """Fast kernels of it cannot be differentiated twice."""
    torch.manual_seed(0)
    data = [(torch.randn(4, 5, 4), torch.randint(0, 3, (4,)))]
    found = baqe.hessian_trace(Attention(), functional.cross_entropy, data, 20)
    assert all(map(math.isfinite, found.values()))
    assert found["classifier"] > 0


def test_what_cannot_be_right() -> None:
    net, batches = net_and_batches()

    def refused(error: type[Exception], message: str, model: nn.Module = net, data: Any = batches, **more: Any) -> None:
        with pytest.raises(error, match=message):
            baqe.hessian_trace(model, more.pop("loss", functional.cross_entropy), data, **more)

    refused(ConfigError, "samples=0", samples=0)
    refused(ConfigError, "chunk=0", chunk=0)
    refused(ConfigError, "of='activations', but 'weights' or 'inputs'", of="activations")
    refused(ConfigError, "tolerance=-1", tolerance=-1)
    refused(ConfigError, "no layers with weights", nn.ReLU())
    refused(ConfigError, "batches is empty", data=[])
    refused(ConfigError, "knows weights by itself", loss=lambda output, y: output.mean() + net.first.weight.norm())
    refused(DataError, "the loss is nan", loss=lambda output, y: output.mean() * math.nan)
    normed = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 2)))
    refused(UnsupportedModelError, r"weight of '0' is computed at each call .*remove_parametrizations", normed)
