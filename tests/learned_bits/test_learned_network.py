"""Networks with learned bits: sizes in closed form, training to a size, and the bit-config at the end."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import lightning_baqe as baqe
from lightning_baqe.errors import ConfigError, InfeasibleError
from lightning_baqe.learned_bits.learned_network import LearnedNetwork, learn_bits, nearest_by_channel
from lightning_baqe.quantization.config import BitConfig


class Net(nn.Module):
    """A tensor that two layers and a sum read, a depthwise layer, and one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.deep = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
        self.short = nn.Conv2d(4, 4, 1)
        self.twice = nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.deep(x) + self.short(x) + x)
        x = torch.relu(self.twice(torch.relu(self.twice(x))))
        return self.fc(x.mean((2, 3)))


def learned(bits: int = 8, by_channel: bool = False) -> tuple[LearnedNetwork, Tensor]:
    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(8, 3, 6, 6)
    return learn_bits(net, [x], bits, x, by_channel), x


WEIGHTS = {"first": 108, "deep": 36, "short": 16, "twice": 16, "fc": 12}


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_sizes(bits: int) -> None:
    network, x = learned(bits)
    assert {name: of.values for name, of in network.weights.items()} == WEIGHTS
    # The input, the tensor that two layers read, those that `twice` and the classifier read.
    assert sorted(of.values for of in network.activations.values()) == [4, 108, 144, 144, 144]
    assert network.inputs["deep"] == network.inputs["short"]
    assert [len(paths) for paths in network.inputs.values()] == [1, 1, 1, 2, 1]
    assert float(network.weight_bytes().detach()) == pytest.approx(bits * 188 / 8, rel=1e-5)
    assert float(network.activation_bytes().detach()) == pytest.approx(bits * 544 / 8, rel=1e-5)
    assert network.mean_bits() == pytest.approx((bits, bits), rel=1e-5)
    assert network.bytes_of(3) == (3 * 188 / 8, 3 * 544 / 8)
    assert network.materialise() == network.model.bits.replace({name: baqe.LayerBits(bits, bits) for name in WEIGHTS})
    net = Net().eval()
    torch.manual_seed(0)
    assert network.model(x).shape == net(x).shape


def test_it_starts_near_the_network_at_these_bits() -> None:
    network, x = learned(8)
    torch.manual_seed(0)
    wanted = Net().eval()(x)
    found = network.model(x)
    assert float((found - wanted).abs().max().detach()) < 0.05 * float(wanted.abs().max().detach())


def test_training_reaches_a_size_and_its_bits_are_a_network() -> None:
    """Cross entropy and penalty together; materialised, it keeps the size, is within a bit of what was learned, and
    runs."""
    torch.manual_seed(0)
    net, y = Net().eval(), torch.arange(8) % 3
    x = torch.randn(8, 3, 6, 6) + 3 * functional.one_hot(y, 3)[:, :, None, None]
    network = learn_bits(net, [x], 8, x)
    network.model.train()
    weights, activations = network.bytes_of(4)
    quantizers = [parameter for of in network.quantizers for parameter in of.parameters()]
    known = set(map(id, quantizers))
    rest = [parameter for parameter in network.model.parameters() if id(parameter) not in known]
    optimizer = torch.optim.RMSprop([{"params": quantizers, "lr": 0.02}, {"params": rest, "lr": 3e-3}])
    for _ in range(400):
        optimizer.zero_grad()
        over = [
            functional.relu(size / limit - 1)
            for size, limit in ((network.weight_bytes(), weights), (network.activation_bytes(), activations))
        ]
        loss = functional.cross_entropy(network.model(x), y) + 100 * (over[0].square() + over[1].square())
        loss.backward()
        optimizer.step()
        network.project()
    assert network.mean_bits() == pytest.approx((4, 4), abs=0.2)
    assert float(loss.detach()) < 0.3
    bits = network.materialise(weights, activations)
    assert sum(bits[name].weight * count for name, count in WEIGHTS.items()) <= 8 * weights
    for name, of in network.weights.items():
        assert abs(bits[name].weight - float(of.bits().detach())) < 1.5
    assert bits["deep"].activation == bits["short"].activation
    model = network.deployable(bits).eval()
    assert float(functional.cross_entropy(model(x), y).detach()) < 0.6
    assert (baqe.lower(model).run(x).argmax(1) == y).all()


@pytest.mark.parametrize("weight", [2, 3, 8])
@pytest.mark.parametrize("activation", [3, 7])
def test_the_deployable_network_computes_the_same(weight: int, activation: int) -> None:
    network, x = learned(5)
    with torch.no_grad():
        for of in network.quantizers:
            of.log_top += 0.4  # no input is beyond a range
        for of in network.weights.values():
            of.log_top -= 2.0  # but many weights are
    bits = network.materialise().replace({name: baqe.LayerBits(weight, activation) for name in ("deep", "short", "fc")})
    bits = bits.replace(twice=baqe.LayerBits(4, 6))
    network.fix(bits)
    network.model.eval()
    model = network.deployable(bits).eval()
    torch.testing.assert_close(model(x), network.model(x))
    assert model.bits == bits
    integers = baqe.lower(model).run(x)
    torch.testing.assert_close(integers, model(x), rtol=0.05, atol=0.02)


def test_a_size_that_cannot_be_met_names_the_smallest() -> None:
    network, _ = learned(4)
    with pytest.raises(InfeasibleError, match="the smallest that these bits can reach is 376"):
        network.materialise(weight_bytes=46)
    assert {bits.weight for bits in network.materialise(weight_bytes=47).values()} == {2}


def test_the_nearest_bits_win() -> None:
    network, _ = learned(4)
    with torch.no_grad():
        network.weights["deep"].log_levels += 1.5
        network.weights["first"].log_levels -= 0.5
    bits = network.materialise(weight_bytes=1000, activation_bytes=1000)
    assert {name: bits[name].weight for name in WEIGHTS} == {"first": 4, "deep": 5, "short": 4, "twice": 4, "fc": 4}


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.floats(0, 1))
def test_bits_of_channels_keep_the_size_and_are_the_nearest(seed: int, channels: int, share: float) -> None:
    """Against all of the combinations: at most the best within the limit less the largest channel."""
    rng = np.random.default_rng(seed)
    learned, counts = rng.uniform(2, 8, channels), rng.integers(1, 30, channels)
    limit = int(counts.sum()) * (2 + 6 * share)
    found = nearest_by_channel(learned, counts, limit)
    assert (found * counts).sum() <= limit
    assert ((found >= 2) & (found <= 8)).all()
    every = np.stack(np.meshgrid(*[np.arange(2, 9)] * channels, indexing="ij"), -1).reshape(-1, channels)
    away = (counts * (every - learned) ** 2).sum(1)
    mine = (counts * (found - learned) ** 2).sum()
    sizes = (every * counts).sum(1)
    assert away[sizes <= limit].min() <= mine + 1e-9
    assert mine <= away[sizes <= limit - counts.max()].min(initial=np.inf) + 1e-9


def test_channels_of_equal_size_have_the_nearest_bits() -> None:
    learned = np.array([2.4, 3.6, 5.2, 7.9])
    assert nearest_by_channel(learned, np.ones(4, int), 100).tolist() == [2, 4, 5, 8]
    assert nearest_by_channel(learned, np.ones(4, int), 18).tolist() == [2, 3, 5, 8]
    assert nearest_by_channel(learned, np.ones(4, int), 17).tolist() == [2, 3, 5, 7]
    with pytest.raises(InfeasibleError, match="weights of 1 bytes cannot be reached: the smallest network has 1"):
        nearest_by_channel(learned, np.ones(4, int), 7)


def test_bits_by_channel_are_deployed() -> None:
    network, x = learned(5, by_channel=True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for of in network.weights.values():
            of.log_levels += torch.randn(of.log_levels.shape, generator=generator)
        network.project()
    limit = 0.9 * float(network.weight_bytes().detach())
    bits = network.materialise(weight_bytes=limit)
    weights = {name: bits[name].weight for name in WEIGHTS}
    assert all(isinstance(of, tuple) for of in weights.values())
    assert {name: len(of) for name, of in weights.items()} == {"first": 4, "deep": 4, "short": 4, "twice": 4, "fc": 3}
    assert len(set(weights["first"])) > 1
    size = sum(WEIGHTS[name] * sum(of) / len(of) for name, of in weights.items()) / 8
    assert 0.95 * limit < size <= limit
    network.fix(bits)
    assert float(network.weight_bytes().detach()) == pytest.approx(size)
    network.model.eval()
    model = network.deployable(bits).eval()
    torch.testing.assert_close(model(x), network.model(x))
    torch.testing.assert_close(baqe.lower(model).run(x), model(x), rtol=0.05, atol=0.02)


class Odd(nn.Module):
    """A module at two paths, transposed convolutions, a fixed filter, and a layer that sees places as samples."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        self.again = self.first
        self.up = nn.ConvTranspose2d(4, 6, 2, stride=2)
        self.grouped = nn.ConvTranspose2d(6, 6, 2, groups=2)
        self.register_buffer("filter", torch.ones(6, 1, 3, 3) / 9)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.again(torch.relu(self.first(x))))
        x = functional.conv2d(torch.relu(self.grouped(torch.relu(self.up(x)))), self.filter, groups=6)
        return self.fc(x.mean(3).transpose(1, 2).reshape(-1, 6)).reshape(-1, 11, 3).mean(1)


@pytest.mark.parametrize("by_channel", [False, True])
def test_odd_layers_are_deployed_as_they_were_learned(by_channel: bool) -> None:
    torch.manual_seed(0)
    net, x = Odd().eval(), torch.rand(8, 4, 6, 6)
    network = learn_bits(net, [x], 5, x, by_channel)
    assert set(network.weights) == {"first", "up", "grouped", "fc"}
    assert len(network.inputs["first"]) == 2
    assert network.activations[network.inputs["fc"][0]].values == 11 * 6
    with torch.no_grad():
        for of in network.quantizers:
            of.log_top += 0.4
        for of in network.weights.values():
            of.log_top -= 1 + torch.rand_like(of.log_top)
            of.log_levels += torch.rand_like(of.log_levels)
        network.project()
    bits = network.materialise()
    network.fix(bits)
    network.model.eval()
    model = network.deployable(bits).eval()
    torch.testing.assert_close(model(x), network.model(x))
    torch.testing.assert_close(baqe.lower(model).run(x), model(x), rtol=0.05, atol=0.02)


def test_shared_weights_are_refused() -> None:
    net, x = Odd().eval(), torch.rand(2, 4, 6, 6)
    net.second = nn.Conv2d(4, 4, 3)
    net.second.weight = net.first.weight
    with pytest.raises(ConfigError, match="layers 'first' and 'second' share their weights"):
        learn_bits(net, [x], 5, x)


@pytest.mark.parametrize("by_channel", [False, True])
def test_biases_have_the_bits_of_their_weights_and_count(by_channel: bool) -> None:
    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(8, 3, 6, 6)
    network, without = (learn_bits(net, [x], 4, x, by_channel, biases=biases) for biases in (True, False))
    biases = {"first": 4, "short": 4, "twice": 4, "fc": 3}
    assert set(network.biases) == set(biases)
    assert {name: of.values - WEIGHTS[name] for name, of in network.weights.items()} == {"deep": 0, **biases}
    assert (network.unquantized_bytes, without.unquantized_bytes) == (0, 2 * sum(biases.values()))
    bits = network.materialise().replace(fc=baqe.LayerBits((2, 3, 4) if by_channel else 3, 4))
    network.fix(bits)
    network.model.eval()
    model = network.deployable(bits).eval()
    torch.testing.assert_close(model(x), network.model(x))
    torch.testing.assert_close(baqe.lower(model).run(x), model(x), rtol=0.05, atol=0.02)
    bias, quantizer = net.fc.bias.detach(), network.biases["fc"]
    steps = bias.abs().max() / torch.tensor([1.0, 3.0, 7.0] if by_channel else [3.0] * 3)
    torch.testing.assert_close(quantizer(bias).detach(), (bias / steps).round() * steps)
    functional.cross_entropy(network.model(x), torch.zeros(8, dtype=torch.long)).backward()
    assert all(parameter.grad is not None for parameter in quantizer.parameters())


@pytest.mark.parametrize("bits", [1, 9, 4.5])
def test_bits_out_of_range(bits: int) -> None:
    with pytest.raises(ConfigError, match=f"bits={bits}, wanted is a whole number of 2 to 8"):
        learn_bits(Net(), [torch.randn(2, 3, 6, 6)], bits, torch.randn(2, 3, 6, 6))


def test_the_float_network_stays() -> None:
    net, x = Net().eval(), torch.randn(2, 3, 6, 6)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    learn_bits(net, [x], 4, x)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert BitConfig.uniform(net).keys() == WEIGHTS.keys()
