"""A network whose bits are learned: made once, trained, and read off as a bit-config at the end.

Its structure is that of the deployed network whatever the bits: each layer reads its input through a quantizer of its
own kind, behind the 8-bit one of whatever else reads that tensor. Sizes are those of Schaefer et al.: of all weights,
and of all layers' inputs together, for one sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_baqe.allocation.program import allocate_bits
from lightning_baqe.calibration.calibrate import calibrate
from lightning_baqe.entrance.admission import Network, admit
from lightning_baqe.entrance.quantize import quantize
from lightning_baqe.errors import ConfigError, InfeasibleError
from lightning_baqe.learned_bits.learned_quantizers import BiasQuantizer, LearnedQuantizer, learned_weights
from lightning_baqe.quantization.activation import ActivationQuantizer
from lightning_baqe.quantization.config import MAX_BITS, MIN_BITS, BitConfig, LayerBits, layers
from lightning_baqe.quantization.convert import QuantizedModel
from lightning_baqe.quantization.gradient_scaling import GradientScaling
from lightning_baqe.quantization.layers import as_stored, outputs_first
from lightning_baqe.quantization.sensitivity import quantizers_of_layers
from lightning_baqe.quantization.train_modes import evaluating

_WIDTHS = range(MIN_BITS, MAX_BITS + 1)


@dataclass(frozen=True)
class LearnedNetwork:
    """What :func:`learn_bits` makes.

    Attributes:
        model: to be trained as any other module; it holds the quantizers.
        weights: by layer.
        activations: by the quantizer's path; several layers may read one.
        others: 8-bit ones of whatever is no layer, by path; their ranges learn, and they do not count.
        inputs: ``{layer: paths of what it reads through}``, one for each time that the network calls it.
        network: the float one that it was made of.
        by_channel: each output channel's weights learn bits of their own.
        biases: by layer, at the bits of its weights and counted with them; empty: biases are not quantized.
    """

    model: QuantizedModel
    weights: Mapping[str, LearnedQuantizer]
    activations: Mapping[str, LearnedQuantizer]
    others: Mapping[str, LearnedQuantizer]
    inputs: Mapping[str, tuple[str, ...]]
    network: Network
    by_channel: bool = False
    biases: Mapping[str, BiasQuantizer] = field(default_factory=dict)

    @property
    def quantizers(self) -> tuple[LearnedQuantizer, ...]:
        """All that have bits of their own."""
        return (*self.weights.values(), *self.activations.values(), *self.others.values())

    def parameters(self) -> list[nn.Parameter]:
        """Of all quantizers."""
        return [parameter for of in (*self.quantizers, *self.biases.values()) for parameter in of.parameters()]

    def scale_gradients(self, weights: GradientScaling, activations: GradientScaling) -> None:
        """Set how gradients pass the rounding."""
        for of in self.weights.values():
            of.gradient = weights
        for of_biases in self.biases.values():
            of_biases.gradient = weights
        for of in self.activations.values():
            of.gradient = activations

    @property
    def unquantized_bytes(self) -> int:
        """Of batch norms' gains and shifts, and of biases that are not quantized, 2 bytes each: bfloat16, as Schaefer
        et al. count them (section 4.3).
        """
        net = self.network.model
        norms = [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        biases = [net.get_submodule(name).bias for name in self.weights if name not in self.biases]
        affine = [parameter for norm in norms for parameter in norm.parameters()]
        return 2 * sum(of.numel() for of in (*affine, *biases) if isinstance(of, Tensor))

    def weight_bytes(self) -> Tensor:
        """Of all weights, ``()``; differentiable."""
        return torch.stack([of.size_bits() for of in self.weights.values()]).sum() / 8

    def activation_bytes(self) -> Tensor:
        """Of all layers' inputs, one sample, ``()``; differentiable."""
        return torch.stack([of.size_bits() for of in self.activations.values()]).sum() / 8

    def mean_bits(self) -> tuple[float, float]:
        """Of a weight, and of an activation."""
        weights, activations = self.bytes_of(1)
        return float(self.weight_bytes().detach()) / weights, float(self.activation_bytes().detach()) / activations

    def bytes_of(self, bits: float) -> tuple[float, float]:
        """Of weights and of activations where all have so many bits."""
        weights, activations = (sum(of.values for of in part.values()) for part in (self.weights, self.activations))
        return bits * weights / 8, bits * activations / 8

    def project(self) -> None:
        """Bring all bits back within 2 to 8; after each step of an optimizer."""
        for quantizer in self.quantizers:
            quantizer.project()

    def materialise(self, weight_bytes: float | None = None, activation_bytes: float | None = None) -> BitConfig:
        """Whole bits, the nearest to those that were learned: the smallest sum of squared differences, each weighted by
        how much it holds, that keeps the sizes; of channels see :func:`nearest_by_channel`.

        Args:
            weight_bytes, activation_bytes: limits; None: what was learned.

        Raises:
            InfeasibleError: a limit below the smallest network; names its size.
        """
        weights = float(self.weight_bytes().detach()) if weight_bytes is None else weight_bytes
        activations = float(self.activation_bytes().detach()) if activation_bytes is None else activation_bytes
        called_more_than_once = [paths for paths in self.inputs.values() if len(set(paths)) > 1]
        of_weights = self._bits_of_channels(weights) if self.by_channel else _nearest(self.weights, weights)
        of_tensors = _nearest(self.activations, activations, called_more_than_once)
        bits = {
            layer: LayerBits(of_weights[layer], of_tensors[paths[0]] if paths else MAX_BITS)
            for layer, paths in self.inputs.items()
        }
        return self.model.bits.replace(bits)

    def _bits_of_channels(self, limit_bytes: float) -> dict[str, tuple[int, ...]]:
        channels = {name: of.bits().detach().flatten().double().cpu().numpy() for name, of in self.weights.items()}
        counts = np.concatenate([np.full(len(bits), self.weights[name].count) for name, bits in channels.items()])
        found = nearest_by_channel(np.concatenate(list(channels.values())), counts, 8 * limit_bytes)
        parts = np.split(found, np.cumsum([len(bits) for bits in channels.values()])[:-1])
        return {name: tuple(part.tolist()) for name, part in zip(channels, parts, strict=True)}

    def fix(self, bits: BitConfig) -> None:
        """Have these bits, within the ranges that were learned, from now on; ranges learn on."""
        for layer, paths in self.inputs.items():
            self.weights[layer].fix(bits[layer].weight)
            for path in paths:
                self.activations[path].fix(bits[layer].activation)

    def release(self) -> None:
        """Learn bits, from those on that there are."""
        for quantizer in (*self.weights.values(), *self.activations.values()):
            quantizer.release()

    def deployable(self, bits: BitConfig) -> QuantizedModel:
        """The network as trained, on whole bits and within the ranges that were learned, its scales of the usual kind:
        to be tuned further, or lowered.

        It computes what this one does at these bits, but for two things: of signed inputs one lower integer more is
        left, and a layer with inputs of 8 bits shares their quantizer with whatever else reads the tensor.
        """
        model = quantize(self.network, bits, activation_quantizer="lsq")
        trained = self.model.state_dict()
        model.load_state_dict({name: trained.get(name, tensor) for name, tensor in model.state_dict().items()})
        quantizers = model.quantizers()
        for path, learned in self.others.items():
            _take(quantizers[path], learned)
        found = quantizers_of_layers(model)
        for name, of in found.items():
            if name not in self.weights:
                continue  # no module of the network's own
            top, layer = self.weights[name].top().detach(), model.get_submodule(of.path)
            of.weight.scale.data.copy_(top.flatten() / of.weight.qp)
            # Clipped for good: the usual quantizer has one lower integer more, and would take what is below the range.
            layer.get_parameter("weight").data.copy_(as_stored(layer, outputs_first(layer).detach().clamp(-top, top)))
            if name in self.biases:
                bias = layer.get_parameter("bias")
                bias.data.copy_(self.biases[name](bias).detach())
            for call, path in zip((call for call in of.calls if call), self.inputs[name], strict=True):
                _take(call[-1], self.activations[path])
        return model.train(self.model.training)


def _nearest(
    quantizers: Mapping[str, LearnedQuantizer], limit_bytes: float, tied: Iterable[Iterable[str]] = ()
) -> Mapping[str, int]:
    """Whole bits of quantizers that have one number each."""
    learned = {name: float(of.bits().detach()) for name, of in quantizers.items()}
    counts = {name: of.count for name, of in quantizers.items()}
    heaviest = max(counts.values())
    away = {n: {b: counts[n] / heaviest * (b - learned[n]) ** 2 for b in _WIDTHS} for n in learned}
    # In bits, which are whole numbers, and so exact.
    costs = {"bits": {n: {b: counts[n] * b for b in _WIDTHS} for n in learned}}
    return allocate_bits(away, costs, {"bits": 8 * limit_bytes}, tied)


def nearest_by_channel(learned: np.ndarray, counts: np.ndarray, limit_bits: float) -> np.ndarray:
    """Whole bits of each of many channels: all are lowered by the same number, and then rounded.

    The smallest number that keeps the limit is taken. That is what a price on size makes of the sum of squared
    differences, each weighted by what the channel holds; an integer program of ten thousand channels takes minutes.
    What a whole channel leaves of the limit goes back to those that were lowered last.

    Args:
        learned: ``(channels,)``, 2 to 8.
        counts: values of each.
        limit_bits: of all together.

    Raises:
        InfeasibleError: below 2 bits of all.
    """
    smallest = MIN_BITS * int(counts.sum())
    if limit_bits < smallest:
        raise InfeasibleError(
            f"weights of {limit_bits / 8:,.0f} bytes cannot be reached: the smallest network has {smallest / 8:,.0f}"
        )
    bits = np.clip(np.rint(learned), MIN_BITS, MAX_BITS).astype(np.int64)
    steps = [
        (learned[at] - (b - 0.5), at, b) for b in range(MAX_BITS, MIN_BITS, -1) for at in np.flatnonzero(bits >= b)
    ]
    left, lowered = limit_bits - int((bits * counts).sum()), []
    for _, at, b in sorted(steps):
        if left >= 0:
            break
        bits[at], left = b - 1, left + counts[at]
        lowered.append((at, b))
    for at, b in reversed(lowered):
        if bits[at] == b - 1 and counts[at] <= left:
            bits[at], left = b, left - counts[at]
    return bits


def _take(quantizer: ActivationQuantizer, learned: LearnedQuantizer) -> None:
    """Its range."""
    step = float(learned.top().detach()) / (quantizer.qmax >> learned.signed)
    low = -(quantizer.qmax // 2 + 1) * step if learned.signed else 0.0
    quantizer.set_range(low, low + quantizer.qmax * step)


def learn_bits(
    network: nn.Module | Network,
    batches: Iterable[Any],
    bits: int = 8,
    example_input: Any = None,
    by_channel: bool = False,
    weight_init: str = "mse",
    activation_range: str = "mse",
    biases: bool = False,
) -> LearnedNetwork:
    """A network whose layers all learn the bits of their weights and of their inputs, the first and the last too.

    Args:
        network: float, trained; untouched.
        batches: to calibrate on.
        bits: of all, at first; 2 to 8.
        example_input: of :func:`lightning_baqe.quantize`; needed where ``network`` is no :class:`Network`.
        by_channel: learn bits of each output channel's weights; else of each layer's.
        weight_init, activation_range: first ranges, as for :func:`lightning_baqe.quantize`; Schaefer et al. take
            ``"lsq+"`` (of a Gaussian) and ``"percentile"`` (99.99).
        biases: quantize layers' biases, too, at the bits of their weights; else they are what they are, since
            accumulators of 32 bits take them in.

    Raises:
        ConfigError: bits or a range out of range, no layers, or several that share their weights.
        UnsupportedModelError: a network that cannot be quantized.
    """
    if bits not in _WIDTHS:
        raise ConfigError(f"bits={bits!r}, wanted is a whole number of {MIN_BITS} to {MAX_BITS}")
    admitted = network if isinstance(network, Network) else admit(network, example_input)
    _refuse_shared(admitted.model)
    # Not 8, which is what everything that is no layer reads at: each layer's input must have a quantizer of its own.
    apart = min(bits, MAX_BITS - 1)
    config = BitConfig(dict.fromkeys(layers(admitted.model), LayerBits(bits, apart)))
    ranges = {"weight_init": weight_init, "activation_range": activation_range}
    model = calibrate(quantize(admitted, config, activation_quantizer="lsq", **ranges), batches)
    # Functions that are called with weights of the network's own are no layers: they have no bits, and keep 8.
    found = {name: of for name, of in quantizers_of_layers(model).items() if name in config}
    names = {id(module): name for name, module in model.named_modules()}
    inputs = {name: tuple(names[id(call[-1])] for call in of.calls if call) for name, of in found.items()}
    counts = _counts(model, admitted.inputs)
    weights: dict[str, LearnedQuantizer] = {}
    activations: dict[str, LearnedQuantizer] = {}
    others: dict[str, LearnedQuantizer] = {}
    of_biases: dict[str, BiasQuantizer] = {}
    for name, of in found.items():
        layer: Any = model.get_submodule(of.path)
        bias = layer.bias if biases else None
        weights[name] = learned_weights(outputs_first(layer), of.weight.scale, bits, by_channel, bias)
        layer.weight_quantizer = weights[name]
        if bias is not None:
            of_biases[name] = layer.bias_quantizer = BiasQuantizer(bias, weights[name])
    of_layers = {path for paths in inputs.values() for path in paths}
    for path, quantizer in model.quantizers().items():
        learns = path in of_layers
        learned = _learned(quantizer, bits if learns else MAX_BITS, counts[path])
        (activations if learns else others)[path] = learned
        parent, _, leaf = path.rpartition(".")
        model.get_submodule(parent).add_module(leaf, learned)
    for learned in others.values():
        learned.fix(MAX_BITS)
    return LearnedNetwork(model, weights, activations, others, inputs, admitted, by_channel, of_biases)


def _refuse_shared(net: nn.Module) -> None:
    """Of one tensor, each layer would learn a range and bits of its own."""
    owners: dict[int, str] = {}
    for name in layers(net):
        first = owners.setdefault(id(net.get_submodule(name).weight), name)
        if first != name:
            raise ConfigError(
                f"layers {first!r} and {name!r} share their weights, for which each would learn bits of its own: call "
                "one layer twice, or give each weights of its own"
            )


def _counts(model: QuantizedModel, inputs: tuple[Tensor, ...]) -> dict[str, int]:
    """Values of one sample that each quantizer reads, whichever axis samples are on by then."""
    samples = len(inputs[0])
    found: dict[str, int] = {}
    handles = [
        quantizer.register_forward_pre_hook(
            lambda module, values, path=path: found.update({path: values[0].numel() // samples})
        )
        for path, quantizer in model.quantizers().items()
    ]
    try:
        with evaluating(model), torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _learned(quantizer: ActivationQuantizer, bits: int, count: int) -> LearnedQuantizer:
    """Of the same range."""
    zero = quantizer.zero_point()
    signed, top = zero > 0, max(zero, quantizer.qmax - zero) * quantizer.step()
    return LearnedQuantizer(torch.tensor(top, device=quantizer.scale.device), bits, signed, count)
