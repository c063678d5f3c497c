"""A float network whose layers can be quantized one by one, each at the bits of one of several models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lightning_baqe.calibration.walk import float_twin
from lightning_baqe.errors import ConfigError
from lightning_baqe.quantization.config import FLOAT_BITS
from lightning_baqe.quantization.convert import QuantizedModel
from lightning_baqe.quantization.layers import outputs_first, swap_channels
from lightning_baqe.quantization.sensitivity import LayerQuantizers, quantizers_of_layers


class Layerwise:
    """Quantized layers in a float network. What several models have alike is taken from the widest.

    Attributes:
        network: float, in eval mode: the models' graph with nothing in the place of their quantizers.
        paths: ``{layer: its module in network}``, in network order.
        choices: ``{layer: the bits that it has in any of the models}``, ascending; with 32 where it was asked for.

    Args:
        models: ``{bits: a calibrated model}``, of one float network, not corrected; layers that are kept at other bits
            count with these. With key 32, whose value is not read: layers may stay float.
        kept: layers that have no choice: not even float.

    Raises:
        ConfigError: no models, or of different layers.
    """

    def __init__(self, models: Mapping[int, QuantizedModel | None], kept: Collection[str] = ()) -> None:
        quantized = {bits: model for bits, model in models.items() if bits != FLOAT_BITS and model is not None}
        if not quantized:
            raise ConfigError("sensitivities need at least one quantized model, got none")
        owners = {
            bits: {name: own for name, own in quantizers_of_layers(model).items() if name in model.bits}
            for bits, model in sorted(quantized.items(), reverse=True)
        }
        names = {tuple(of) for of in owners.values()}
        if len(names) > 1:
            raise ConfigError(f"the models at {sorted(quantized)} bits have different layers: quantize one network")
        self._layers: dict[str, dict[int, tuple[nn.Module, LayerQuantizers]]] = {name: {} for name in names.pop()}
        for bits, of in owners.items():
            for name, own in of.items():
                self._layers[name].setdefault(own.width, (quantized[bits].get_submodule(own.path), own))
        self._may_be_float = {name for name in self._layers if FLOAT_BITS in models and name not in kept}
        first = owners[min(owners)]
        self.paths = {name: own.path for name, own in first.items()}
        self.network: nn.Module = float_twin(quantized[min(owners)]).eval()

    @property
    def choices(self) -> dict[str, tuple[int, ...]]:
        return {
            name: (*sorted(of), *((FLOAT_BITS,) if name in self._may_be_float else ()))
            for name, of in self._layers.items()
        }

    def weight_error(self, layer: str, bits: int) -> torch.Tensor:
        """Quantized weights minus float ones, ``(outputs, ...)``; 0 at 32 bits."""
        module, own = self._at(layer, bits)
        weight = outputs_first(module).detach()
        return torch.zeros_like(weight) if own is None else own.weight(weight).detach() - weight

    def outputs_first(self, layer: str, weight: torch.Tensor) -> torch.Tensor:
        """A tensor of the shape of the layer's weight, as ``(outputs, ...)``."""
        module = self.network.get_submodule(self.paths[layer])
        return swap_channels(weight, module.groups) if isinstance(module, nn.ConvTranspose2d) else weight

    def input_error(self, layer: str, bits: int, x: torch.Tensor, call: int = 0) -> torch.Tensor:
        """The layer's quantized input minus the float one, when it is called for the so-manieth time; 0 at 32 bits."""
        return self._quantized_input(layer, bits, x, call) - x

    def output(self, layer: str, bits: int, x: torch.Tensor, call: int = 0) -> torch.Tensor:
        """What the quantized layer computes of a float input."""
        module, own = self._at(layer, bits)
        if own is None:
            found: torch.Tensor = self.network.get_submodule(self.paths[layer])(x)
            return found
        return module.forward(self._quantized_input(layer, bits, x, call))

    @contextmanager
    def at(self, bits: Mapping[str, int]) -> Iterator[nn.Module]:
        """The network with these layers quantized."""

        calls: Counter[str] = Counter()

        def replaced(layer: str, width: int) -> Any:
            def run(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
                calls[layer] += 1
                return self.output(layer, width, inputs[0], calls[layer] - 1)

            return run

        handles = [self.network.register_forward_pre_hook(lambda module, inputs: calls.clear())]
        handles += [
            self.network.get_submodule(self.paths[layer]).register_forward_hook(replaced(layer, width))
            for layer, width in bits.items()
            if width != FLOAT_BITS
        ]
        try:
            yield self.network
        finally:
            for handle in handles:
                handle.remove()

    def _at(self, layer: str, bits: int) -> tuple[nn.Module, LayerQuantizers | None]:
        if bits == FLOAT_BITS:
            return self.network.get_submodule(self.paths[layer]), None
        return self._layers[layer][bits]

    def _quantized_input(self, layer: str, bits: int, x: torch.Tensor, call: int) -> torch.Tensor:
        own = self._at(layer, bits)[1]
        for quantizer in () if own is None else own.calls[call]:
            x = quantizer(x)
        return x
