"""Random networks as people write them: subclasses, hooks, views, constants, defaults, wrappers, odd spellings."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

SIZE = 8


class ReluFirst(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(F.relu(x))


class ScaledAfter(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).mul_(0.5)


class Reflecting(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.pad(x, (1, 1, 1, 1), mode="reflect")
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class PaddedAtCall(nn.Conv2d):
    def __init__(self, inside: int, outside: int, kernel: int) -> None:
        super().__init__(inside, outside, kernel)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.kernel_size[0] // 2, self.dilation, self.groups)


class Gained(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias * 0.1
        return self._conv_forward(x, self.weight * 1.7, bias)


class Standardised(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


class NormSlope(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.leaky_relu(super().forward(x), 0.2)


class StochasticDepth(nn.Module):
    """Of the user's own: it holds the branch that it drops."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and torch.rand(()) < 0.5:
            return x
        return x + self.branch(x)


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


class Residual(nn.Module):
    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.branch(x)
        y += x
        return y


class Gate(nn.Module):
    """Squeeze-and-excite, with expand_as or broadcasting."""

    def __init__(self, channels: int, spelled: bool) -> None:
        super().__init__()
        self.fc, self.spelled = nn.Linear(channels, channels), spelled

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = torch.sigmoid(self.fc(x.mean(3).mean(2))).view(x.size(0), x.size(1), 1, 1)
        return x * (gate.expand_as(x) if self.spelled else gate)


class Spatial(nn.Module):
    """CBAM's spatial gate."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.cat((torch.max(x, 1)[0].unsqueeze(1), torch.mean(x, 1).unsqueeze(1)), dim=1)
        return x * torch.sigmoid(self.conv(y))


class Position(nn.Module):
    """Constant channels, added and concatenated."""

    def __init__(self, channels: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.register_buffer("grid", torch.randn(1, 2, *size))
        self.scale = nn.Parameter(torch.rand(channels, 1, 1) + 0.5)
        self.conv = nn.Conv2d(channels + 2, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(torch.cat([x * self.scale, self.grid.expand(x.shape[0], -1, -1, -1)], dim=-3))


class Embedded(nn.Module):
    """A learned number for each place."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(1, *shape) * 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.embedding


class Pixels(nn.Module):
    """A perceptron over the channels, last in memory, as ConvNeXt has it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(F.gelu(self.first(x.permute(0, 2, 3, 1))))
        return x + y.permute(0, 3, 1, 2)


class Rows(nn.Module):
    """Convolutions over the pixels in a row."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(channels, channels, 3, padding=1), nn.BatchNorm1d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.conv(x.flatten(2)))).view_as(x)


class Chunks(nn.Module):
    """The features of all stages, as YOLO's C2f has them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.blocks = nn.ModuleList(nn.Conv2d(half, half, 3, padding=1) for _ in range(2))
        self.join = nn.Conv2d(4 * half, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = list(x.chunk(2, 1))
        parts.extend(block(parts[-1]) for block in self.blocks)
        return self.join(torch.cat(parts, 1))


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> Any:
        return checkpoint(self.inner, x, use_reentrant=False)


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return grad * (s + x * s * (1 - s))


class Counting(nn.Module):
    """Python state that changes from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * self.calls


class Buffered(nn.Module):
    """A buffer that changes from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x + self.calls


def _view_written(rng: random.Random) -> Callable[[torch.Tensor], torch.Tensor]:
    first, number, how = rng.randint(0, 2), rng.choice([2.0, -0.5]), rng.choice(["mul_", "add_", "clamp_min_"])

    def function(x: torch.Tensor) -> torch.Tensor:
        x = x + 0.1
        getattr(x[:, first : first + 2], how)(number)
        return x

    return function


def _loop(x: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(x[:, :1])
    for channel in x.unbind(1):
        out = out + channel.unsqueeze(1)
    return x - out / x.shape[1]


def _by_value(x: torch.Tensor) -> torch.Tensor:
    return x if x.mean() > 0 else -x


def _attention(x: torch.Tensor) -> torch.Tensor:
    y = x.flatten(2)
    return (torch.softmax(y @ y.transpose(1, 2), -1) @ y).view_as(x)


FUNCTIONS: list[Callable[..., Any]] = [
    F.relu, F.silu, F.hardswish, F.selu, F.softsign, F.mish, F.logsigmoid, torch.tanh, torch.sin, torch.erf,
    lambda x: x * torch.sigmoid(1.7 * x), lambda x: F.relu(x) ** 2, lambda x: torch.where(x > 0, x, 0.1 * x),
    lambda x: torch.maximum(x, 0.2 * x), lambda x: torch.log1p(F.relu(x)), lambda x: x * F.relu6(x + 3) / 6,
    lambda x: x / (1 + x.abs()), lambda x: 1.5 - x, lambda x: x.clamp(-1, 1).square(), Swish.apply,
    lambda x: F.dropout(x, 0.3, False), lambda x: F.celu(x, 0.5).add_(0.1), lambda x: F.relu(x, inplace=True).mul(2),
    lambda x: F.glu(torch.cat([x, x.flip(1)], 1), 1),
]  # fmt: skip
MOVES: list[Callable[..., Any]] = [
    lambda x: x.flip(1), lambda x: x.flip(3), lambda x: x[:, torch.tensor([1, 0, 3, 2, 7, 6, 5, 4])],
    lambda x: x.transpose(2, 3),
    lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), lambda x: F.channel_shuffle(x, 2), lambda x: x.roll(1, 2),
    lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2),
    lambda x: x.view(x.size(0), 2, -1, *x.shape[2:]).flatten(1, 2),
    lambda x: F.interpolate(x, scale_factor=2)[:, :, ::2, 1::2], lambda x: F.pad(x, (1, 1, 0, 0))[..., 1:-1],
    lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate")[:, :, 1:-1, :-2],
    lambda x: F.pad(x, (2, 0, 0, 0), "circular")[..., 2:],
    lambda x: torch.stack([x, x], 1).sum(1), lambda x: x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2),
]  # fmt: skip
POOLS: list[Callable[..., Any]] = [
    lambda x: F.max_pool2d(x, 3, 1, 1), lambda x: F.avg_pool2d(x, 3, 1, 1), lambda x: F.adaptive_avg_pool2d(x, 5),
    lambda x: F.adaptive_max_pool2d(x, 3), lambda x: F.lp_pool2d(F.relu(x), 2, 2),
    lambda x: F.max_pool2d(x, 2, ceil_mode=True),
    lambda x: F.avg_pool2d(x, 2, 2, 1, True, False), lambda x: F.adaptive_max_pool2d(x, (4, None)),
]  # fmt: skip
UNFIT: list[Callable[..., Any]] = [
    lambda x: x * torch.rand(1), _by_value, _attention, lambda x: torch.softmax(x, 1),
    lambda x: F.layer_norm(x, x.shape[1:]),
    lambda x: x * float(x.abs().max()), lambda x: x.sort(1)[0], lambda x: torch.from_numpy(x.detach().numpy()) + x,
    lambda x: x + x.argmax(1, keepdim=True), F.instance_norm,
    lambda x: x @ x.transpose(2, 3), lambda x: x - x.mean(0),
    lambda x: torch.fft.fft2(x).real, lambda x: F.normalize(x, dim=1),
]  # fmt: skip


def _hooked(layer: nn.Module, rng: random.Random) -> nn.Module:
    kind = rng.randrange(4)
    if kind == 0:
        layer.register_forward_hook(lambda module, args, out: out.clamp(max=0.4) * 1.5)
    elif kind == 1:
        layer.register_forward_pre_hook(lambda module, args: (args[0] + 0.2,))
    elif kind == 2:
        layer.register_forward_hook(lambda module, args, out: None)
    else:
        before = layer.forward
        layer.forward = lambda x: torch.tanh(before(x))  # type: ignore[method-assign]
    return layer


def _convolution(channels: int, rng: random.Random) -> nn.Module:
    kinds: list[Callable[[], nn.Module]] = [
        lambda: nn.Conv2d(channels, channels, 3, padding=1, bias=rng.random() < 0.5),
        lambda: nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
        lambda: nn.Conv2d(channels, channels, 4, padding="same"),
        lambda: nn.Conv2d(channels, channels, 3, padding=1, padding_mode=rng.choice(["reflect", "circular"])),
        lambda: nn.ConvTranspose2d(channels, channels, 3, 1, 1, groups=rng.choice([1, 2])),
        lambda: rng.choice([ReluFirst, ScaledAfter, Gained, Standardised])(channels, channels, 3, padding=1),
        lambda: rng.choice([Reflecting, PaddedAtCall])(channels, channels, 3),
    ]  # fmt: skip
    return rng.choice(kinds)()


def _norm(channels: int, rng: random.Random) -> nn.Module:
    kinds = (nn.BatchNorm2d, NormSlope, torchvision.ops.FrozenBatchNorm2d, nn.SyncBatchNorm, nn.Identity)
    return rng.choice(kinds)(channels)


def _piece(channels: int, size: tuple[int, int], rng: random.Random, depth: int) -> nn.Module:
    def block() -> nn.Module:
        return nn.Sequential(_convolution(channels, rng), _norm(channels, rng))

    kinds: list[Callable[[], nn.Module]] = [
        block,
        lambda: nn.Sequential(block(), Function(rng.choice(FUNCTIONS))),
        lambda: Function(rng.choice(FUNCTIONS)),
        lambda: Function(rng.choice(MOVES)),
        lambda: Function(_view_written(rng)),
        lambda: Function(_loop),
        lambda: _hooked(block() if rng.random() < 0.5 else _convolution(channels, rng), rng),
        lambda: rng.choice([Residual, StochasticDepth, Checkpointed])(block()),
        lambda: Residual(nn.Sequential(block(), torchvision.ops.StochasticDepth(0.2, "row"))),
        lambda: Gate(channels, rng.random() < 0.5),
        lambda: rng.choice([Spatial, lambda: nn.PReLU(channels), nn.PReLU, nn.RReLU])(),
        lambda: Position(channels, size),
        lambda: Embedded((channels, *size) if rng.random() < 0.5 else (channels, 1, size[1])),
        lambda: rng.choice([Pixels, Rows, Chunks])(channels),
        lambda: nn.Upsample(scale_factor=2, mode=rng.choice(["nearest", "bilinear"])),
    ]  # fmt: skip
    if depth and rng.random() < 0.15:
        return nn.Sequential(*_pieces(2, torch.zeros(2, channels, *size), rng, depth - 1)[0])
    if rng.random() < 0.06:
        return rng.choice([Counting, Buffered, lambda: Function(rng.choice(UNFIT))])()
    return rng.choice(kinds)()


def _pieces(count: int, x: torch.Tensor, rng: random.Random, depth: int) -> tuple[list[nn.Module], torch.Tensor]:
    """Pieces one after the other, and what they make of ``x``."""
    pieces: list[nn.Module] = []
    for _ in range(count):
        pieces.append(_piece(x.shape[1], (x.shape[2], x.shape[3]), rng, depth).eval())
        x = pieces[-1](x)
    return pieces, x


class Network(nn.Module):
    """Random pieces, then a head in one of many spellings; forward has arguments that nobody gives."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = random.Random(seed)
        self.channels = channels = 8
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        pieces, _ = _pieces(rng.randint(1, 4), torch.zeros(2, channels, SIZE, SIZE), rng, 1)
        if rng.random() < 0.5:
            pieces.append(Function(rng.choice(POOLS)))
        self.pieces = nn.ModuleList(pieces)
        self.ending = rng.randrange(6)
        self.head = nn.Linear(channels, 5)

    def forward(
        self, x: torch.Tensor, targets: torch.Tensor | None = None, features: bool = False, **unused: Any
    ) -> Any:
        x = self.stem(x)
        for piece in self.pieces:
            x = piece(x)
        if features:
            return x
        x = (
            lambda: x.mean((2, 3)),
            lambda: torch.flatten(F.adaptive_avg_pool2d(x, 1), 1),
            lambda: x.flatten(2).mean(-1),
            lambda: F.avg_pool2d(x, x.shape[2:]).view(x.size(0), -1),
            lambda: x.amax((2, 3)),
            lambda: x.sum((-1, -2)) / (x.shape[2] * x.shape[3]),
        )[self.ending]()
        logits = self.head(x)
        return logits if targets is None else (logits, F.cross_entropy(logits, targets))


def make(seed: int) -> nn.Module:
    """One network in eval mode, its batch norms having random statistics; perhaps wrapped."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network: nn.Module = Network(seed)
        for module in network.modules():
            if hasattr(module, "running_mean") and module.running_mean is not None:
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
    wrapper = random.Random(-seed).random()
    if wrapper < 0.05:
        return torch.compile(network.eval(), backend="eager")  # type: ignore[return-value]
    return nn.DataParallel(network).eval() if wrapper < 0.1 else network.eval()


def images(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
