"""What comes in at the front door, what is refused there and how, and the gate of equality."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from lightning_baqe import BitConfig, calibrate, check, lower, quantize
from lightning_baqe.entrance import equality
from lightning_baqe.entrance.admission import admit
from lightning_baqe.errors import BaqeError, ConfigError, UnsupportedModelError
from lightning_baqe.quantization.train_modes import evaluating


def images(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def small(*more: nn.Module) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), *more, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(8, 5),
        ).eval()  # fmt: skip


class Returning(nn.Module):
    def __init__(self, pack: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
        super().__init__()
        self.net, self.pack = small(), pack

    def forward(self, x: torch.Tensor) -> Any:
        return self.pack(self.net(x), self.net[0](x))


class Calling(nn.Module):
    """Something done with the logits."""

    def __init__(self, function: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.net, self.function, self.calls = small(), function, 0

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self.net(x))


def _with(change: Callable[[nn.Sequential], Any]) -> nn.Module:
    model = small()
    change(model)
    return model


def _set(model: nn.Module, name: str, value: float) -> None:
    with torch.no_grad():
        dict((*model.named_parameters(), *model.named_buffers()))[name].view(-1)[1] = value


@pytest.mark.filterwarnings("ignore")  # of what is deprecated
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: _with(lambda m: prune.l1_unstructured(m[0], "weight", 0.5)), r"'0' \(Conv2d\).*prune\.remove"),
        (lambda: _with(lambda m: weight_norm(m[5])), r"'5' \(Linear\).*remove_weight_norm"),
        (lambda: _with(lambda m: spectral_norm(m[0])), r"'0' \(Conv2d\).*remove_spectral_norm"),
        (lambda: _with(lambda m: parametrizations.orthogonal(m[5])), r"'5'.*remove_parametrizations"),
        (lambda: nn.Sequential(nn.LazyConv2d(4, 3)), r"not initialised.*run the network"),
        (lambda: small().half(), r"'0\.weight' has the dtype torch\.float16.*\.float\(\)"),
        (lambda: small().double(), r"float64.*\.float\(\)"),
        (lambda: small().bfloat16(), r"bfloat16.*\.float\(\)"),
        (lambda: small().to("meta"), r"meta device.*load the weights"),
        (lambda: _with(lambda m: _set(m, "5.bias", float("nan"))), r"'5\.bias' has 1 of 5 values.*not finite"),
        (lambda: _with(lambda m: _set(m, "1.running_mean", float("inf"))), r"'1\.running_mean'.*not finite"),
        (lambda: _with(lambda m: _set(m, "1.running_var", -1.0)), r"'1\.running_var' has negative"),
        (lambda: torch.jit.trace(small(), images()), "TorchScript"),
        (lambda: Calling(lambda y: y / 0), "returns values that are not finite"),
        (lambda: Calling(lambda y: y if y.sum() > 0 else -y), r"Calling cannot be traced.*control flow"),
        (lambda: Calling(lambda y: torch.from_numpy(y.detach().numpy()) + y), "cannot be traced"),
        (lambda: Calling(lambda y: y * torch.rand(1)), r"rand|random"),
        (lambda: Calling(lambda y: functional.softmax(y, 1)), r"softmax in the forward \(Calling\).*leave it out"),
        (lambda: Calling(lambda y: y.sort(1)[0]), r"sort in the forward \(Calling\)"),
        (lambda: Calling(lambda y: y.no_such_method()), r"does not run on example_input.*no_such_method"),
    ],
)
def test_refusals_name_the_module_and_what_to_do(make: Callable[[], nn.Module], reason: str) -> None:
    model = make()
    with pytest.raises(UnsupportedModelError, match=f"(?s){reason}"):
        admit(model, images())
    report = check(model, images())
    assert not report.ok or "softmax" in reason or "sort" in reason


def test_bits_of_a_lazy_network_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'0\.weight' is not initialised.*run the network"):
        BitConfig.uniform(nn.Sequential(nn.LazyConv2d(4, 3)))


def test_all_refusals_come_at_once() -> None:
    model = small(nn.LayerNorm([8, 8, 8]), nn.Softmax(1))
    with pytest.raises(UnsupportedModelError, match=r"(?s)LayerNorm.*Softmax|'2' .*'3' "):
        quantize(model, BitConfig.uniform(model), images())
    report = check(model, images())
    assert [row.path for row in (*report.floats, *report.refused)] == ["2", "3"]
    assert all(name in str(report) for name in ("Conv2d", "LayerNorm", "integer"))


@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, lambda model: torch.compile(model, backend="eager"), lambda model: model.compile() or model],
    ids=["DataParallel", "torch.compile", "compile()"],
)
def test_wrappers_are_taken_off(wrap: Callable[[nn.Module], Any]) -> None:
    plain, wrapped = small(), wrap(small())
    bits = BitConfig.uniform(wrapped)
    assert bits == BitConfig.uniform(plain)
    found = calibrate(quantize(wrapped, bits, images()), [images()])(images())
    assert torch.equal(found, calibrate(quantize(plain, bits, images()), [images()])(images()))


def test_several_outputs_are_chosen_by_name() -> None:
    model = Returning(lambda y, features: {"logits": y, "features": features})
    with pytest.raises(UnsupportedModelError, match=r"dict of 2.*one tensor.*'logits', 'features'"):
        admit(model, images())
    with pytest.raises(ConfigError, match=r"output='other'"):
        admit(model, images(), output="other")
    for pack, output in ((model.pack, "features"), (lambda y, features: (y, features), 1)):
        model = Returning(pack)
        graph = lower(quantize(model, BitConfig.uniform(model, 32, 32), images(), output=output))
        torch.testing.assert_close(graph.run(images()), model.net[0](images()), rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="returns one tensor"):
        admit(small(), images(), output="logits")


@pytest.mark.parametrize("example", [None, "x", torch.zeros(()), torch.zeros(0, 3, 8, 8), [1, 2]])
def test_examples_that_are_none(example: Any) -> None:
    with pytest.raises(ConfigError, match="example_input"):
        quantize(small(), BitConfig.uniform(small()), example)


def test_what_changes_from_call_to_call_does_not_get_through() -> None:
    class Counting(Calling):
        def forward(self, x: torch.Tensor) -> Any:
            self.calls += 1
            return self.net(x) * self.calls

    with pytest.raises(UnsupportedModelError, match="changes from call to call"):
        admit(Counting(lambda y: y), images())


def test_the_gate_names_the_first_tensor_that_differs() -> None:
    """As if lowering had a fault: another weight in the trace than in the module."""
    model = small()
    network = admit(model, images())
    wrong = copy.deepcopy(network.graph)
    with torch.no_grad():
        wrong.get_submodule("1").weight.mul_(1.01)  # type: ignore[union-attr,operator]
        wanted = model(images()[:2])
    with pytest.raises(UnsupportedModelError, match=r"module '1' \(BatchNorm2d\)"):
        equality.refuse_different(model, wrong, network.inputs, wanted, None)


def test_the_module_stays_as_it_is() -> None:
    model = small(nn.Dropout(0.5)).train()
    model[0].eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    admit(model, images())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert modes == [m.training for m in model.modules()]
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def test_a_network_is_traced_once_for_many_bit_configs() -> None:
    model = small()
    network = admit(model, images())
    for bits in (4, 8):
        config = BitConfig.uniform(model, bits, bits)
        once, again = quantize(network, config), quantize(model, config, images())
        for quantized in (once, again):
            calibrate(quantized, [images()])
        assert torch.equal(once(images()), again(images()))
    with evaluating(model):
        assert torch.equal(network.graph(images()), model(images()))


def test_errors_are_of_this_package() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise KeyError("theirs")

    with pytest.raises(BaqeError, match="KeyError"):
        admit(Broken(), images())


def test_parametrizations_that_were_removed_are_fine() -> None:
    model = small()
    parametrizations.weight_norm(model[5])
    parametrize.remove_parametrizations(model[5], "weight")
    assert check(model, images()).ok
