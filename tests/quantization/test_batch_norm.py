"""Folding and freezing batch norms: the same function, the same integers, the same gradients in new units."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_baqe import BitConfig, LayerBits, QuantizedModel, calibrate, lower, quantize
from lightning_baqe.errors import UnsupportedModelError
from lightning_baqe.integer.nodes import Conv, Linear
from lightning_baqe.quantization.batch_norm import (
    FoldedBatchNorm,
    fold_batch_norm,
    foldable,
    freeze_batch_norm,
    is_folded,
)
from lightning_baqe.quantization.layers import QuantConv2d, QuantLinear
from quantization.small_networks import NETWORKS, images, settled

GAINS = st.sampled_from([None, 0.0, -0.7, 1e-3])
ATTACHED = {"residual": 5, "functional": 2, "many_readers": 1, "mlp": 1}


def ready(
    name: str, bits: int | BitConfig = 4, seed: int = 0, gain: float | None = None, dtype: torch.dtype = torch.float64
) -> QuantizedModel:
    """A calibrated network in eval mode; `gain` is given to the second channel of every batch norm.

    In double precision a rounding error carries practically no activation across the border between two integers.
    """
    model = settled(name, seed).to(dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d) and gain is not None:
            nn.init.constant_(module.weight[1], gain)
    config = BitConfig.uniform(model, bits, bits) if isinstance(bits, int) else bits
    quantized = quantize(model.float(), config, images()).to(dtype)
    return calibrate(quantized, [images().to(dtype)]).eval()


def outputs(model: nn.Module, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    with torch.no_grad():
        return model(images(seed=5).to(dtype))


def integers_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: module.weight_quantizer.integers(module.weight)[0]
        for name, module in model.named_modules()
        if isinstance(module, QuantConv2d | QuantLinear)
    }


@settings(max_examples=30, deadline=None)
@given(st.data(), st.sampled_from(sorted(NETWORKS)), st.integers(0, 50), GAINS)
def test_the_function_stays_what_it_was(data: st.DataObject, name: str, seed: int, gain: float | None) -> None:
    choice = st.sampled_from([LayerBits(w, a) for w in (2, 5, 8) for a in (4, 8)] + [LayerBits(32, 32)] * 3)
    bits = BitConfig({layer: data.draw(choice) for layer in BitConfig.uniform(NETWORKS[name]())})
    model = ready(name, bits, seed, gain)
    before = outputs(model)
    assert fold_batch_norm(model) is model
    assert sum(isinstance(module, FoldedBatchNorm) for module in model.modules()) == ATTACHED[name]
    assert not any(isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d) for module in model.modules())
    torch.testing.assert_close(outputs(model), before, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", NETWORKS)
def test_float_layers_fold_plainly(name: str) -> None:
    model = settled(name)
    folded = fold_batch_norm(quantize(model, BitConfig.uniform(model, 32, 32), images()).double())
    model.double()
    torch.testing.assert_close(outputs(folded), outputs(model), rtol=1e-9, atol=1e-9)
    assert is_folded(folded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_integers_stay_and_scales_take_the_gain_up(bits: int, dtype: torch.dtype) -> None:
    model = ready("residual", bits, gain=-0.7, dtype=dtype)
    pairs = foldable(model)
    quantizers = [pair.layer.weight_quantizer for pair in pairs]
    generator = torch.Generator().manual_seed(bits)
    with torch.no_grad():
        for pair, quantizer in zip(pairs, quantizers, strict=True):
            # Right on the borders between integers, where the least rounding error decides, and beyond the ends.
            size = pair.layer.weight.shape
            halves = torch.randint(-quantizer.qn - 2, quantizer.qp + 2, size, generator=generator) + 0.5
            pair.layer.weight.copy_(halves * quantizer.scale.reshape(-1, 1, 1, 1))
    integers = integers_of(model)
    scales = [quantizer.scale.detach().clone() for quantizer in quantizers]
    gains = [pair.norm.weight.detach() / torch.sqrt(pair.norm.running_var + pair.norm.eps) for pair in pairs]
    assert min(float(gain.min()) for gain in gains) < 0 < max(float(gain.max()) for gain in gains)
    fold_batch_norm(model)
    for name, after in integers_of(model).items():
        assert torch.equal(after, integers[name]), name
    for pair, scale, gain in zip(pairs, scales, gains, strict=True):
        torch.testing.assert_close(pair.layer.weight_quantizer.integers(pair.layer.weight)[1].to(dtype), scale * gain)
        torch.testing.assert_close(pair.layer.weight_quantizer.scale.detach(), (scale * gain).abs())


def test_a_negative_gain_keeps_the_asymmetric_end_of_the_range() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    nn.init.constant_(model[1].weight, -2.0)
    quantized = quantize(model, BitConfig.uniform(model, 4, 4, first_last=None), torch.randn(4, 1, 2, 2))
    conv = quantized.get_submodule("0")
    assert isinstance(conv, QuantConv2d)
    with torch.no_grad():
        conv.weight_quantizer.scale.fill_(0.25)
        conv.weight.fill_(-2.0)  # the integer -8; +8 there is not
    fold_batch_norm(quantized)
    torch.testing.assert_close(conv.weight_quantizer(conv.weight), torch.full((1, 1, 1, 1), 4.0), rtol=1e-5, atol=0)
    assert conv.weight_quantizer.integers(conv.weight)[0].item() == -8


def layers_of(graph: Any) -> dict[str, Conv | Linear]:
    return {node.name: node for node in graph if isinstance(node, Conv | Linear)}


def exact_powers(model: nn.Module, seed: int) -> None:
    """Give batch norms gains of plus or minus a power of two and shifts that single precision holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            shape = module.weight.shape
            with torch.no_grad():
                powers = torch.randint(-3, 2, shape, generator=generator)
                signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
                module.weight.copy_(signs * torch.exp2(powers))
                module.bias.copy_(torch.randint(-99, 99, shape, generator=generator) / 64)
                module.running_mean.copy_(torch.randint(-99, 99, shape, generator=generator) / 64)
                module.running_var.fill_(1.0)
            module.eps = 0.0


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(NETWORKS)), st.integers(2, 8), st.integers(0, 50), st.booleans())
def test_without_rounding_lowering_gives_the_same_numbers(name: str, bits: int, seed: int, zero: bool) -> None:
    model = settled(name, seed)
    for module in model.modules():  # torch draws biases that a sum with a shift of 64ths would round
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            module.bias.data.mul_(64).round_().div_(64)
    exact_powers(model, seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d) and zero:
            nn.init.zeros_(module.weight[1])
            nn.init.zeros_(module.bias[1])
    model = calibrate(quantize(model, BitConfig.uniform(model, bits, bits), images()), [images()])
    wanted = lower(model)
    found = lower(fold_batch_norm(model))
    assert [node.name for node in found] == [node.name for node in wanted]
    before, after = layers_of(wanted), layers_of(found)
    assert before.keys() == after.keys()
    for key, node in before.items():
        assert torch.equal(after[key].weight, node.weight), key
        assert torch.equal(after[key].bias, node.bias), key
        if node.requant is not None:
            assert after[key].requant is not None
            assert torch.equal(after[key].requant.real(), node.requant.real())
            assert torch.equal(after[key].fraction, node.fraction)
    assert torch.equal(found.run(images(seed=5)), wanted.run(images(seed=5)))


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(NETWORKS)), st.integers(2, 8), st.integers(0, 50), st.sampled_from([None, -0.7]))
def test_lowering_gives_the_same_numbers_but_for_rounding(name: str, bits: int, seed: int, gain: float | None) -> None:
    model = ready(name, bits, seed, gain, torch.float32)
    wanted = lower(model)
    found = lower(fold_batch_norm(model))
    before, after = layers_of(wanted), layers_of(found)
    for key, node in before.items():
        assert torch.equal(after[key].weight, node.weight), key
        torch.testing.assert_close(after[key].bias.double(), node.bias.double(), rtol=1e-5, atol=1.5)
        if node.requant is not None:
            assert after[key].requant is not None
            torch.testing.assert_close(after[key].requant.real(), node.requant.real(), rtol=1e-6, atol=0)
    # The same inputs for each layer: a rounding error then moves few outputs, and these by one step.
    values = wanted.run_all(images(64))
    for key, node in before.items():
        difference = (after[key].run(values[node.inputs[0]]) - values[key]).abs()
        assert node.requant is None or difference.max() <= 1, key
        assert node.requant is None or (difference > 0).double().mean() < 1e-3, key


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("gain", "shift"), [(0.0, 0.7), (0.0, 0.0), (1e-12, -0.4), (-1e-12, 0.4), (-1e-30, 1.0)])
def test_channels_without_gain_are_their_shift(name: str, gain: float, shift: float) -> None:
    model = ready(name, 8)
    for pair in foldable(model):
        with torch.no_grad():
            pair.norm.weight[1], pair.norm.bias[1] = gain, shift
    calibrate(model, [images().double()])
    before = outputs(model)
    wanted = lower(copy.deepcopy(model).float())
    fold_batch_norm(model)
    torch.testing.assert_close(outputs(model), before, rtol=1e-6, atol=1e-6)
    found = lower(model.float())
    values = wanted.run_all(images())
    for key, node in layers_of(wanted).items():
        channel = found[key].run(values[node.inputs[0]])[:, 1]
        assert node.requant is None or (channel - values[key][:, 1]).abs().max() <= 1, key


def test_gradients_are_those_of_the_unfolded_network_in_new_units() -> None:
    model = ready("residual", 4, gain=-0.7)
    folded = fold_batch_norm(copy.deepcopy(model))
    for network in (model, folded):
        network(images().double()).square().sum().backward()
    for pair, other in zip(foldable(model), ("stem", "block1.conv1", "block1.conv2"), strict=False):
        layer = folded.get_submodule(other)
        assert isinstance(layer, QuantConv2d)
        gain = pair.norm.weight.detach() / torch.sqrt(pair.norm.running_var + pair.norm.eps)
        torch.testing.assert_close(layer.weight.grad * gain.reshape(-1, 1, 1, 1), pair.layer.weight.grad)
        quantizer = pair.layer.weight_quantizer
        torch.testing.assert_close(layer.weight_quantizer.scale.grad * gain.abs(), quantizer.scale.grad)
        torch.testing.assert_close(layer.bias.grad, pair.norm.bias.grad)


def test_every_parameter_of_a_folded_network_trains() -> None:
    model = fold_batch_norm(ready("residual", 4, dtype=torch.float32)).train()
    model(images()).square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    before = integers_of(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    optimizer.step()
    assert any(not torch.equal(after, before[name]) for name, after in integers_of(model).items())
    assert lower(model.eval()).is_integer_only


def test_parameters_stay_the_same_objects() -> None:
    model = ready("residual", 4)
    before = dict(model.named_parameters())
    fold_batch_norm(model)
    after = dict(model.named_parameters())
    kept = {name for name in before if ".bn" not in name and not name.startswith("bn.")}
    assert all(after[name] is before[name] for name in kept)
    assert after.keys() - kept == {f"block{i}.conv{j}.bias" for i in (1, 2) for j in (1, 2)}


def test_state_dicts() -> None:
    model, bits = settled("residual"), BitConfig.uniform(settled("residual"), 4, 4)
    plain = calibrate(quantize(model, bits, images()), [images()])
    assert not any(name.endswith("sign") for name in plain.state_dict())
    folded = fold_batch_norm(copy.deepcopy(plain))
    other = quantize(settled("residual", seed=3), bits, images())
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*bn.*Unexpected key.*sign"):
        other.load_state_dict(folded.state_dict())
    fold_batch_norm(other).load_state_dict(folded.state_dict())
    assert torch.equal(outputs(other.eval(), torch.float32), outputs(folded.eval(), torch.float32))


def test_copies_and_pickles() -> None:
    model = fold_batch_norm(ready("residual", 4, dtype=torch.float32))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert is_folded(other)
        assert torch.equal(outputs(other, torch.float32), outputs(model, torch.float32))
        assert torch.equal(lower(other).run(images()), lower(model).run(images()))


def test_folding_again_changes_nothing() -> None:
    model = fold_batch_norm(ready("residual", 4))
    before = copy.deepcopy(model.state_dict())
    assert not foldable(model)
    fold_batch_norm(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class _Shared(nn.Module):
    """Calls ``twice`` and its batch norm as a pair, ``once`` before two batch norms, and ties two layers' weights."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.pair = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.once, self.first, self.second = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.a, self.b, self.after = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pair(self.twice(self.pair(self.twice(x)).relu())).relu()
        x = self.second(self.once(self.first(self.once(x)).relu())).relu()
        return self.after(self.b(self.a(x).relu()))


def test_what_is_shared_folds_only_where_one_set_of_weights_does_for_all() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _Shared()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight)
        model(images())
    quantized = quantize(model.eval(), BitConfig.uniform(model, 4, 4), images()).double()
    calibrate(quantized, [images().double()]).eval()
    before = outputs(quantized)
    fold_batch_norm(quantized)
    torch.testing.assert_close(outputs(quantized), before, rtol=1e-9, atol=1e-9)
    norms = [name for name, module in quantized.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert sorted(norms) == ["after", "first", "second"]


def test_a_batch_norm_that_others_bypass_stays() -> None:
    class Bypass(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x)
            return self.bn(x) + x

    model = Bypass().eval()
    quantized = fold_batch_norm(quantize(model, BitConfig.uniform(model), images()))
    assert isinstance(quantized.get_submodule("bn"), nn.BatchNorm2d)
    assert not is_folded(quantized)


@pytest.mark.parametrize("act", [fold_batch_norm, freeze_batch_norm])
def test_without_running_statistics_nothing_is_changed(act: Any) -> None:
    model = settled("residual")
    quantized = quantize(model, BitConfig.uniform(model), images())
    last = quantized.get_submodule("block2.bn2")
    last.running_mean = last.running_var = None  # type: ignore[assignment]
    before = copy.deepcopy(quantized.state_dict())
    quantized.train()
    with pytest.raises(UnsupportedModelError, match=r"'block2.bn2' keeps no running statistics"):
        act(quantized)
    assert all(module.training for module in quantized.modules())
    assert not is_folded(quantized)
    assert all(torch.equal(value, before[name]) for name, value in quantized.state_dict().items())


def test_frozen_statistics_survive_training_mode_and_learn_no_more() -> None:
    model = settled("residual").train()
    assert freeze_batch_norm(model) is model
    assert {name for name, module in model.named_modules() if not module.training} == {
        name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)
    }
    wanted = model(images(seed=2)).detach()
    before = {name: value.clone() for name, value in model.named_buffers()}
    model.train()
    assert torch.equal(model(images(seed=2)), wanted)  # the network has no dropout
    model.train()(images(seed=3)).square().sum().backward()
    assert before
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    norm = model.get_submodule("bn")
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.weight.grad is not None
    assert norm.bias.grad is not None
    assert float(norm.weight.grad.abs().min()) > 0


def test_copies_of_a_frozen_network_are_frozen() -> None:
    model = freeze_batch_norm(freeze_batch_norm(settled("residual")))
    norm = model.get_submodule("bn")
    assert len(norm._forward_pre_hooks) == 1
    quantized = calibrate(quantize(model, BitConfig.uniform(model, 4, 4), images()), [images()])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), quantized, copy.deepcopy(quantized)):
        before = other.get_submodule("bn").running_mean.clone()  # type: ignore[operator,union-attr]
        other.train()(images(seed=3))
        assert torch.equal(other.get_submodule("bn").running_mean, before)  # type: ignore[arg-type]
    assert lower(quantized).is_integer_only
