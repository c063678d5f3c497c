"""Networks by name, from torchvision or timm or small ones of our own, with random weights or those of a file."""

from __future__ import annotations

import difflib
import inspect
from pathlib import Path

import torch
import torchvision
from rich.console import Console
from torch import nn

from lightning_baqe.errors import ConfigError, check_at_least
from lightning_baqe.tasks import small_resnet, squeezenext
from lightning_baqe.tasks.small_resnet import SmallResNet
from lightning_baqe.tasks.squeezenext import SqueezeNext
from lightning_baqe.tasks.weights import IMAGENET, in_order, load_weights, pretrained, read_weights

LIBRARIES = ("torchvision", "timm", "small")


def network(
    name: str,
    num_classes: int,
    library: str = "torchvision",
    zero_init_residual: bool = False,
    weights: str | Path | None = None,
    in_channels: int = 3,
    stem_stride: int | None = None,
) -> nn.Module:
    """A classifier without auxiliary ones.

    Args:
        name: as the library knows it, ``"resnet18"``.
        num_classes: outputs.
        library: ``"torchvision"``, ``"timm"``, or ``"small"``: ResNets for images of 32 pixels and SqueezeNext, see
            :mod:`lightning_baqe.tasks.small_resnet` and :mod:`lightning_baqe.tasks.squeezenext`.
        zero_init_residual: start the last batch norm of each residual block at gain 0, so that the blocks start as
            identities (not timm's, which have their own default).
        weights: None: random ones, from torch's global generator; a file, see :mod:`lightning_baqe.tasks.weights`;
            ``"imagenet"``: trained on ImageNet, from a package. What was not simply loaded is told on stderr.
        in_channels: of the images.
        stem_stride: None: the stem that the library has, for images of some hundred pixels; 1 or 2 (torchvision's
            ResNets alone): a 3x3 convolution of this stride and no pooling, for images of 28 to 64 pixels.

    Returns:
        a module of ``(n, in_channels, h, w)`` float32 to logits ``(n, num_classes)``. With ``"imagenet"`` its
        attribute ``pretrained_cfg`` (timm's) says under ``mean`` and ``std`` what images it wants.

    Raises:
        ConfigError: an unknown library or name, an option that this network has not, or weights that are not
            installed.
        DataError: the file cannot be read, or is another network's.
    """
    check_at_least("num_classes", num_classes, 1)
    check_at_least("in_channels", in_channels, 1)
    net = _random(name, num_classes, library, zero_init_residual, in_channels)
    if stem_stride is not None:
        _replace_stem(net, name, stem_stride)
    if weights is None:
        return net
    if weights == IMAGENET:
        found = pretrained(name, library)
        source, path = f"ImageNet's {name}", found.path()
        # As many classes and channels as the file has, to find its tensors by their order.
        with torch.random.fork_rng(devices=[]):
            state = in_order(_random(name, 1000, library, False, 3), read_weights(path), source)
        net.pretrained_cfg = {**net.pretrained_cfg, "mean": found.mean, "std": found.std}  # type: ignore[dict-item,assignment]
    else:
        path = Path(weights).expanduser()
        source, state = str(path), read_weights(path)
    for line in load_weights(net, state, source):
        Console(stderr=True, highlight=False).print(line, markup=False, soft_wrap=True)
    return net


def _random(name: str, num_classes: int, library: str, zero_init_residual: bool, in_channels: int) -> nn.Module:
    """The network with random weights."""
    if library not in LIBRARIES:
        raise ConfigError(f"library={library!r}, but one of {', '.join(LIBRARIES)} is wanted: change library.")
    if library == "timm":
        import timm  # slow to load, and few need it

        _check_name(name, library, timm.list_models())
        if zero_init_residual:
            raise ConfigError("zero_init_residual is torchvision's; timm's networks have a default: leave it out.")
        return timm.create_model(name, pretrained=False, num_classes=num_classes, in_chans=in_channels)
    if library == "small":
        _check_name(name, library, [*small_resnet.NAMES, *squeezenext.NAMES])
        if name in squeezenext.NAMES:
            if zero_init_residual:
                raise ConfigError(f"{name} adds its shortcuts before a ReLU: leave zero_init_residual out.")
            return SqueezeNext(name, num_classes, in_channels)
        return SmallResNet(name, num_classes, in_channels, zero_init_residual)
    _check_name(name, library, torchvision.models.list_models(module=torchvision.models))
    options = {"zero_init_residual": True} if zero_init_residual else {}
    builder = torchvision.models.get_model_builder(name)
    if options and "resnet" not in builder.__name__ and "resnext" not in builder.__name__:
        raise ConfigError(f"{name} has no residual blocks with zero_init_residual: leave zero_init_residual out.")
    parameters = inspect.signature(inspect.signature(builder).return_annotation).parameters  # of the network's class
    if "init_weights" in parameters and parameters["init_weights"].default is None:
        # Their truncated normals (GoogLeNet, InceptionV3) start with logits far apart and take minutes to draw.
        options["init_weights"] = False
    if "aux_logits" in parameters:
        options["aux_logits"] = False
    net = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)
    if in_channels != 3:
        _replace_first_convolution(net, in_channels)
    return net


def _replace_first_convolution(net: nn.Module, in_channels: int) -> None:
    """One for other images, with random weights, in place; torchvision has no option for that."""
    path, old = next((name, m) for name, m in net.named_modules() if isinstance(m, nn.Conv2d))
    new = nn.Conv2d(
        in_channels, old.out_channels, old.kernel_size, old.stride, old.padding, bias=old.bias is not None,  # type: ignore[arg-type]
    )  # fmt: skip
    parent, _, leaf = path.rpartition(".")
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    setattr(net.get_submodule(parent), leaf, new)


def _replace_stem(net: nn.Module, name: str, stride: int) -> None:
    """One for small images, with random weights, in place."""
    if stride not in (1, 2):
        raise ConfigError(f"stem_stride={stride!r}, but 1 or 2 is wanted, or null for the library's own stem.")
    if not isinstance(net, torchvision.models.ResNet):
        raise ConfigError(f"stem_stride is for torchvision's ResNets, and {name} is none: leave it out.")
    old = net.conv1
    net.conv1 = nn.Conv2d(old.in_channels, old.out_channels, 3, stride, 1, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.maxpool = nn.Identity()


def settle(module: nn.Module, images: torch.Tensor) -> nn.Module:
    """Show a network with random weights some images, so that its batch norms pass on values of a usual size.

    Args:
        module: changed in place, then in eval mode.
        images: ``(n, channels, height, width)``.

    Raises:
        ConfigError: the network does not run on images of this size.
    """
    module.train()
    try:
        with torch.no_grad():
            module(images)
    except (RuntimeError, AssertionError, ValueError) as error:  # torch's and timm's complaints about sizes
        raise ConfigError(f"the network does not run on images {tuple(images.shape)}: {error}") from error
    return module.eval()


def _check_name(name: str, library: str, known: list[str]) -> None:
    if name not in known:
        close = difflib.get_close_matches(str(name), known, n=3)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"it has {len(known)} others."
        others = " and ".join(f"library={other!r}" for other in LIBRARIES if other != library)
        raise ConfigError(f"name={name!r} is no classifier of {library}; {hint} {others} have more.")
