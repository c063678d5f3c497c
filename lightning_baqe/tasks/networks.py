"""Networks by name, from torchvision or timm."""

from __future__ import annotations

import difflib
import inspect

import torch
import torchvision
from torch import nn

from lightning_baqe.errors import ConfigError, check_at_least

LIBRARIES = ("torchvision", "timm")


def network(name: str, num_classes: int, library: str = "torchvision", zero_init_residual: bool = False) -> nn.Module:
    """A classifier with random weights, from torch's global generator; without auxiliary classifiers.

    Args:
        name: as the library knows it, ``"resnet18"``.
        num_classes: outputs.
        library: ``"torchvision"`` or ``"timm"``.
        zero_init_residual: start the last batch norm of each residual block at gain 0, so that the blocks start as
            identities (torchvision's ResNets alone; timm has its own default).

    Returns:
        a module of ``(n, 3, h, w)`` float32 to logits ``(n, num_classes)``.

    Raises:
        ConfigError: an unknown library or name, or an option that this network has not.
    """
    if library not in LIBRARIES:
        raise ConfigError(f"library={library!r}, but {' or '.join(LIBRARIES)} is wanted: change library.")
    check_at_least("num_classes", num_classes, 1)
    if library == "timm":
        import timm  # slow to load, and few need it

        _check_name(name, library, timm.list_models())
        if zero_init_residual:
            raise ConfigError("zero_init_residual is torchvision's; timm's networks have a default: leave it out.")
        return timm.create_model(name, pretrained=False, num_classes=num_classes)
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
    return torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)


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
        other = "timm" if library == "torchvision" else "torchvision"
        raise ConfigError(f"name={name!r} is no classifier of {library}; {hint} library={other!r} has more.")
