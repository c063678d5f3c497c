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
        self.train(conv.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(input, self.weight_quantizer(self.weight), self.bias)


class QuantLinear(nn.Linear):
    """A linear layer with fake-quantized weights. Takes over the parameters of ``linear``, no copies."""

    def __init__(self, linear: nn.Linear, quantizer: WeightQuantizer) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.weight_quantizer = quantizer
        self.train(linear.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.linear(input, self.weight_quantizer(self.weight), self.bias)
