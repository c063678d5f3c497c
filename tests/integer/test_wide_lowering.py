"""Every operator that lowers: fake quantization against integers, tensor by tensor, and against floats."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from integer.wide_networks import WIDE, settled_wide, wide_images
from lightning_baqe.benchmarks.exactness import agreement, fake_quant_integers
from lightning_baqe.calibration.calibrate import calibrate
from lightning_baqe.entrance.quantize import quantize
from lightning_baqe.errors import ConfigError, UnsupportedModelError
from lightning_baqe.integer.graph import IntegerGraph
from lightning_baqe.integer.lowering import lower, lower_with_sources
from lightning_baqe.integer.nodes import Affine, AvgPool, Concat, Gather, Move, Mul, Requantize, Table
from lightning_baqe.integer.serialize import graph_from_parts, graph_to_parts
from lightning_baqe.quantization.config import BitConfig, LayerBits
from lightning_baqe.quantization.convert import QuantizedModel


def ready(model: nn.Module, bits: BitConfig, x: torch.Tensor) -> QuantizedModel:
    return calibrate(quantize(model, bits, x).eval(), [x])


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.cosine_similarity(a.detach().flatten(), b.detach().flatten(), 0))


def assert_tensors_agree(quantized: QuantizedModel, x: torch.Tensor) -> IntegerGraph:
    """Given fake-quant's inputs, every stored tensor is fake-quant's but for ties, which are one step apart."""
    graph, sources = lower_with_sources(quantized, x)
    fake = fake_quant_integers(quantized, graph, sources, x)
    given_values = {graph.nodes[0].name: x, **fake}
    checked = 0
    for node in graph.nodes[1:]:
        value = node.run(*(given_values[name] for name in node.inputs))
        given_values.setdefault(node.name, value)
        if node.name in fake:
            found = agreement(fake[node.name], value, node.type.zero_point)
            assert found.largest <= 1, node.name
            assert found.equal >= 0.98, (node.name, found)
            checked += 1
    assert checked >= 3
    return graph


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("width", [3, 4, 8])
def test_stored_tensors_are_fake_quantizations(name: str, width: int) -> None:
    model, x = settled_wide(name), wide_images()
    quantized = ready(model, BitConfig.uniform(model, width, width), x)
    graph = assert_tensors_agree(quantized, x)
    assert graph.is_integer_only
    assert cosine(graph.run(x), quantized(x)) > 0.99
    assert width < 8 or cosine(graph.run(x), model(x)) > 0.98


def test_together_they_hold_every_operator() -> None:
    kinds: set[type] = set()
    for name in WIDE:
        model, x = settled_wide(name), wide_images(2)
        kinds |= {type(node) for node in lower(ready(model, BitConfig.uniform(model), x))}
    assert {Affine, AvgPool, Concat, Gather, Mul, Table} <= kinds


@pytest.mark.parametrize("name", WIDE)
def test_floats_stay_floats(name: str) -> None:
    model, x = settled_wide(name), wide_images()
    graph = lower(quantize(model, BitConfig.uniform(model, 32, 32), x))
    torch.testing.assert_close(graph.run(x), model(x), rtol=1e-4, atol=1e-4)
    assert not any(node.type.is_integer for node in graph)


@settings(max_examples=20, deadline=None)
@given(st.data(), st.sampled_from(sorted(WIDE)), st.integers(0, 20), st.sampled_from([None, 4, 32]))
def test_mixed_bits_and_float_islands(data: st.DataObject, name: str, seed: int, residual: int | None) -> None:
    model, x = settled_wide(name, seed), wide_images()
    choice = st.sampled_from([LayerBits(w, a) for w in (3, 5, 8) for a in (4, 6, 8)] + [LayerBits(32, 32)] * 4)
    bits = BitConfig({layer: data.draw(choice) for layer in BitConfig.uniform(model)}, residual=residual)
    quantized = ready(model, bits, x)
    graph = lower(quantized)
    assert cosine(graph.run(x), quantized(x)) > 0.97
    again = graph_from_parts(*graph_to_parts(graph))
    assert torch.equal(again.run(x), graph.run(x))
    whole = graph.run(x)
    if graph.is_integer_only:  # float sums may take another order for another batch
        assert torch.equal(whole[:1], graph.run(x[:1]))


def test_tables_hold_the_function_as_pytorch_computes_it() -> None:
    model, x = settled_wide("functions"), wide_images()
    graph = lower(ready(model, BitConfig.uniform(model), x))
    tables = [node for node in graph if isinstance(node, Table)]
    names = {step[0].split(".")[0] for node in tables for step in node.steps}
    assert {"silu", "leaky_relu", "gelu", "sigmoid", "tanh", "mish", "elu", "softplus", "rsub", "mul", "add"} <= names
    composed = next(node for node in tables if len(node.steps) == 2 and node.steps[0] == ("tanh", "%0"))
    assert composed.steps == (("tanh", "%0"), ("mul.Tensor", "%1", 2.0))
    source = graph[composed.inputs[0]].type
    reals = (torch.arange(len(composed.table)) + composed.input_low - source.zero_point) * source.scale
    wanted = torch.tanh(reals) * 2 / composed.type.scale + composed.type.zero_point
    inside = (wanted > composed.type.low) & (wanted < composed.type.high)
    assert inside.sum() > 100
    assert (composed.table - wanted).abs()[inside].max() <= 0.5 + 1e-4


def test_padding_of_its_own_becomes_the_convolutions() -> None:
    model, x = settled_wide("special"), wide_images()
    graph = lower(ready(model, BitConfig.uniform(model), x))
    assert graph["same"].padding == (0, 1, 0, 1)  # type: ignore[attr-defined]
    assert not any(isinstance(node, Gather) for node in graph)


def test_quantizing_leaves_special_layers_of_the_model_alone() -> None:
    model, x = settled_wide("special"), wide_images()
    before, weights = model(x), copy.deepcopy(model.state_dict())
    kinds = [type(module) for module in model.modules()]
    quantized = ready(model, BitConfig.uniform(model), x)
    assert torch.equal(model(x), before)
    assert [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert cosine(quantized(x), before) > 0.99


def test_quantize_needs_an_example() -> None:
    model = settled_wide("special")
    with pytest.raises(ConfigError, match="example_input"):
        quantize(model, BitConfig.uniform(model))


def test_control_flow_on_sizes_is_followed_and_on_values_refused() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x) if x.shape[2] > 4 else x

    model = Sized().eval()
    graph = lower(quantize(model, BitConfig.uniform(model, 32, 32), wide_images()))
    torch.testing.assert_close(graph.run(wide_images()), model(wide_images()), rtol=1e-4, atol=1e-5)

    class Valued(Sized):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x) if x.sum() > 4 else x

    with pytest.raises(UnsupportedModelError, match=r"Valued.*control flow"):
        quantize(Valued(), BitConfig.uniform(Valued()), wide_images())


def test_modules_that_drop_by_chance_train_and_those_of_ones_own_run_as_in_eval_mode() -> None:
    class StochasticDepth(nn.Module):
        """The user's own: nobody knows what it does in training."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 0 if self.training else x

    for middle, drops in ((torchvision.ops.StochasticDepth(1.0, "batch"), True), (StochasticDepth(), False)):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), middle, nn.Conv2d(4, 4, 3)).eval()
        quantized = ready(model, BitConfig.uniform(model), wide_images())
        evaluated, trained = quantized(wide_images()).std(), quantized.train()(wide_images()).std()
        assert (evaluated > trained * 1.01) == drops


def test_any_order_of_elements() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(1, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(nn.functional.pixel_shuffle(self.a(x), 2)).transpose(2, 3)

    model = Mixed().eval()
    quantized = ready(model, BitConfig.uniform(model), wide_images())
    graph = lower(quantized)
    assert any(isinstance(node, Move) for node in graph)
    assert cosine(graph.run(wide_images()), quantized(wide_images())) > 0.999


def test_sizes_count_every_constant() -> None:
    model, x = settled_wide("squeeze_excite"), wide_images(2)
    graph = lower(ready(model, BitConfig.uniform(model, 4, 4), x))
    weights = 8 * 27 + (8 * 25 + 32 + 32 + 64) / 2 + 5 * 8  # the first and the last layer have 8 bits
    channels = 8 + 8 + 4 + 8 + 8
    per_channel = channels * (4 + 4 + 4)  # bias, multiplier, fraction
    logits = 5 * 4  # accumulators: a bias alone
    shifts = 5
    tables = sum(len(node.table) for node in graph if isinstance(node, Table))
    one_sum = 2 * 4 + 1
    others = sum(5 for node in graph if isinstance(node, AvgPool | Mul | Requantize)) + one_sum
    assert graph.size_bytes == weights + per_channel + logits + shifts + tables + others


def test_int32_biases_alone_lose_less_than_a_step_of_each_output() -> None:
    model, x = settled_wide("squeeze_excite"), wide_images()
    graph = lower(ready(model, BitConfig.uniform(model), x))
    plain = graph.with_int32_biases()
    assert plain.size_bytes == graph.size_bytes - 4 * (8 + 8 + 4 + 8 + 8)
    values = graph.run_all(x)
    for node in plain:
        if node.type.is_integer:
            given_values = [values[name] for name in node.inputs]
            assert (node.run(*given_values) - values[node.name]).abs().max() <= 1


@pytest.mark.parametrize("move", ["slice", "flip"])
def test_logits_may_move(move: str) -> None:
    class Moved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.fc(self.conv(x).mean((2, 3)))
            return y[:, :5] if move == "slice" else y.flip(1)

    model, x = Moved().eval(), wide_images()
    quantized = ready(model, BitConfig.uniform(model), x)
    assert cosine(lower(quantized).run(x), quantized(x)) > 0.999
