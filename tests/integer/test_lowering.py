from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from quantization.small_networks import NETWORKS, images, settled
from torch import nn

from lightning_baqe import BitConfig, LayerBits, QuantizedModel, calibrate, lower, quantize
from lightning_baqe.errors import CalibrationError, ConfigError, UnsupportedModelError
from lightning_baqe.integer.folding import add_factors
from lightning_baqe.integer.graph import IntegerGraph
from lightning_baqe.integer.nodes import Add, AvgPool, Conv, Linear, Requantize, TensorType


def ready(model: nn.Module, bits: BitConfig, x: torch.Tensor) -> QuantizedModel:
    return calibrate(quantize(model, bits, x), [x]).eval()


def check_nodes(model: QuantizedModel, graph: IntegerGraph, x: torch.Tensor) -> int:
    """Compare each integer node, given its own inputs, with the fake-quantized tensor; returns how many were compared.

    Two things may differ: ties, and the bias, which is rounded to a whole step of the accumulator. A step of the
    accumulator is ``factor`` steps of the output: that bounds both the differences and how many there are.
    """
    wanted: dict[tuple[float, tuple[int, ...]], torch.Tensor] = {}
    hooks = [
        quantizer.register_forward_hook(
            lambda module, args, out: wanted.__setitem__(
                (module.step(), tuple(out.shape[1:])), torch.round(out / module.step()).long() + module.zero_point()
            )
        )
        for quantizer in model.quantizers().values()
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    found = {node.name: wanted.get((node.type.scale, node.type.shape)) for node in graph if node.type.is_integer}
    compared = 0
    for node in graph:
        inputs = [found[name] for name in node.inputs if found.get(name) is not None]
        # A convolution before a max pool is on the pool's grid but has no quantizer of its own: its shape is another.
        if not isinstance(node, Conv | Linear | Add | Requantize | AvgPool) or len(inputs) < len(node.inputs):
            continue
        target = found[node.name]
        if target is None:
            continue
        difference = (node.run(*inputs) - target).abs()
        factor = 0.0
        if isinstance(node, Conv | Linear) and node.requant is not None:
            factor = float(node.requant.real().abs().max())
        assert difference.max() <= 1 + factor / 2, node.name
        assert (difference > 0).float().mean() < 0.01 + factor, node.name
        compared += 1
    return compared


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.cosine_similarity(a.detach().flatten(), b.detach().flatten(), 0))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("width", [2, 3, 4, 6, 8])
def test_integers_agree_with_fake_quantization(name: str, width: int) -> None:
    model = settled(name)
    x = images()
    quantized = ready(model, BitConfig.uniform(model, width, width), x)
    graph = lower(quantized)
    assert graph.is_integer_only
    assert cosine(graph.run(x), quantized(x)) > 0.995
    assert check_nodes(quantized, graph, x) >= (2 if name != "mlp" else 0)


@settings(max_examples=15, deadline=None)
@given(st.data(), st.sampled_from(sorted(NETWORKS)), st.integers(0, 50))
def test_mixed_bits_and_float_islands(data: st.DataObject, name: str, seed: int) -> None:
    model = settled(name, seed)
    choice = st.sampled_from([LayerBits(w, a) for w in (3, 5, 8) for a in (3, 4, 8)] + [LayerBits(32, 32)] * 4)
    bits = BitConfig({layer: data.draw(choice) for layer in BitConfig.uniform(model)})
    x = images()
    quantized = ready(model, bits, x)
    graph = lower(quantized)
    assert cosine(graph.run(x), quantized(x)) > 0.98
    assert dict(graph.bits) == {layer: (b.weight, b.activation) for layer, b in bits.items()}
    assert list(graph.bits) == list(bits)
    assert graph.is_integer_only or any(b.is_float for b in bits.values())


@pytest.mark.parametrize("name", NETWORKS)
def test_all_float(name: str) -> None:
    model = settled(name)
    quantized = quantize(model, BitConfig.uniform(model, 32, 32), images())
    torch.testing.assert_close(lower(quantized).run(images()), model(images()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("source", ["torchvision", "timm"])
@pytest.mark.parametrize("width", [4, 8])
def test_resnet18(source: str, width: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if source == "torchvision":
            model = torchvision.models.resnet18(num_classes=10)
        else:
            model = timm.create_model("resnet18", num_classes=10)
        x = torch.randn(8, 3, 32, 32)
        model.train()
        for _ in range(5):
            model(torch.randn(32, 3, 32, 32))
    quantized = ready(model.eval(), BitConfig.uniform(model, width, width), x)
    graph = lower(quantized)
    # Untrained and 20 layers deep: a step's difference spreads, so that nodes are compared given the same inputs.
    assert cosine(graph.run(x), quantized(x)) > (0.99 if width == 8 else 0.85)
    assert check_nodes(quantized, graph, x) > 20
    assert len(graph.bits) == 21
    assert graph.macs == 37_016_576
    assert graph["layer1.0.conv1"].type.low == 0
    assert graph["fc"].kind == "linear"


def test_model_is_unchanged_and_batches_do_not_matter() -> None:
    model = settled("residual").train()
    quantized = calibrate(quantize(model, BitConfig.uniform(model), images()), [images()])
    before = {key: value.clone() for key, value in quantized.state_dict().items()}
    graph = lower(quantized)
    assert all(module.training for module in quantized.modules())
    assert all(torch.equal(value, before[key]) for key, value in quantized.state_dict().items())
    whole = graph.run(images(5))
    assert torch.equal(whole, torch.cat([graph.run(images(5)[i : i + 1]) for i in range(5)]))


def test_input_is_quantized_bit_for_bit_alike() -> None:
    model = settled("residual")
    x = images(64)
    quantized = ready(model, BitConfig.uniform(model), x)
    quantizer = next(iter(quantized.quantizers().values()))
    integers = lower(quantized).run_all(x)["input.quantize"]
    assert torch.equal((integers - quantizer.zero_point()) * torch.tensor(quantizer.step()), quantizer(x).detach())


@pytest.mark.parametrize(("gain", "shift"), [(0.0, 0.7), (0.0, 0.0), (1e-12, -0.4), (-0.8, 0.1), (1e-30, 1.0)])
def test_batch_norm_gains_near_zero_and_negative(gain: float, shift: float) -> None:
    model = settled("residual")
    for name in ("bn", "block1.bn1", "block2.bn2"):
        norm = model.get_submodule(name)
        with torch.no_grad():
            norm.weight[1] = gain  # type: ignore[union-attr,index]
            norm.bias[1] = shift  # type: ignore[union-attr,index]
    quantized = ready(model, BitConfig.uniform(model), images())
    graph = lower(quantized)
    assert cosine(graph.run(images()), quantized(images())) > 0.999
    check_nodes(quantized, graph, images())


def test_zero_network() -> None:
    model = settled("residual")
    nn.init.zeros_(model.get_submodule("block2").bn2.weight)  # type: ignore[union-attr,arg-type]
    nn.init.zeros_(model.get_submodule("block2").bn2.bias)  # type: ignore[union-attr,arg-type]
    nn.init.zeros_(model.get_submodule("block1.conv1").weight)  # type: ignore[arg-type]
    quantized = ready(model, BitConfig.uniform(model, 4, 4), images())
    assert cosine(lower(quantized).run(images()), quantized(images())) > 0.995


def test_relu_is_the_lower_end_of_a_range_and_requantize_follows_the_widest() -> None:
    model = settled("many_readers")
    graph = lower(ready(model, BitConfig.uniform(model).replace(c=LayerBits(4, 3)), images()))
    narrow = graph["c"].inputs[0]
    assert isinstance(graph[narrow], Requantize)
    assert graph[narrow].type.high == 7
    assert graph[graph[narrow].inputs[0]].type.high == 255
    assert isinstance(graph["c"], Conv)
    assert (graph["c"].weight_bits, graph["c"].activation_bits) == (4, 3)
    assert graph["b"].inputs[0] == graph[narrow].inputs[0]


@given(
    st.floats(1e-4, 50.0), st.floats(1e-4, 50.0), st.integers(0, 255), st.integers(0, 255), st.integers(2, 8)
)  # fmt: skip
def test_add_factors_stay_within_32_bits(a: float, b: float, zero_a: int, zero_b: int, bits: int) -> None:
    top = 2**bits - 1
    zero_points = zero_a % (top + 1), zero_b % (top + 1)
    first, second = (TensorType((1,), 0, top, zero_point=zero) for zero in zero_points)
    multipliers, shift, offset = add_factors((a, b), (first, second), "add")
    products = [m * top for m in multipliers]
    assert sum(map(abs, products)) + abs(offset) + 2 ** (shift - 1) < 2**31
    # Errors of both factors together stay far below a step.
    worst = sum(abs(m / 2**shift - r) * top for m, r in zip(multipliers, (a, b), strict=True))
    assert worst < 0.01


class _Wrapped(nn.Module):
    def __init__(self, tail: nn.Module) -> None:
        super().__init__()
        self.conv, self.tail = nn.Conv2d(3, 4, 3), tail

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tail(self.conv(x))


class _Fixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(192, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.view(8, -1))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (_Wrapped(nn.Softmax(1)), r"'tail' \(.*no integer meaning"),
        (_Wrapped(nn.LayerNorm([4, 6, 6])), r"'tail' \(.*no integer meaning.*use batch norms"),
        (_Fixed(), r"_Fixed does not run on example_input"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4, track_running_stats=False)),
            r"module '2' \(BatchNorm2d\).*track_running_stats",
        ),
    ],
)
def test_unsupported_operators_are_named(model: nn.Module, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        quantize(model.eval(), BitConfig.uniform(model), images())


@pytest.mark.parametrize(
    "model",
    [
        _Wrapped(nn.AdaptiveMaxPool2d(4)),
        _Wrapped(nn.Flatten(2)),
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")),
    ],
)
def test_windows_of_different_sizes_outputs_of_any_shape_and_padding_of_any_mode(model: nn.Module) -> None:
    quantized = ready(model.eval(), BitConfig.uniform(model), images())
    found, wanted = lower(quantized).run(images()), quantized(images())
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)


def test_refuses_what_is_not_ready() -> None:
    model = settled("mlp")
    quantized = quantize(model, BitConfig.uniform(model), images())
    with pytest.raises(CalibrationError, match="no scale yet"):
        lower(quantized, images())
    calibrate(quantized, [images()])
    with pytest.raises(ConfigError, match="returned, got a Sequential"):
        lower(model, images())  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match="does not run on"):
        lower(quantized, torch.zeros(1, 3, 9, 9))
