"""Small networks that contain, among them, every operator that lowers, in the spellings that people use."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

SHAPE = (3, 12, 12)


def conv(inputs: int, outputs: int, kernel: int = 3, **options: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **options), nn.BatchNorm2d(outputs)
    )


class Head(nn.Module):
    """Mean over the image and a classifier."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.mean((2, 3)))


class SqueezeExcite(nn.Module):
    """Depthwise convolution, gates, hardswish and hardsigmoid, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = conv(3, 8), conv(8, 8, 5, groups=8)
        self.act = nn.Hardswish(inplace=True)
        self.reduce, self.expand = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.project, self.head = conv(8, 8, 1), Head(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.stem(x))
        y = self.act(self.depthwise(x))
        gate = functional.adaptive_avg_pool2d(y, 1)
        gate = functional.hardsigmoid(self.expand(functional.relu(self.reduce(gate), inplace=True)), inplace=True)
        y = self.project(gate * y)
        y += x
        return self.head(y)


class Functions(nn.Module):
    """Every pointwise function, one after the other, and compositions of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 6)
        self.convs = nn.ModuleList(conv(6, 6) for _ in range(10))
        self.head = Head(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        functions: list[Callable[[torch.Tensor], torch.Tensor]] = [
            functional.silu,
            nn.functional.leaky_relu,
            lambda v: functional.gelu(v, approximate="tanh"),
            torch.sigmoid,
            lambda v: v.tanh().mul(2.0),
            functional.mish,
            lambda v: functional.elu(v, 0.5),
            lambda v: functional.softplus(v, beta=2),
            lambda v: 1.5 - torch.clamp(v, -1, 2) * 0.5,
            lambda v: v * functional.relu6(v + 3) / 6,
        ]
        x = self.stem(x)
        for layer, function in zip(self.convs, functions, strict=True):
            x = layer(function(x))
        return self.head(functional.hardtanh(x, 0.0, 6.0))


class Dense(nn.Module):
    """Concatenated features that many read, batch norms after sums and concatenations, average pools of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm1, self.conv1 = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1)
        self.norm2, self.conv2 = nn.BatchNorm2d(10), nn.Conv2d(10, 5, 3, padding=1)
        self.norm3 = nn.BatchNorm2d(15)
        self.padded = nn.AvgPool2d(3, 2, 1)
        self.inside = nn.AvgPool2d(3, 2, 1, count_include_pad=False, ceil_mode=True)
        self.uneven, self.head = nn.AdaptiveAvgPool2d((4, 5)), nn.Linear(15 * 20, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = [self.stem(x)]
        features.append(self.conv1(torch.relu(self.norm1(features[0]))))
        features.append(self.conv2(torch.relu(self.norm2(torch.cat(features, 1)))))
        x = self.norm3(torch.cat(features, 1))
        x = torch.cat([self.padded(x)[:, :7], self.inside(x)[:, 7:, :6, :6]], dim=1)
        return self.head(torch.flatten(self.uneven(x), 1))


class Moves(nn.Module):
    """Chunks, shuffles, slices, padding, upsampling, sums of different spellings."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch = conv(3, 8), conv(4, 4, groups=4)
        self.strided = nn.Conv2d(8, 8, 3, stride=2)
        self.up, self.pad = nn.Upsample(scale_factor=2), nn.ZeroPad2d((0, 1, 0, 1))
        self.head = Head(8)

    def shuffle(self, x: torch.Tensor, groups: int) -> torch.Tensor:
        b, c, h, w = x.shape
        x = x.view(b, groups, c // groups, h, w)
        return torch.transpose(x, 1, 2).contiguous().view(b, -1, h, w)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.stem(x))
        first, second = x.chunk(2, dim=1)
        x = self.shuffle(torch.cat((first, self.branch(second)), dim=1), 2)
        low = functional.max_pool2d(self.strided(self.pad(x)), 2)
        high = functional.interpolate(self.up(low), size=(6, 6), mode="nearest")
        x = high - functional.pad(x[:, :, ::2, 1::2], (1, 0, 0, 0))[:, :, :, :6]
        return self.head(torch.max_pool2d(x, 2, 1))


class Constants(nn.Module):
    """Parameters that scale and shift, one number or one by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.second = conv(3, 6), conv(6, 6)
        self.gamma, self.gain = nn.Parameter(torch.rand(6) - 0.4), nn.Parameter(torch.tensor(0.7))
        self.register_buffer("shift", torch.randn(1, 6, 1, 1))
        self.head = Head(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.second(torch.relu(x * self.gamma.view(1, -1, 1, 1))).mul_(self.gain)
        return self.head((self.shift - y) / (1 + self.gamma.abs()).reshape(6, 1, 1) + x)


class SameConv(nn.Conv2d):
    """Pads as TensorFlow does, by the size of what it is given."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        pads: list[int] = []
        for size, kernel, stride in zip(input.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return functional.conv2d(functional.pad(input, pads), self.weight, self.bias, self.stride)


class StandardizedConv(nn.Conv2d):
    """Normalises its weights as it runs."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return functional.conv2d(input, weight / weight.std((1, 2, 3), keepdim=True), self.bias, 1, self.padding)


class NormAct(nn.BatchNorm2d):
    """A batch norm with an activation inside."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.SiLU()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(super().forward(input)))


class Head2(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.linear(input, self.weight, self.bias)


class Special(nn.Module):
    """Layers that extend torch's, and control flow on sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.same, self.norm = SameConv(3, 8, 3, stride=2, bias=False), NormAct(8)
        self.standard = StandardizedConv(8, 8, 3, padding=1)
        self.fc = Head2(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.same(x))
        if x.shape[-1] < 7:
            x = self.standard(x)
        assert x.ndim == 4
        x = functional.adaptive_max_pool2d(x, 1)
        return self.fc(x.view(x.size(0), -1))


WIDE = {
    "squeeze_excite": SqueezeExcite,
    "functions": Functions,
    "dense": Dense,
    "moves": Moves,
    "constants": Constants,
    "special": Special,
}


def settled_wide(name: str, seed: int = 0) -> nn.Module:
    """One of them in eval mode, its batch norms having seen data."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = WIDE[name]()
        model.train()
        for _ in range(10):
            model(torch.randn(8, *SHAPE))
    return model.eval()


def wide_images(count: int = 8, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))
