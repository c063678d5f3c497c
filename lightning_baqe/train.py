"""``python train.py recipe=<name> [group=choice ...] [key=value ...]``: composes a recipe and runs it.

A recipe is a YAML file in ``recipes/recipe``; its ``flow`` names the function here that runs it.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import itertools
import logging
import re
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from lightning_baqe.errors import BaqeError, ConfigError

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from torch import nn

    from lightning_baqe.deploy.description import DeviceDescription
    from lightning_baqe.quantization.config import BitConfig
    from lightning_baqe.quantization.convert import QuantizedModel
    from lightning_baqe.tasks import ImageClassifier

RECIPES = "lightning_baqe.recipes"
FAILED, USAGE, INTERRUPTED = 1, 2, 130
# What a run may be resumed with in another way than it was begun: none of it changes what a trial means.
MAY_CHANGE = (
    *("run_dir", "logger", "trainer", "search.trials", "search.max_failures", "candidates", "budget_s"),
    "search.limits",  # checked by the search: not once a trial is complete
)
# Of third parties, about what is meant so: images in memory need no loader processes, epochs may be short.
_KNOWN_WARNINGS = (
    ".*does not have many workers",
    "The number of training batches .* is smaller than the logging interval",
    ".*isinstance.treespec, LeafSpec.. is deprecated",
    ".*torch.jit.* is deprecated",
)


class UsageError(BaqeError):
    """A command line that cannot be right."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a recipe.

    Args:
        arguments: of the command line; None: ``sys.argv``'s.

    Returns:
        the exit status: 0, 1 after an error of the run, 2 for a wrong command line, 130 when interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    console = Console(stderr=True, highlight=False)
    run_dir: Path | None = None
    try:
        if {"-h", "--help"} & set(arguments):
            print(help_text())
            return 0
        cfg = compose(arguments)
        run_dir = open_run(cfg)
        flow: Callable[[DictConfig, Path], None] = hydra.utils.get_method(cfg.flow._target_)
        flow(cfg, run_dir)
    except UsageError as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        return USAGE
    except BaqeError as error:
        console.print(f"{type(error).__name__}: {error}", style="red", markup=False, soft_wrap=True)
        return FAILED
    except (KeyboardInterrupt, SystemExit) as error:
        # Lightning turns Ctrl-C into an exit with status 1.
        if isinstance(error, SystemExit) and not isinstance(error.__context__, KeyboardInterrupt):
            raise
        console.print("Interrupted.", style="yellow")
        if run_dir is not None:
            console.print(f"To go on: {resume_command(arguments, run_dir)}", markup=False, soft_wrap=True)
        return INTERRUPTED
    return 0


@functools.cache
def recipe_groups() -> dict[str, dict[str, str]]:
    """``{group: {choice: what it is, the first comment of its file}}``, ``recipe`` first."""
    groups: dict[str, dict[str, str]] = {}
    for folder in resources.files(RECIPES).iterdir():
        if folder.is_dir():
            files = sorted(
                (file for file in folder.iterdir() if file.name.endswith(".yaml")), key=lambda file: file.name
            )
            if files:
                texts = {file.name.removesuffix(".yaml"): file.read_text(encoding="utf-8") for file in files}
                groups[folder.name] = {choice: _first_comment(text) for choice, text in texts.items()}
    groups.pop("sweeps", None)  # read by W&B, not by Hydra
    return dict(sorted(groups.items(), key=lambda item: (item[0] != "recipe", item[0])))


def _first_comment(text: str) -> str:
    comments = (line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))
    return next((comment for comment in comments if not comment.startswith("@package")), "")


def help_text() -> str:
    """What ``--help`` prints."""
    program = _program()
    lines = [f"usage: {program} recipe=<name> [group=choice ...] [key=value ...] [run_dir=folder]", ""]
    for group, choices in recipe_groups().items():
        width = max(len(choice) for choice in choices)
        lines += [f"{group}:", *(f"  {choice:<{width}}  {what}" for choice, what in choices.items()), ""]
    lines += [
        "A key is any value of the composed configuration, such as pretrain.epochs=4.",
        "The same command with run_dir=<folder of an earlier run> goes on with that run.",
        f"example: {program} recipe=qat_search search.trials=20",
    ]
    return "\n".join(lines)


def _program() -> str:
    name = Path(sys.argv[0]).name
    return f"python {name}" if name.endswith(".py") else "lightning-baqe"


def resume_command(arguments: Sequence[str], run_dir: Path) -> str:
    """The command that goes on with a run."""
    path = str(run_dir)
    if re.search(r"[^\w./-]", path):
        path = "'" + path.replace("\\", "\\\\").replace("'", "\\'") + "'"
    kept = [argument for argument in arguments if not argument.startswith("run_dir=")]
    return f"{_program()} {shlex.join([*kept, f'run_dir={path}'])}"


def compose(arguments: Sequence[str]) -> DictConfig:
    """The configuration of ``key=value`` arguments in Hydra's grammar.

    Raises:
        UsageError: no recipe, or a recipe, choice or key that there is not; names the near ones.
    """
    try:
        overrides = OverridesParser.create().parse_overrides(list(arguments))
    except HydraException as error:
        raise UsageError(f"{error}\nArguments are key=value; --help lists what there is.") from error
    groups = recipe_groups()
    for override in overrides:
        _check_choice(override, groups)
    if not any(override.key_or_group == "recipe" for override in overrides):
        raise UsageError(f"No recipe was given: add recipe=<name>, one of {', '.join(groups['recipe'])}.")
    is_group = [override.key_or_group in groups for override in overrides]
    base = _compose([text for text, group in zip(arguments, is_group, strict=True) if group])
    known = list(_paths(base))
    for override, group in zip(overrides, is_group, strict=True):
        key = override.key_or_group
        if not group and not override.is_add() and key not in known:
            raise UsageError(f"There is no key {key!r}{_near(key, known)}. --help lists what there is.")
    return _compose(arguments)


def _compose(arguments: Sequence[str]) -> DictConfig:
    try:
        with hydra.initialize_config_module(RECIPES, version_base="1.3"):
            return hydra.compose("config", overrides=list(arguments))
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(f"{error}\n--help lists what there is.") from error


def _check_choice(override: Override, groups: dict[str, dict[str, str]]) -> None:
    key, text = override.key_or_group, override.input_line
    if override.is_sweep_override():
        raise UsageError(f"{text!r} names several values, but a run has one: start one run for each.")
    if key not in groups or override.is_delete():
        return
    value = override.value()
    if value not in groups[key]:
        raise UsageError(
            f"There is no {key} {str(value)!r}{_near(str(value), list(groups[key]))}. "
            f"Wanted is {key}=<one of {', '.join(groups[key])}>."
        )


def _near(name: str, names: Sequence[str]) -> str:
    close = [known for known in names if known.rpartition(".")[2] == name.rpartition(".")[2]]
    close += [known for known in difflib.get_close_matches(name, names, n=3) if known not in close]
    return f"; did you mean {' or '.join(map(repr, close[:3]))}?" if close else ""


def _paths(node: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in map(str, node):
        path = f"{prefix}{key}"
        yield path
        child = None if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key) else node[key]
        if isinstance(child, DictConfig):
            yield from _paths(child, f"{path}.")


def open_run(cfg: DictConfig) -> Path:
    """Make the run folder, or open an earlier run's, and write ``config.yaml``; sets ``cfg.run_dir``.

    Raises:
        ConfigError: the folder holds a run of another configuration.
    """
    from lightning_baqe.deploy.front import replace_file

    recipe = recipe_name(cfg)
    if cfg.run_dir is None:
        run_dir = _new_folder(Path("outputs", recipe, datetime.now().strftime("%Y-%m-%d_%H-%M-%S")).absolute())
    else:
        run_dir = Path(str(cfg.run_dir)).expanduser().absolute()
    cfg.run_dir = str(run_dir)
    path = run_dir / "config.yaml"
    if path.exists():
        _check_same(OmegaConf.load(path), cfg, path)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        replace_file(path, OmegaConf.to_yaml(cfg).encode())
    except OSError as error:
        raise ConfigError(f"run_dir={run_dir} cannot be written ({error}): give another run_dir.") from error
    return run_dir


def _new_folder(path: Path) -> Path:
    """Make a folder of this name, or with a number behind it: agents of a sweep may begin in the same second.

    Raises:
        ConfigError: it cannot be made.
    """
    for number in itertools.count(1):
        folder = path if number == 1 else path.with_name(f"{path.name}_{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(f"run_dir={folder} cannot be made ({error}): give another run_dir.") from error
        return folder
    raise AssertionError("unreachable")


def recipe_name(cfg: DictConfig) -> str:
    """The name of the recipe, that of its flow."""
    return str(cfg.flow._target_).rpartition(".")[2]


def _check_same(old: Any, new: DictConfig, path: Path) -> None:
    if not isinstance(old, DictConfig):
        raise ConfigError(f"{path} is no configuration of a run: remove it, or give another run_dir.")
    before, after = dict(_leaves(old)), dict(_leaves(new))
    changes = [
        f"{key}: {_shown(before, key)} there, {_shown(after, key)} here"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not any(key == may or key.startswith(f"{may}.") for may in MAY_CHANGE)
    ]
    if changes:
        raise ConfigError(
            f"{path.parent} holds a run of another configuration:\n  "
            + "\n  ".join(changes)
            + "\nGive the arguments that it was begun with, or another run_dir."
        )


def _leaves(cfg: DictConfig) -> Iterator[tuple[str, Any]]:
    for path in _paths(cfg):
        value = OmegaConf.select(cfg, path, throw_on_missing=False)
        if not isinstance(value, DictConfig):
            yield path, OmegaConf.to_object(value) if OmegaConf.is_config(value) else value


def _shown(leaves: dict[str, Any], key: str) -> str:
    return repr(leaves[key]) if key in leaves else "nothing"


def make(node: DictConfig, **more: Any) -> Any:
    """Call a node's ``_target_`` with its arguments and ``more``; with ``_partial_``, return what calls it.

    Raises:
        BaqeError: what the target raised.
        ConfigError: it lacks an optional dependency, or got an argument that it does not know.
    """
    target = str(node._target_)
    try:
        # Hydra would copy what is in ``more``; a partial takes it as it is.
        call: partial[Any] = partial(hydra.utils.instantiate(node, _partial_=True, _convert_="all"), **more)
        inspect.signature(call)
    except (InstantiationException, ValueError) as error:
        reason = error.__cause__ or error
        raise ConfigError(f"{target} cannot be called as the configuration says: {reason}") from error
    try:
        return call if node.get("_partial_") else call()
    except ModuleNotFoundError as error:
        name = "'lightning-baqe[tensorboard]'" if target.endswith("TensorBoardLogger") else str(error.name)
        raise ConfigError(f"{target} needs a package that is not installed ({error}): pip install {name}") from error


def _ignore_known_warnings() -> None:
    for message in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def _prepare(
    cfg: DictConfig, run_dir: Path, check: Callable[[nn.Module], None]
) -> tuple[Any, ImageClassifier, Callable[..., pl.Trainer]]:
    """The data module, the task over a trained float network, and what makes Trainers; first the network is checked."""
    import pytorch_lightning as pl

    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # hardware and tips, anew for each Trainer
    _ignore_known_warnings()
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    datamodule = make(cfg.data)
    net = make(cfg.model, num_classes=datamodule.num_classes)
    check(net)
    task = make(cfg.task, net=net, num_classes=datamodule.num_classes)
    trainer = make(cfg.trainer, logger=make(cfg.logger) if cfg.logger else False)
    make(cfg.pretrain)(task, datamodule, run_dir / "checkpoints" / "float.ckpt", trainer=trainer)
    return datamodule, task, trainer


def qat_search(cfg: DictConfig, run_dir: Path) -> None:
    """Search bits and schedules; the callback writes the run folder. A run that was interrupted goes on.

    Raises:
        BaqeError: whatever went wrong on purpose.
    """
    search = make(cfg.search, run_dir=run_dir)
    search.device.check_here()
    datamodule, task, make_trainer = _prepare(cfg, run_dir, search.check_bits)
    search.example_input = datamodule.example_input
    # The search has a bar of its own, over trials.
    trainer = make_trainer(
        max_epochs=-1, callbacks=[search], enable_checkpointing=False, enable_progress_bar=False, num_sanity_val_steps=0
    )
    trainer.fit(task, datamodule=datamodule)
    _close(run_dir)
    if search.gave_up is not None:
        raise BaqeError(f"The search gave up: {search.gave_up}")


def qat(cfg: DictConfig, run_dir: Path) -> None:
    """Fine-tune one bit-config and deploy it; the run folder is that of a search with one trial.

    Raises:
        BaqeError: whatever went wrong on purpose.
    """
    from lightning_baqe.callbacks import Distillation
    from lightning_baqe.quantization.calibration import calibrate
    from lightning_baqe.quantization.config import BitConfig
    from lightning_baqe.quantization.convert import QuantizedModel, check_options, quantize
    from lightning_baqe.tasks import fit_to_checkpoint

    # What can be wrong is known before the float training.
    options = {name: cfg.qat[name] for name in ("activation_quantizer", "activation_range")}
    check_options(**options)
    callbacks = _batch_norm_callbacks(cfg)
    distillation = Distillation(weight=cfg.qat.distillation, temperature=cfg.qat.temperature)
    device = _device(cfg)
    datamodule, task, make_trainer = _prepare(
        cfg, run_dir, lambda network: device.check_bits(network, _bits(cfg, network))
    )
    example, net = datamodule.example_input, task.net.cpu()
    if distillation.weight > 0:
        distillation.teacher = net
        callbacks.append(distillation)
    bits = _bits(cfg, net)
    reference = quantize(net, BitConfig.uniform(net, 32, 32), example).eval()

    start = time.perf_counter()
    quantized = task.quantize(bits, example, **options)
    calibrate(quantized, datamodule.train_dataloader(), max_batches=cfg.qat.calibration_batches)
    fit_to_checkpoint(task, datamodule, run_dir / "checkpoints" / "qat.ckpt", cfg.qat.epochs, make_trainer, callbacks)
    assert isinstance(task.net, QuantizedModel)
    seconds = {"train": time.perf_counter() - start}
    _write_single(cfg, device, run_dir, datamodule, reference, task.net.cpu().eval(), seconds)
    _close(run_dir)


def _device(cfg: DictConfig) -> DeviceDescription:
    """The device that ``cfg.deploy`` describes, which this machine can compile for and run."""
    from lightning_baqe.deploy.description import DeviceDescription

    device = DeviceDescription.of(cast("dict[str, Any]", OmegaConf.to_container(cfg.deploy)))
    device.check_here()
    return device


def _bits(cfg: DictConfig, net: nn.Module) -> BitConfig:
    """The bit-config that ``cfg.bits`` names, from a file or uniform."""
    from lightning_baqe.quantization.config import BitConfig

    if cfg.bits.file is None:
        return BitConfig.uniform(net, cfg.bits.weight, cfg.bits.activation, cfg.bits.first_last)
    try:
        return BitConfig.from_json(Path(cfg.bits.file).expanduser())
    except OSError as error:
        raise ConfigError(f"bits.file={cfg.bits.file} cannot be read ({error}): give a bit-config's file.") from error


def _batch_norm_callbacks(cfg: DictConfig) -> list[pl.Callback]:
    from lightning_baqe.callbacks import FreezeBatchNorm

    after, fold = cfg.qat.freeze_batch_norm_after, cfg.qat.fold_batch_norm
    if after is not None:
        return [FreezeBatchNorm(after_epochs=after, fold=fold)]
    if fold:
        raise ConfigError(
            "qat.fold_batch_norm=true folds when the statistics are frozen, but qat.freeze_batch_norm_after=null never "
            "freezes them: give the epochs before that."
        )
    return []


def _write_single(
    cfg: DictConfig,
    device: DeviceDescription,
    run_dir: Path,
    datamodule: Any,
    reference: QuantizedModel,
    quantized: QuantizedModel,
    seconds: dict[str, float],
) -> None:
    """Evaluate the float and the quantized network on the device and write the run folder's files."""
    import torch

    from lightning_baqe.deploy.artifact import Artifact
    from lightning_baqe.deploy.device import device_info, versions
    from lightning_baqe.deploy.evaluate import MeasureOptions, deployed_accuracy, evaluate, module_accuracy
    from lightning_baqe.deploy.run_folder import OBJECTIVES, REFERENCE_POINT, objectives, write_summary
    from lightning_baqe.report import write_report
    from lightning_baqe.search import hypervolume

    def figures(model: QuantizedModel, name: str) -> dict[str, Any]:
        folder = run_dir / "artifacts" / name
        options = MeasureOptions(repeats=cfg.deploy.repeats, warmup=cfg.deploy.warmup)
        batches = datamodule.val_dataloader()
        found = evaluate(
            model, batches, folder, device.target, threads=device.threads, options=options,
            fuse_residual=device.fuse_residual,
        )  # fmt: skip
        return {
            "accuracy": found.accuracy,
            "test_accuracy": deployed_accuracy(Artifact.load(folder), datamodule.test_dataloader()),
            "latency_us": found.latency_us,
            "size_bytes": found.size_bytes,
            "spread": found.spread,
            "noisy": found.noisy,
            "schedules": found.schedules,
            "seconds": found.seconds,
        }

    float_figures, trial = figures(reference, "float"), figures(quantized, "trial_0")
    trial |= {
        "number": 0,
        "state": "complete",
        "phase": "qat",
        "bits": {name: [layer.weight, layer.activation] for name, layer in quantized.bits.items()},
        "fake_quant_accuracy": module_accuracy(quantized, datamodule.val_dataloader(), torch.device("cpu")),
        "pareto": True,
        "seconds": seconds | trial["seconds"] | {"propose": 0.0},
        "error": None,
    }
    summary = {
        "recipe": recipe_name(cfg),
        "model": cfg.model.name,
        "dataset": datamodule.name,
        "device": device_info(cfg.deploy.threads),
        "versions": versions(),
        "float": float_figures,
        "baselines": [],
        "objectives": list(OBJECTIVES),
        "reference_point": list(REFERENCE_POINT),
        "hypervolume": hypervolume(torch.tensor([objectives(trial, float_figures)]), REFERENCE_POINT),
        "baselines_hypervolume": 0.0,
        "trials": [trial],
    }
    write_summary(run_dir, summary)
    write_report(summary, run_dir / "report.html")


def tune(cfg: DictConfig, run_dir: Path) -> None:
    """Tune the kernels of a network with random weights, on which latency does not depend; what the records hold is
    not measured again, so that a run that was interrupted goes on, in any run folder.

    Raises:
        BaqeError: whatever went wrong on purpose.
    """
    import torch

    from lightning_baqe.deploy import tune_report, tuner
    from lightning_baqe.deploy.records import Records
    from lightning_baqe.deploy.target import get_target
    from lightning_baqe.integer.lowering import lower
    from lightning_baqe.quantization.calibration import calibrate
    from lightning_baqe.quantization.convert import quantize
    from lightning_baqe.tasks.networks import settle

    for name in ("candidates", "image_size", "num_classes"):
        if not isinstance(cfg[name], int) or cfg[name] < 1:
            raise ConfigError(f"{name}={cfg[name]!r}, but a whole number of 1 or more is wanted: change {name}.")
    if cfg.budget_s is not None and not (isinstance(cfg.budget_s, int | float) and cfg.budget_s >= 0):
        raise ConfigError(f"budget_s={cfg.budget_s!r}, but seconds are wanted, or null for no limit: change budget_s.")
    _ignore_known_warnings()
    device, strategy = _device(cfg), make(cfg.strategy)
    target = get_target(device.target)
    console = Console(stderr=True, highlight=False)
    torch.manual_seed(cfg.seed)
    images = torch.randn(4, 3, cfg.image_size, cfg.image_size)
    net = make(cfg.model, num_classes=cfg.num_classes)
    bits = _bits(cfg, net)
    device.check_bits(net, bits)
    quantized = calibrate(quantize(settle(net, images), bits, example_input=images).eval(), [images])
    graph = lower(quantized, example_input=images[:1])
    with tune_report.TuneProgress(console) as bar:
        result = tuner.tune(
            graph, target, device.threads, cfg.candidates, cfg.budget_s, Records(cfg.records), strategy, bar.update,
            device.fuse_residual,
        )  # fmt: skip
    about = {
        "recipe": recipe_name(cfg), "model": cfg.model.name, "image_size": cfg.image_size,
        "bits": {name: [layer.weight, layer.activation] for name, layer in quantized.bits.items()},
        "strategy": str(cfg.strategy._target_), "candidates": cfg.candidates,
    }  # fmt: skip
    path = tune_report.write_tuning(run_dir, result, about, device.threads)
    output = Console(highlight=False, width=None if console.is_terminal else 160)
    output.print(tune_report.tuning_table(result))
    output.print(tune_report.tuning_line(result, cfg.budget_s), markup=False, soft_wrap=True)
    output.print(f"Figures: {path}", markup=False, soft_wrap=True)


def _close(run_dir: Path) -> None:
    """Show the front, and where the report is."""
    from lightning_baqe.deploy.front import Front

    console = Console(highlight=False)
    console.print(Front.load(run_dir).table())
    console.print(f"Report: {run_dir / 'report.html'}", markup=False, soft_wrap=True)
