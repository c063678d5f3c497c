from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
import torchvision
from torch import nn

from lightning_baqe import BitConfig, LayerBits, calibrate, lower, quantize
from lightning_baqe.errors import CalibrationError, ConfigError, UnsupportedModelError
from quantization.small_networks import INPUT_SHAPE, NETWORKS, Residual, images, settled


@pytest.mark.parametrize("name", NETWORKS)
def test_uniform_32_computes_what_the_float_model_does(name: str) -> None:
    model = settled(name)
    quantized = quantize(model, BitConfig.uniform(model, 32, 32), images())
    assert not quantized.quantizers()
    assert torch.equal(quantized(images()), model(images()))


@pytest.mark.parametrize("name", NETWORKS)
def test_8_bits_come_close_and_leave_the_original_alone(name: str) -> None:
    model = settled(name)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    quantized = calibrate(quantize(model, BitConfig.uniform(model), images()), [images()])
    assert torch.equal(random, torch.get_rng_state())
    out, wanted = quantized(images()), model(images())
    assert torch.cosine_similarity(out.flatten(), wanted.flatten(), 0) > 0.99
    with torch.no_grad():
        for parameter in quantized.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_trains(name: str) -> None:
    model = settled(name)
    quantized = calibrate(quantize(model, BitConfig.uniform(model, 4, 4), images()), [images()]).train()
    quantized(images()).square().sum().backward()
    assert [name for name, parameter in quantized.named_parameters() if parameter.grad is None] == []


def test_mode_follows_train_and_eval() -> None:
    model = settled("functional")
    quantized = calibrate(quantize(model, BitConfig.uniform(model), images()), [images()])
    assert not any(module.training for module in quantized.modules())
    assert torch.equal(quantized(images()), quantized(images()))
    before = quantized.get_submodule("b1").running_mean.clone()  # type: ignore[union-attr,operator]
    quantized.train()
    assert not torch.equal(quantized(images()), quantized(images()))  # the functional dropout is a module now
    assert not torch.equal(quantized.get_submodule("b1").running_mean, before)  # type: ignore[arg-type]


def test_readers_of_one_tensor_at_the_same_bits_share_its_quantizer() -> None:
    model = settled("many_readers")
    names = quantize(model, BitConfig.uniform(model), images()).quantizers()
    assert len(names) == 8  # input; bn; relu, once for b and c; b; c; b + c; (b + c) + bn; mean
    with_4 = BitConfig.uniform(model).replace(c=LayerBits(4, 4))
    assert len(quantize(model, with_4, images()).quantizers()) == 9


def test_narrow_quantizers_are_chained_behind_the_widest() -> None:
    model = settled("many_readers")
    quantized = quantize(model, BitConfig.uniform(model).replace(c=LayerBits(4, 3)), images())
    calibrate(quantized, [images()])
    chained = quantized.get_submodule("activation_quantizers.relu_3bit")
    seen = []
    chained.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    quantized(images())
    primary = quantized.quantizers()["activation_quantizers.relu"]
    assert torch.equal(primary(seen[0]), seen[0])


def test_other_bits() -> None:
    model = settled("residual")
    bits = BitConfig.uniform(model, other=6)
    widths = {name: q.bits for name, q in quantize(model, bits, images()).quantizers().items()}
    assert widths["activation_quantizers.block1_bn2"] == 6
    assert widths["activation_quantizers.x"] == 8


@pytest.mark.parametrize("options", [{}, {"activation_quantizer": "lsq", "weight_init": "lsq"}])
def test_checkpoint_round_trip(tmp_path, options) -> None:
    model = settled("residual")
    bits = BitConfig.uniform(model, 4, 4)
    first = calibrate(quantize(model, bits, images(), **options), [images()])
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = quantize(settled("residual", seed=7), bits, images(), **options)
    with pytest.raises(CalibrationError):
        second(images())
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(first(images()), second(images()))


def test_deepcopy_and_pickle() -> None:
    model = settled("residual")
    quantized = calibrate(quantize(model, BitConfig.uniform(model, 4, 4), images()), [images()])
    wanted = quantized(images())
    for other in (copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):
        assert torch.equal(other(images()), wanted)
        assert other.bits == quantized.bits
        assert other.record.input_shape == INPUT_SHAPE


@pytest.mark.parametrize(
    "make", [lambda: torchvision.models.resnet18(num_classes=4), lambda: timm.create_model("resnet18", num_classes=4)]
)
def test_resnets_from_elsewhere(make) -> None:
    model = make().eval()
    bits = BitConfig.uniform(model, 32, 32)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(quantize(model, bits, x)(x), model(x))
    assert len(quantize(model, BitConfig.uniform(model, 4, 4), x).quantizers()) > 20


def test_calibrate_restores_modes_and_takes_pairs_and_limits() -> None:
    model = settled("residual").train()
    quantized = quantize(model, BitConfig.uniform(model), images())
    running = quantized.get_submodule("bn").running_mean.clone()  # type: ignore[union-attr,operator]
    never = iter([(images(), torch.zeros(8)), "not reached"])
    calibrate(quantized, never, max_batches=1)
    assert all(module.training for module in quantized.modules())
    assert torch.equal(quantized.get_submodule("bn").running_mean, running)  # type: ignore[arg-type]
    assert all(bool(q.initialized) for q in quantized.quantizers().values())


def test_calibrate_refuses_no_data_and_bad_data() -> None:
    model = settled("residual")
    quantized = quantize(model, BitConfig.uniform(model), images())
    with pytest.raises(CalibrationError, match="no batches"):
        calibrate(quantized, [])
    bad = images()
    bad[0, 0, 0, 0] = float("nan")
    with pytest.raises(CalibrationError, match="not finite"):
        calibrate(quantized, [bad])
    with pytest.raises(CalibrationError, match=r"call lightning_baqe\.calibrate"):
        quantized(images())
    with pytest.raises(ConfigError, match="must be one of"):
        quantize(model, BitConfig.uniform(model), images(), activation_quantizer="pact")
    with pytest.raises(ConfigError, match="quantized already"):
        quantize(quantized, BitConfig.uniform(model), images())


class _Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Residual()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) if x.sum() > 0 else x


class _FunctionalNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.batch_norm(self.conv(x), None, None, training=True)


@pytest.mark.parametrize(
    ("model", "reason"), [(_Branches(), "cannot be traced"), (_FunctionalNorm(), "statistics of the batch")]
)
def test_models_that_cannot_be_traced(model: nn.Module, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        quantize(model, BitConfig.uniform(model), images())


class _InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        y = self.b(self.relu(x))
        return y + x  # x is what the in-place ReLU left


def test_in_place_operators_keep_their_meaning() -> None:
    model = _InPlace().eval()
    for bits, tolerance in ((32, 0.0), (8, 0.1)):
        quantized = calibrate(quantize(model, BitConfig.uniform(model, bits, bits), images()), [images()])
        assert (quantized(images()) - model(images())).abs().max() <= tolerance


class AtTwoPaths(nn.Module):
    """A block that a list holds twice."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.blocks = nn.ModuleList([block, block])
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        found: torch.Tensor = self.out(x)
        return found


def test_a_module_at_two_paths_is_one() -> None:
    net, x = AtTwoPaths().eval(), torch.randn(4, 4, 6, 6)
    model = quantize(net, BitConfig.uniform(net, 3, 3, first_last=None), x)
    calls = [str(node.target) for node in model.graph.nodes if node.op == "call_module"]
    assert [path for path in calls if "quantizers" not in path] == [*("blocks.0.0", "blocks.0.1") * 2, "out"]
    assert not any(name.startswith("blocks.1") for name in model.state_dict())
    calibrate(model, [x]).train()
    before = model.get_buffer("blocks.0.1.running_mean").clone()
    model(x).sum().backward()
    assert not torch.equal(model.get_buffer("blocks.0.1.running_mean"), before)  # both calls train one batch norm
    graph = lower(model.eval())
    torch.testing.assert_close(graph.run(x), model(x).detach(), rtol=0.05, atol=0.1)
