"""Convolution and linear layers that quantize their weights; their inputs are quantized at the graph's edges."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from lightning_baqe.quantization.weight import WeightQuantizer


class QuantConv2d(nn.Conv2d):
    """A convolution with fake-quantized weights. Takes over the parameters of ``conv``, no copies.

    Args:
        conv: the float layer.
        quantizer: of its weights.
    """

    def __init__(self, conv: nn.Conv2d, quantizer: WeightQuantizer) -> None:
        # On the meta device nothing is allocated and no random number drawn.
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            device="meta",
        )
        self.weight, self.bias = conv.weight, conv.bias
        self.weight_quantizer = quantizer
        self.register_module("bias_quantizer", None)
        self.train(conv.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(input, self.weight_quantizer(self.weight), _bias_of(self))


class QuantConv1d(nn.Conv1d):
    """A 1-d convolution with fake-quantized weights. Takes over the parameters of ``conv``, no copies."""

    def __init__(self, conv: nn.Conv1d, quantizer: WeightQuantizer) -> None:
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.groups,
            conv.bias is not None,
            device="meta",
        )
        self.weight, self.bias = conv.weight, conv.bias
        self.weight_quantizer = quantizer
        self.register_module("bias_quantizer", None)
        self.train(conv.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(input, self.weight_quantizer(self.weight), _bias_of(self))


class QuantConvTranspose2d(nn.ConvTranspose2d):
    """A transposed convolution with fake-quantized weights, a scale for each output channel as everywhere. Takes over
    the parameters of ``conv``, no copies.
    """

    def __init__(self, conv: nn.ConvTranspose2d, quantizer: WeightQuantizer) -> None:
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.output_padding,  # type: ignore[arg-type]
            conv.groups,
            conv.bias is not None,
            conv.dilation,  # type: ignore[arg-type]
            device="meta",
        )
        self.weight, self.bias = conv.weight, conv.bias
        self.weight_quantizer = quantizer
        self.register_module("bias_quantizer", None)
        self.train(conv.training)

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        """As the base class; ``output_size`` must be the one that the network was traced with."""
        assert not isinstance(self.padding, str)
        weight = swap_channels(self.weight_quantizer(outputs_first(self)), self.groups)
        return functional.conv_transpose2d(
            input, weight, _bias_of(self), self.stride, self.padding, self.output_padding, self.groups, self.dilation
        )


class QuantLinear(nn.Linear):
    """A linear layer with fake-quantized weights. Takes over the parameters of ``linear``, no copies."""

    def __init__(self, linear: nn.Linear, quantizer: WeightQuantizer) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.weight_quantizer = quantizer
        self.register_module("bias_quantizer", None)
        self.train(linear.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.linear(input, self.weight_quantizer(self.weight), _bias_of(self))


def _bias_of(layer: nn.Module) -> torch.Tensor | None:
    """As it acts: a layer's ``bias_quantizer`` is None but where bits of biases are learned."""
    bias: torch.Tensor | None = layer.bias  # type: ignore[assignment]
    return bias if bias is None or layer.bias_quantizer is None else layer.bias_quantizer(bias)  # type: ignore[operator]


def outputs_first(layer: nn.Module) -> torch.Tensor:
    """A layer's weight, ``(outputs, inputs / groups, ...)``; a view, so that gradients reach the parameter."""
    weight: torch.Tensor = layer.weight  # type: ignore[assignment]
    return swap_channels(weight, layer.groups) if isinstance(layer, nn.ConvTranspose2d) else weight


def as_stored(layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """What :func:`outputs_first` gave, or values of its shape, as the layer's ``weight`` lies."""
    return swap_channels(weight, layer.groups) if isinstance(layer, nn.ConvTranspose2d) else weight


def swap_channels(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """``(groups * a, b, ...)`` as ``(groups * b, a, ...)``, group by group; twice is as before."""
    by_group = weight.unflatten(0, (groups, -1)).transpose(1, 2)
    return by_group.flatten(0, 1)


# The quantized kind of each layer that can have bits.
QUANT_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: QuantConv2d,
    nn.Conv1d: QuantConv1d,
    nn.ConvTranspose2d: QuantConvTranspose2d,
    nn.Linear: QuantLinear,
}
QuantLayer = QuantConv2d | QuantConv1d | QuantConvTranspose2d | QuantLinear
