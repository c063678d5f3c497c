"""How long it takes until a network is let in or refused: ``python -m lightning_baqe.benchmarks.entrance``.

ResNet-18 with what people change in it, each in three ways: by :func:`lightning_baqe.check`; in a Trainer with the
callback, from ``fit`` until the search first computes its metric, which is before anything is trained or measured;
by ``recipe=qat_search``, from the command line until the float training would begin. What is imported on the way, TVM
and torch's tracing, is shown apart and does not count.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, cast

import pytorch_lightning as pl
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import lightning_baqe as baqe
from lightning_baqe.benchmarks.setups import console_of, parser_of, table_of
from lightning_baqe.callbacks import BayesianSearch
from lightning_baqe.errors import BaqeError
from lightning_baqe.hardware.identity import device_info
from lightning_baqe.tasks.scoring import BinaryAccuracy
from lightning_baqe.train import main as train

WANTED_S = 10.0
SIDE, CLASSES = 64, 10
NAMES = ("meta", "code", "bits", "record", "graph", "quantizers")


class Accepted(Exception):
    """Raised where nothing is left to check."""


class Stop(BinaryAccuracy):
    """A search computes its metric once the network is let in, before anything else."""

    def update(self, *args: Any) -> NoReturn:
        raise Accepted


def stop(*args: Any, **options: Any) -> NoReturn:
    """In place of a recipe's float training."""
    raise Accepted


class Task(pl.LightningModule):
    """A classifier as people write it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class InDict(nn.Module):
    """Logits under a name."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = resnet18(classes)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.body(x)}


class Names(nn.Module):
    """Modules with the names of a graph's own attributes, and with words of Python."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 4, 1)
        for name in NAMES:
            self.add_module(name, nn.Conv2d(8, 8, 3, padding=1))
        self.words = nn.ModuleDict({"class": nn.Conv2d(8, 8, 3), "lambda": nn.Linear(8, classes)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for name in NAMES:
            x = torch.relu(getattr(self, name)(x))
        return self.words["lambda"](self.words["class"](x).mean((2, 3)))


def resnet18(classes: int) -> nn.Module:
    """Of random weights, without the pooling that small images do not need."""
    net = torchvision.models.resnet18(num_classes=classes)
    net.maxpool = nn.Identity()
    return net


def _with(change: Callable[[Any], object]) -> Callable[[int], nn.Module]:
    """ResNet-18, changed in place."""

    def make(classes: int) -> nn.Module:
        net = resnet18(classes)
        change(net)
        return net

    return make


def _replaced(kind: type[nn.Module], new: Callable[[Any], nn.Module]) -> Callable[[int], nn.Module]:
    """ResNet-18 with all modules of a kind replaced."""

    def change(net: nn.Module) -> None:
        for parent in list(net.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, kind):
                    setattr(parent, name, new(child))

    return _with(change)


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "as it is": resnet18,
    "PReLU": _replaced(nn.ReLU, lambda relu: nn.PReLU()),
    "InstanceNorm2d": _replaced(nn.BatchNorm2d, lambda norm: nn.InstanceNorm2d(norm.num_features)),
    "ConvTranspose2d": _with(lambda net: setattr(net, "layer4", nn.ConvTranspose2d(256, 512, 2, 2))),
    "dict output": InDict,
    "pruning": _with(lambda net: prune.l1_unstructured(net.conv1, "weight", 0.3)),
    "old weight norm": _with(lambda net: weight_norm(net.conv1)),
    "old spectral norm": _with(lambda net: spectral_norm(net.conv1)),
    "new weight norm": _with(lambda net: parametrizations.weight_norm(net.conv1)),
    "lazy": _with(lambda net: setattr(net, "fc", nn.LazyLinear(CLASSES))),
    "DataParallel": lambda classes: nn.DataParallel(resnet18(classes)),
    "compiled": lambda classes: cast(nn.Module, torch.compile(resnet18(classes))),
    "float64": lambda classes: resnet18(classes).double(),
    "float16": lambda classes: resnet18(classes).half(),
    "bfloat16": lambda classes: resnet18(classes).bfloat16(),
    "names": Names,
}


def network(name: str, num_classes: int, **_: Any) -> nn.Module:
    """One of :data:`NETWORKS`; what the recipe calls."""
    return NETWORKS[name](num_classes)


def by_check(name: str, folder: Path) -> str:
    """See the module's docstring; an empty text where the network is accepted, else why not. So do the others."""
    x = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    report = baqe.check(network(name, CLASSES).eval(), x)
    return "" if report.ok else str(report)


def by_callback(name: str, folder: Path) -> str:
    """In a Trainer."""
    x = torch.randn(64, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    data = torch.utils.data.TensorDataset(x, torch.arange(64) % CLASSES)
    loader: Any = torch.utils.data.DataLoader(data, 32)
    search = BayesianSearch(run_dir=folder, network="net", metric=Stop())
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options: dict[str, Any] = {"callbacks": [search], "num_sanity_val_steps": 0, **dict.fromkeys(quiet, False)}
    trainer = pl.Trainer(max_epochs=-1, accelerator="cpu", **options)
    try:
        trainer.fit(Task(network(name, CLASSES)), loader, loader)
    except Accepted:
        return ""
    except BaqeError as error:
        return str(error)
    raise AssertionError(f"the search of {name!r} never asked its device")


def by_recipe(name: str, folder: Path) -> str:
    """As ``train.py`` runs it."""
    here, said = __name__, io.StringIO()
    targets = [f"model._target_={here}.network", f"model.name='{name}'", f"pretrain._target_={here}.stop"]
    try:
        with contextlib.redirect_stderr(said):
            status = train(["recipe=qat_search", "data=digits", *targets, f"run_dir={folder}"])
    except Accepted:
        return ""
    if status == 0:
        raise AssertionError(f"the recipe of {name!r} never trained")
    return said.getvalue()


WAYS = {"check": by_check, "callback": by_callback, "recipe": by_recipe}


def timed(name: str, way: str) -> tuple[float, str]:
    """Seconds, and what :data:`WAYS` gave."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = time.perf_counter()
        said = WAYS[way](name, Path(folder) / "run")
        return time.perf_counter() - start, " ".join(said.split())


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status: 1 if anything took too long."""
    parser = parser_of(__doc__)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    options = parser.parse_args(arguments)
    console = console_of(160)
    console.print(device_info()["cpu"])
    cells, slowest = [], 0.0
    for way in options.ways:
        first, _ = timed("InstanceNorm2d", way)
        console.print(f"{way}, InstanceNorm2d, the first time: {first:.1f} s")
        for name in options.networks:
            seconds, said = timed(name, way)
            slowest = max(slowest, seconds)
            console.print(f"{way}, {name}: {seconds:.1f} s")
            cells.append([name, way, f"{seconds:.1f}", said and "refused", said[:120]])
    console.print(
        table_of(
            "until let in or refused", ("ResNet-18", "way", "s", "", "why"), ("ResNet-18", "way", "", "why"), cells
        )
    )
    console.print(f"slowest: {slowest:.1f} s (wanted {WANTED_S:.0f} s)")
    return 0 if slowest <= WANTED_S else 1


if __name__ == "__main__":
    sys.exit(import_module("lightning_baqe.benchmarks.entrance").main())  # recipes name what is in this module
