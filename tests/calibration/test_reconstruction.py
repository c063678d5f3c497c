"""Blocks are found in any network, and reconstruction brings them closer or leaves them as they are."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from quantization.small_networks import NETWORKS, images, settled
from torch import nn

import lightning_baqe as baqe
from lightning_baqe import BitConfig, QuantizedModel
from lightning_baqe.calibration import reconstruction
from lightning_baqe.calibration.corrections import Correction
from lightning_baqe.calibration.reconstruction import SoftRounding, Task, blocks, reconstruct
from lightning_baqe.calibration.walk import Walk, float_twin
from lightning_baqe.errors import ConfigError
from lightning_baqe.quantization.layers import QuantLayer


def ready(model: nn.Module, x: torch.Tensor, bits: int = 3, correct: str | Correction = "none") -> QuantizedModel:
    found = baqe.quantize(model, BitConfig.uniform(model, bits, 8, None), x[:2]).eval()
    return baqe.calibrate(found, x.split(16), correct=correct)


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest) -> nn.Module:
    return settled(request.param)


def test_blocks_one_after_the_other_are_the_network(network: nn.Module) -> None:
    x = images(5)
    model = ready(network, x)
    found, walk = blocks(model), Walk(model, [(x,)])
    values = {}
    for node in model.graph.nodes:
        if node.op != "output":
            walk.step(node)
            (values[node],) = walk.values(node)
    torch.testing.assert_close(values[found[-1].nodes[-1]], model(x))
    for before, block in itertools.pairwise(found):
        assert before.nodes[-1] is block.source
    for block in found:
        torch.testing.assert_close(Task(model, block.source, block.nodes).run(values[block.source][:3]),
                                   values[block.nodes[-1]][:3])  # fmt: skip
    layers = {name for name, module in model.named_modules() if isinstance(module, QuantLayer)}
    assert {path for block in found for path in block.layers} == layers
    assert all(block.layers for block in found)


def test_a_residual_unit_is_one_block() -> None:
    model = ready(settled("residual"), images(4))
    assert [block.layers for block in blocks(model)][1] == ("block1.conv1", "block1.conv2")


def test_a_layer_that_is_called_twice_is_left_alone() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.again = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.again(self.again(self.first(x)).relu())
            return found

    model = ready(Twice().eval(), images(8))
    assert [path for block in blocks(model) for path in block.layers] == ["first"]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], float]:
    """So many steps for each block, however fast the machine is; the seconds to ask for."""

    def fixed(count: int) -> float:
        monkeypatch.setattr(reconstruction, "FEWEST_STEPS", count)
        return 1e-3

    return fixed


@pytest.mark.parametrize(("correct", "count"), [("none", 10), ("none", 100), ("best", 50)])
def test_blocks_come_closer_and_all_else_is_as_it_was(
    network: nn.Module, correct: str, count: int, steps: Callable[[int], float]
) -> None:
    x = images(40)
    twin = float_twin(ready(network, x))
    model, told = ready(network, x, correct=correct), []
    before = {name: value.clone() for name, value in twin.state_dict().items()}
    integers = {path: layer.weight_quantizer.integers(layer.weight)[0] for path, layer in layers_of(model).items()}
    errors = reconstruct(
        model, twin, [(part,) for part in x.split(16)], steps(count), lambda *about: told.append(about)
    )
    assert len(errors) == len(blocks(model))
    assert told == [(name, i, len(errors)) for i, name in enumerate(errors, 1)]
    assert all(after <= first for first, after in errors.values())
    moved = {p: (q.weight_quantizer.integers(q.weight)[0] - integers[p]).abs() for p, q in layers_of(model).items()}
    assert all(steps.max() <= 1 for steps in moved.values())
    if correct == "none" and not isinstance(network, nn.Sequential):  # of whose 192 inputs 40 images tell little
        assert any(after < first for first, after in errors.values())
        assert any(bool(steps.any()) for steps in moved.values())
    assert all(torch.equal(value, before[name]) for name, value in twin.state_dict().items())
    assert not any(isinstance(module, SoftRounding) for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def layers_of(model: QuantizedModel) -> dict[str, QuantLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLayer)}


def test_rounded_networks_come_closer_and_stay_exact(steps: Callable[[int], float]) -> None:
    network, x = settled("functional"), images(80)
    plain, found = ready(network, x), ready(network, x, correct=Correction(reconstruct_s=steps(300)))
    other = images(200, 9)
    with torch.no_grad():
        errors = [float((model(other) - network(other)).square().mean()) for model in (plain, found)]
    assert errors[1] < 0.8 * errors[0]
    graph = baqe.lower(found, x[:1])
    with torch.no_grad():
        assert (graph.run(other) - found(other)).abs().mean() < 0.02 * found(other).std()


def test_inference_mode_is_refused() -> None:
    model, x = ready(settled("mlp"), images(4)), images(8)
    with torch.inference_mode(), pytest.raises(ConfigError, match=r"torch.no_grad"):
        baqe.calibrate(model, [x], correct=Correction(reconstruct_s=1))


class Two(nn.Module):
    """Two inputs, each with a layer, joined; then another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.c((self.a(x) + self.b(y)).relu())
        return found


class Chunks(nn.Module):
    """Channels in two parts, as ShuffleNet has them, and more channels than images."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.a(x).chunk(2, 1)
        found: torch.Tensor = self.c(torch.cat([left, self.b(right)], 1).relu())
        return found


def test_several_inputs(steps: Callable[[int], float]) -> None:
    model, batches = Two().eval(), [((images(10, seed), images(10, seed + 1)),) for seed in (1, 3)]
    found = baqe.quantize(model, BitConfig.uniform(model, 3, 8, None), batches[0][0]).eval()
    assert [block.layers for block in blocks(found)] == [("c",)]
    baqe.calibrate(found, batches, correct=Correction(reconstruct_s=steps(20)))


def test_values_that_are_no_tensors(steps: Callable[[int], float]) -> None:
    model = ready(Chunks().eval(), images(24), correct=Correction(reconstruct_s=steps(20)))
    assert {path for block in blocks(model) for path in block.layers} == {"a", "b", "c"}


@pytest.mark.parametrize("how", ["no_grad", "frozen"])
def test_where_nothing_is_trained(how: str, steps: Callable[[int], float]) -> None:
    network, x, wanted = settled("residual"), images(40), Correction(reconstruct_s=steps(20))
    usual = ready(network, x, correct=wanted)
    if how == "frozen":
        found = ready(network.requires_grad_(False), x, correct=wanted)
    else:
        with torch.no_grad():
            found = ready(network, x, correct=wanted)
    for (path, layer), other in zip(layers_of(found).items(), layers_of(usual).values(), strict=True):
        assert torch.equal(layer.weight, other.weight), path


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_soft_weights_are_between_neighbours_of_the_grid(bits: int) -> None:
    torch.manual_seed(bits)
    layer = nn.Conv2d(4, 6, 3)
    quantized = ready(nn.Sequential(layer, nn.Flatten()), torch.randn(4, 4, 5, 5), bits).get_submodule("0")
    assert isinstance(quantized, QuantLayer)
    quantizer, weight = quantized.weight_quantizer, quantized.weight.detach()
    soft = SoftRounding(quantizer, weight, torch.randn_like(weight))
    step = quantizer.scale.detach().reshape(-1, 1, 1, 1)
    torch.testing.assert_close(soft.decided(), quantizer(weight).detach())  # undecided ones stay
    for share, steps in ((-20.0, 0), (20.0, 1)):
        soft.undecided.data.fill_(share)
        moved = (soft.decided() - quantizer(weight)) / step
        assert moved.abs().max() <= steps + 1e-5
        assert soft.indecision(2.0) < 1e-6
        torch.testing.assert_close(soft(weight), soft.decided())
        integers = soft.decided() / step
        assert integers.min() >= -quantizer.qn - 1e-4
        assert integers.max() <= quantizer.qp + 1e-4


@pytest.mark.parametrize("seconds", [-1, float("nan"), True, "long"])
def test_seconds_are_a_number(seconds: float) -> None:
    with pytest.raises(ConfigError, match="reconstruct_s"):
        ready(settled("mlp"), images(4), correct=Correction(reconstruct_s=seconds))
