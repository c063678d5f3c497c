"""What holds for every sensitivity, and closed forms of some."""

from __future__ import annotations

import copy
import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lightning_baqe as baqe
from lightning_baqe.allocation.evidence import Evidence, Sensitivities, Sensitivity
from lightning_baqe.allocation.fisher import Fisher, OutputFisher, PairwiseFisher
from lightning_baqe.allocation.hessian import HessianTrace
from lightning_baqe.allocation.layer_gradients import layer_gradients, layer_inputs
from lightning_baqe.allocation.learned_scales import LearnedScales
from lightning_baqe.allocation.measured_losses import Divergence, LossChange, PairwiseLoss, mean_loss
from lightning_baqe.errors import ConfigError, DataError
from lightning_baqe.quantization.config import FLOAT_BITS, LayerBits
from lightning_baqe.quantization.convert import QuantizedModel
from lightning_baqe.quantization.sensitivity import layer_scores

ALL: list[Sensitivity] = [
    HessianTrace(samples=8),
    HessianTrace(samples=8, inputs=False),
    Fisher(),
    OutputFisher(chunk=5),
    PairwiseFisher(chunk=5),
    Divergence(),
    LossChange(),
    PairwiseLoss(images=8),
    LearnedScales(steps=3),
]
WIDTHS = (2, 4, 8)
pytestmark = pytest.mark.filterwarnings("ignore:Hessian traces .* below their standard errors")


class Net(nn.Module):
    """A transposed and a depthwise layer, a tensor with two readers, dropout, batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=1)
        self.side = nn.Conv2d(4, 4, 2, padding=1)
        self.dropout = nn.Dropout()
        self.classifier = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.depthwise(x))
        x = self.up(x) + self.side(x)
        return self.classifier(self.dropout(x.mean((2, 3))))


def made(seed: int = 0, with_float: bool = True) -> Evidence:
    torch.manual_seed(seed)
    net = Net().eval()
    batches = [(torch.randn(n, 3, 6, 6), torch.randint(0, 3, (n,))) for n in (8, 5)]
    models: dict[int, QuantizedModel | None] = {
        bits: baqe.calibrate(
            baqe.quantize(net, baqe.BitConfig.uniform(net, bits, bits), batches[0][0]), [x for x, _ in batches]
        ).eval()
        for bits in WIDTHS
    }
    if with_float:
        models[FLOAT_BITS] = None
    return Evidence(models, batches, functional.cross_entropy, kept=("first", "classifier"))


def calibrated(net: nn.Module, bits: baqe.BitConfig, x: Tensor) -> QuantizedModel:
    return baqe.calibrate(baqe.quantize(net, bits, x), [x]).eval()


def snapshot(evidence: Evidence) -> list[tuple[str, Tensor, bool, bool]]:
    return [
        (name, tensor.detach().clone(), getattr(tensor, "requires_grad", False), model.training)
        for model in evidence.models.values()
        if model is not None
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    ]


@pytest.mark.parametrize("method", ALL, ids=lambda method: f"{method.name}-{ALL.index(method)}")
class TestEverySensitivity:
    def test_all_layers_and_bits(self, method: Sensitivity) -> None:
        evidence = made()
        found = method.measure(evidence)
        middle = ("depthwise", "up", "side")
        assert list(found.values) == ["first", "depthwise", "up", "side", "classifier"]
        for layer, values in found.values.items():
            assert list(values) == ([2, 4, 8, FLOAT_BITS] if layer in middle else [8])
            assert all(math.isfinite(value) for value in values.values())
            if layer in middle:
                assert values[FLOAT_BITS] == 0
        assert set(found.pairs) == (set(itertools.combinations(middle, 2)) if "Pairwise" in method.name else set())
        assert Sensitivities.from_record(json.loads(json.dumps(found.record()))) == found
        cost = {name: {b: b for b in values} for name, values in found.values.items()}
        assert baqe.allocate_bits(found.values, {"mean": cost}, {"mean": 40}).costs["mean"] <= 40

    def test_the_same_again_and_nothing_is_changed(self, method: Sensitivity) -> None:
        evidence = made()
        before, state = snapshot(evidence), torch.get_rng_state()
        first = method.measure(evidence)
        assert torch.equal(torch.get_rng_state(), state)
        for one, other in zip(before, snapshot(evidence), strict=True):
            assert (one[0], one[2:]) == (other[0], other[2:])
            assert torch.equal(one[1], other[1])
        assert all(p.grad is None for model in evidence.models.values() if model for p in model.parameters())
        with torch.no_grad():
            assert method.measure(made()) == first

    def test_progress_is_told(self, method: Sensitivity) -> None:
        evidence, told = made(), []
        method.measure(replace(evidence, tell=lambda *of: told.append(of)))
        assert told
        assert all(0 < done <= total for done, total in told)
        assert [done for done, _ in told] == sorted(done for done, _ in told)

    def test_fewer_bits_are_not_better(self, method: Sensitivity) -> None:
        """On average over seeds and layers; single measured losses may fall."""
        if method.name in ("LossChange", "PairwiseLoss"):
            pytest.skip("what is measured on random labels may fall")
        found = [method.measure(made(seed, with_float=False)).values for seed in range(3)]
        means = {b: sum(of[layer][b] for of in found for layer in ("depthwise", "up", "side")) for b in WIDTHS}
        assert means[2] > means[4] > means[8] > 0

    def test_a_loss_that_is_not_finite(self, method: Sensitivity) -> None:
        if method.name == "Divergence":
            pytest.skip("it takes no loss")
        evidence = made()
        with pytest.raises(DataError, match="the loss is nan"):
            method.measure(Evidence(evidence.models, evidence.batches, lambda output, y: output.mean() * math.nan))


def test_divergence_is_that_of_the_search() -> None:
    evidence = made(with_float=False)
    images = torch.cat([x for x, _ in evidence.batches])
    found = Divergence().measure(evidence).values
    for bits in WIDTHS:
        model = evidence.models[bits]
        assert model is not None
        scores = layer_scores(model, images)
        # The others share a tensor, whose quantizer the search counts with each of them.
        assert found["depthwise"][bits] == pytest.approx(scores["depthwise"], rel=1e-4, abs=1e-9)


def test_pairs_sum_up_to_the_loss() -> None:
    evidence = made()
    found = PairwiseLoss(images=13).measure(evidence)
    before = mean_loss(evidence, {})
    for (one, other), values in found.pairs.items():
        for (a, b), extra in values.items():
            together = before + found.values[one][a] + found.values[other][b] + extra
            assert mean_loss(evidence, {one: a, other: b}) == pytest.approx(together, abs=1e-6)


def test_quantized_layers_are_those_of_the_models() -> None:
    """With all layers at the bits of one model, the network computes what it does, but for the other tensors."""
    torch.manual_seed(0)
    convs = (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
    net = nn.Sequential(*convs, nn.Flatten(), nn.Linear(16, 3)).eval()
    x, y = torch.randn(8, 3, 6, 6), torch.zeros(8, dtype=torch.long)
    model = calibrated(net, baqe.BitConfig.uniform(net, 4, 4), x)
    evidence = Evidence({4: model}, [(x, y)], functional.cross_entropy)
    with evidence.layerwise.at({"0": 8, "2": 4, "5": 8}) as network, torch.no_grad():
        torch.testing.assert_close(network(x), model(x))
        assert evidence.layerwise.network is network
    with torch.no_grad():
        torch.testing.assert_close(evidence.layerwise.network(x), net(x))


def linear_evidence(with_bias: bool = False) -> tuple[Evidence, nn.Linear]:
    """One linear layer between two that stay exact: images of integers on the grid, squared loss."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4, bias=with_bias)).eval()
    x, y = torch.randn(12, 6), torch.randn(12, 4)
    models = {b: calibrated(net, baqe.BitConfig({"0": LayerBits(b, 8)}), x) for b in (2, 4)}

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return 0.5 * (output - target).square().sum(1).mean()

    return Evidence(models, [(x, y)], loss), net[0]


def test_hessian_of_a_linear_layer_in_closed_form() -> None:
    """Squared loss: H is the second moment of x for each output, so that the sensitivity is known up to the probes."""
    evidence, linear = linear_evidence()
    (x, _), *_ = evidence.batches
    found = HessianTrace(samples=2000, tolerance=0.01, inputs=False).measure(evidence).values["0"]
    for bits, value in found.items():
        average = float(x.square().sum(1).mean()) / 6
        error = float(evidence.layerwise.weight_error("0", bits).square().sum())
        assert value == pytest.approx(0.5 * average * error, rel=0.05)
    assert linear.weight.grad is None


def test_fishers_of_a_linear_layer_in_closed_form() -> None:
    """With residual r the gradient is r at the output, r x' at the weights and W' r at the input."""
    evidence, linear = linear_evidence()
    (x, y), *_ = evidence.batches
    weight = linear.weight.detach()
    r = x @ weight.T - y
    by_weight = torch.einsum("no,ni->oi", r.square(), x.square()) / len(x)
    for bits in (2, 4):
        e, dx = evidence.layerwise.weight_error("0", bits), evidence.layerwise.input_error("0", bits, x).detach()
        wanted = 0.5 * float((by_weight * e.square()).sum() + ((r @ weight) * dx).square().sum() / len(x))
        assert Fisher().measure(evidence).values["0"][bits] == pytest.approx(wanted, rel=1e-4)
        change = (x + dx) @ (weight + e).T - x @ weight.T
        wanted = 0.5 * float((r.square() * change.square()).sum()) / len(x)
        assert OutputFisher().measure(evidence).values["0"][bits] == pytest.approx(wanted, rel=1e-4)
        wanted = 0.5 * float((r * change).sum(1).square().mean())
        assert PairwiseFisher().measure(evidence).values["0"][bits] == pytest.approx(wanted, rel=1e-4)


def test_pairs_are_half_the_squared_derivative_along_all_errors() -> None:
    """Of each image, along the errors of all layers' outputs at once, by a difference quotient of injected errors."""
    evidence, bits = made(seed=2), {"depthwise": 4, "up": 2, "side": 2}
    found = PairwiseFisher(chunk=4).measure(evidence)
    predicted = sum(found.values[name][b] for name, b in bits.items())
    predicted += sum(of[bits[one], bits[other]] for (one, other), of in found.pairs.items())
    network, step, squares = evidence.layerwise.network.double(), 1e-5, []
    for x, y in evidence.batches:
        inputs = layer_inputs(evidence, x.double())
        errors = {
            name: evidence.layerwise.output(name, b, inputs[name][0].float(), 0).double() - layer(inputs[name][0])
            for name, b in bits.items()
            if (layer := network.get_submodule(evidence.layerwise.paths[name]))
        }

        def losses(scale: float, x: Tensor = x, y: Tensor = y, errors: dict[str, Tensor] = errors) -> Tensor:
            hooks = [
                network.get_submodule(evidence.layerwise.paths[name]).register_forward_hook(
                    lambda _, args, output, error=error: output + scale * error
                )
                for name, error in errors.items()
            ]
            try:
                with torch.no_grad():
                    return functional.cross_entropy(network(x.double()), y, reduction="none")
            finally:
                for hook in hooks:
                    hook.remove()

        squares.append(((losses(step) - losses(-step)) / (2 * step)).square())
    assert predicted == pytest.approx(0.5 * float(torch.cat(squares).mean()), rel=1e-3)


def test_the_second_order_is_that_of_the_loss() -> None:
    """Where the gradient is 0 and the loss is quadratic, the rise of the loss is what Gauss and Newton say."""
    evidence, linear = linear_evidence()
    (x, _), *_ = evidence.batches
    at_optimum = Evidence(evidence.models, [(x, x @ linear.weight.detach().T)], evidence.loss_fn)
    measured = LossChange().measure(at_optimum).values["0"]
    for bits, rise in measured.items():
        e, dx = evidence.layerwise.weight_error("0", bits), evidence.layerwise.input_error("0", bits, x).detach()
        change = (x + dx) @ (linear.weight.detach() + e).T - x @ linear.weight.detach().T
        assert rise == pytest.approx(0.5 * float(change.square().sum(1).mean()), rel=1e-4)


def test_a_negative_trace_counts_as_its_standard_error() -> None:
    evidence, _ = linear_evidence()
    turned = Evidence(evidence.models, evidence.batches, lambda output, y: -evidence.loss_fn(output, y))
    traces = baqe.hessian_trace(turned.layerwise.network, turned.loss_fn, turned.batches, 50, tolerance=0.0)
    assert traces["0"] < -traces.standard_errors["0"] < 0
    with pytest.warns(UserWarning, match=r"traces of weights below their standard errors count as these: 0 \(-"):
        found = HessianTrace(samples=50, tolerance=0.0, inputs=False).measure(turned).values["0"]
    for bits, value in found.items():
        error = float(turned.layerwise.weight_error("0", bits).square().sum())
        assert value == pytest.approx(0.5 * traces.standard_errors["0"] * error)


def test_evidence_that_cannot_be_right() -> None:
    evidence = made()
    with pytest.raises(ConfigError, match="at least one batch"):
        Evidence(evidence.models, [], evidence.loss_fn)
    with pytest.raises(ConfigError, match="at least one quantized model"):
        Evidence({FLOAT_BITS: None}, evidence.batches, evidence.loss_fn)
    other, _ = linear_evidence()
    with pytest.raises(ConfigError, match="have different layers: quantize one network"):
        Evidence({2: evidence.models[2], 4: other.models[4]}, evidence.batches, evidence.loss_fn)


def test_learned_scales_without_training() -> None:
    evidence = made()
    found = LearnedScales(steps=0).measure(evidence).values
    model = copy.deepcopy(evidence.models[4])
    assert model is not None
    layer = model.get_submodule("depthwise")
    quantizer = next(q for name, q in model.quantizers().items() if q.bits == 4)
    wanted = float(layer.weight_quantizer.scale.detach().mean()) + quantizer.step()
    assert found["depthwise"][4] == pytest.approx(wanted, rel=1e-5)


class Twice(nn.Module):
    """Calls one layer two times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.both, self.classifier = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.both(torch.relu(self.both(self.stem(x)))))
        return self.classifier(x.mean((2, 3)))


def test_a_layer_that_is_called_twice_counts_twice() -> None:
    torch.manual_seed(0)
    net, x, y = Twice().eval(), torch.randn(8, 3, 6, 6), torch.randint(0, 3, (8,))
    model = calibrated(net, baqe.BitConfig.uniform(net, 4, 4), x)
    evidence = Evidence({4: model}, [(x, y)], functional.cross_entropy)
    with evidence.layerwise.at({"stem": 8, "both": 4, "classifier": 8}) as network, torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(network(x), model(x))
    assert LossChange().measure(evidence).values["both"][4] != 0
    inputs = layer_inputs(evidence, x)
    assert [len(calls) for calls in inputs.values()] == [1, 2, 1]
    gradients = layer_gradients(evidence, x, y)
    wanted = 0.0
    for call, (values, gradient) in enumerate(zip(inputs["both"], gradients.at_output["both"], strict=True)):
        with torch.no_grad():
            error = evidence.layerwise.output("both", 4, values, call) - net.both(values)
        wanted += 0.5 * 8 * float((gradient * error).square().sum())
    assert OutputFisher().measure(evidence).values["both"][4] == pytest.approx(wanted, rel=1e-4)
    traces = baqe.hessian_trace(net, functional.cross_entropy, [(x, y)], 4, of="inputs")
    assert traces.counts == {"stem": 108, "both": 128, "classifier": 4}
    for method in (Fisher(), HessianTrace(samples=4), Divergence(), LearnedScales(steps=1)):
        assert math.isfinite(method.measure(evidence).values["both"][4])


def test_frozen_layers_and_keyword_calls() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.relu(self.conv(input=x)).mean((2, 3)))

    torch.manual_seed(0)
    net, x, y = Named().eval(), torch.randn(4, 3, 6, 6), torch.randint(0, 3, (4,))
    net.conv.weight.requires_grad_(False)
    traces = baqe.hessian_trace(net, functional.cross_entropy, [(x, y)], 4, of="inputs")
    assert traces.counts == {"conv": 108, "fc": 4}
    evidence = Evidence({4: calibrated(net, baqe.BitConfig.uniform(net, 4, 4), x)}, [(x, y)], functional.cross_entropy)
    for method in (Fisher(), OutputFisher()):
        assert all(math.isfinite(v) for of in method.measure(evidence).values.values() for v in of.values())
    assert not evidence.layerwise.network.get_submodule("conv").weight.requires_grad
