"""What the recipes do: each flow is named by ``flow._target_`` of a file in ``recipes/recipe``."""

from __future__ import annotations

import copy
import inspect
import itertools
import logging
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import hydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from lightning_baqe.errors import BaqeError, ConfigError
from lightning_baqe.train import recipe_name

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from torch import nn
    from torchmetrics import Metric

    from lightning_baqe.entrance.admission import Network
    from lightning_baqe.hardware.description import DeviceDescription
    from lightning_baqe.quantization.config import BitConfig
    from lightning_baqe.quantization.convert import QuantizedModel
    from lightning_baqe.tasks import ImageClassifier
    from lightning_baqe.tasks.scoring import Scorer


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


def _network(cfg: DictConfig, num_classes: int, channels: int = 3) -> nn.Module:
    """The recipe's network, without what it is wrapped in."""
    from lightning_baqe.entrance.network import named_network, refuse_unfit

    # Whatever makes networks need not know of weights and channels that nobody asks for.
    given = OmegaConf.create({name: value for name, value in cfg.model.items() if value is not None})
    more = {} if channels == 3 else {"in_channels": channels}
    net = named_network(make(given, num_classes=num_classes, **more))
    refuse_unfit(net)
    return net


def _normalise_as_trained(datamodule: Any, net: nn.Module, cfg: DictConfig) -> None:
    """Give images to weights of ImageNet as these had them."""
    from lightning_baqe.tasks.weights import IMAGENET

    about = getattr(net, "pretrained_cfg", None)
    if cfg.model.get("weights") == IMAGENET and about is not None:
        channels = datamodule.input_shape[0]
        datamodule.normalise(about["mean"][:channels], about["std"][:channels])


def _prepare(
    cfg: DictConfig,
    run_dir: Path,
    check: Callable[[nn.Module], None],
    metric: Metric | None,
    check_admitted: Callable[[Network], None] | None = None,
) -> tuple[Any, ImageClassifier, Callable[..., pl.Trainer]]:
    """The data module, the task over a trained float network, and what makes Trainers; first the network is checked."""
    import pytorch_lightning as pl

    from lightning_baqe.callbacks.company import check_precision
    from lightning_baqe.entrance.admission import admit
    from lightning_baqe.runs.evaluation import check_module

    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # hardware and tips, anew for each Trainer
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    _check_has_weights(cfg)
    datamodule = make(cfg.data)
    net = _network(cfg, datamodule.num_classes, datamodule.input_shape[0])
    check(net)
    _normalise_as_trained(datamodule, net, cfg)
    datamodule.prepare_data()
    datamodule.setup("fit")
    admitted = admit(net, datamodule.example_input)
    if check_admitted is not None:
        check_admitted(admitted)
    check_module(net, datamodule.val_dataloader(), metric)
    task = make(cfg.task, net=net, num_classes=datamodule.num_classes, **({} if metric is None else {"metric": metric}))
    trainer = make(cfg.trainer, logger=make(cfg.logger) if cfg.logger else False)
    check_precision(str(trainer(enable_checkpointing=False, max_epochs=1).precision))
    make(cfg.pretrain)(task, datamodule, run_dir / "checkpoints" / "float.ckpt", trainer=trainer)
    return datamodule, task, trainer


def qat_search(cfg: DictConfig, run_dir: Path) -> None:
    """Search bits and schedules; the callback writes the run folder. A run that was interrupted goes on.

    Raises:
        BaqeError: whatever went wrong on purpose.
    """
    search = make(cfg.search, run_dir=run_dir)
    search.device.check_here()
    search.check_places(run_dir)
    datamodule, task, make_trainer = _prepare(cfg, run_dir, search.check_bits, search.metric)
    search.example_input = datamodule.example_input
    # The search has a bar of its own, over trials.
    trainer = make_trainer(
        max_epochs=-1, callbacks=[search], enable_checkpointing=False, enable_progress_bar=False, num_sanity_val_steps=0
    )
    trainer.fit(task, datamodule=datamodule)
    _close(run_dir)
    _show_mistakes(run_dir, datamodule, search.device.reach)
    if search.gave_up is not None:
        raise BaqeError(f"The search gave up: {search.gave_up}")


def qat(cfg: DictConfig, run_dir: Path) -> None:
    """Fine-tune one bit-config and deploy it; the run folder is that of a search with one trial.

    Raises:
        BaqeError: whatever went wrong on purpose.
    """
    from lightning_baqe.fine_tuning import FineTuning

    tuning, device = FineTuning.of(cfg), _device(cfg)

    def train(task: ImageClassifier, datamodule: Any, make_trainer: Any, net: nn.Module, scorer: Scorer) -> Any:
        checkpoint = run_dir / "checkpoints" / "qat.ckpt"
        return tuning.train(task, _bits(cfg, net), datamodule, checkpoint, make_trainer, net, scorer)

    _one_network(cfg, run_dir, device, lambda network: device.check_bits(network, _bits(cfg, network)), train)


def learned_bits(cfg: DictConfig, run_dir: Path) -> None:
    """Learn bits by gradient and deploy what comes of it; the run folder is that of a search with one trial.

    Raises:
        BaqeError: whatever went wrong on purpose.
    """
    from lightning_baqe.bit_learning import BitLearning
    from lightning_baqe.quantization.config import MAX_BITS, MIN_BITS, BitConfig

    learning, device = BitLearning.of(cfg, partial(make, cfg.pressure)), _device(cfg)

    def check(network: nn.Module) -> None:
        for bits in range(MIN_BITS, MAX_BITS + 1):
            device.check_bits(network, BitConfig.uniform(network, bits, bits, first_last=None))

    def train(task: ImageClassifier, datamodule: Any, make_trainer: Any, net: nn.Module, scorer: Scorer) -> Any:
        checkpoint = run_dir / "checkpoints" / "learned_bits.ckpt"
        return learning.train(task, datamodule, checkpoint, make_trainer, net, scorer)

    _one_network(cfg, run_dir, device, check, train, learning.check)


def _one_network(
    cfg: DictConfig,
    run_dir: Path,
    device: DeviceDescription,
    check: Callable[[nn.Module], None],
    train: Callable[[ImageClassifier, Any, Any, nn.Module, Scorer], QuantizedModel],
    check_admitted: Callable[[Network], None] | None = None,
) -> None:
    """Train one quantized network from the float one, deploy both, and write the run.

    Args:
        check: of the float network, before anything is trained.
        train: gives the quantized network of a task, its data, what makes Trainers, the float network and its scorer.
        check_admitted: of the network with its inputs, before anything is trained, too.
    """
    import torch

    from lightning_baqe.deploy.artifact import Artifact
    from lightning_baqe.entrance.quantize import quantize
    from lightning_baqe.hardware.identity import versions
    from lightning_baqe.measurement.local import reach
    from lightning_baqe.quantization.config import BitConfig
    from lightning_baqe.runs.evaluation import (
        MeasureOptions,
        deployed_accuracy,
        evaluate,
        module_accuracy,
        module_scorer,
    )
    from lightning_baqe.runs.objectives import summarise
    from lightning_baqe.runs.report import write_report
    from lightning_baqe.runs.study import bits_entry
    from lightning_baqe.runs.summary import Trial

    metric = _metric(cfg)  # what can be wrong is known before the float training
    measurement = MeasureOptions(repeats=cfg.deploy.repeats, warmup=cfg.deploy.warmup)
    datamodule, task, make_trainer = _prepare(cfg, run_dir, check, metric, check_admitted)
    example, net = datamodule.example_input, task.net.cpu()
    scorer = module_scorer(net, datamodule.val_dataloader(), torch.device("cpu"), metric)
    Console(stderr=True, highlight=False).print(f"{scorer.line}.", markup=False, soft_wrap=True)
    reference = quantize(net, BitConfig.uniform(net, 32, 32), example).eval()

    start = time.perf_counter()
    quantized = train(task, datamodule, make_trainer, net, scorer)
    begun = Trial(
        number=0,
        phase=recipe_name(cfg),
        bits=bits_entry(quantized.bits),
        seconds={"train": time.perf_counter() - start, "propose": 0.0},
    )

    measured_on, found, tests = reach(device.reach), {}, {}
    for name, model in {"float": reference, begun.key: quantized}.items():
        folder = run_dir / "artifacts" / name
        found[name] = evaluate(
            model, datamodule.val_dataloader(), folder, device.options, device=measured_on, options=measurement,
            scorer=scorer,
        )  # fmt: skip
        with closing(Artifact.load(folder)) as artifact:
            tests[name] = deployed_accuracy(artifact, datamodule.test_dataloader(), measured_on, scorer)
    fake = module_accuracy(quantized, datamodule.val_dataloader(), torch.device("cpu"), scorer)
    about = {
        "recipe": recipe_name(cfg), "metric": scorer.name, "model": cfg.model.name, "dataset": datamodule.name,
        "device": measured_on.info(cfg.deploy.threads), "versions": versions(),
    }  # fmt: skip
    summary = summarise(about, found["float"], [begun.completed(found[begun.key], fake)], tests=tests)
    summary.write(run_dir)
    write_report(summary, run_dir / "report.html")
    _close(run_dir)
    _show_mistakes(run_dir, datamodule, device.reach)


def hawq(cfg: DictConfig, run_dir: Path) -> None:
    """Allocate bits to budgets by sensitivities and measured costs, and do with each network what :func:`qat` does.

    Raises:
        BaqeError: whatever went wrong on purpose.
    """
    import torch

    from lightning_baqe.entrance.admission import admit
    from lightning_baqe.fine_tuning import FineTuning
    from lightning_baqe.measurement.local import reach
    from lightning_baqe.quantization.batches import input_and_labels
    from lightning_baqe.quantization.config import BitConfig, layers
    from lightning_baqe.runs.allocation_figure import draw_layers
    from lightning_baqe.runs.allocator import Allocator, write_rows, write_table
    from lightning_baqe.runs.budgets import budget_table
    from lightning_baqe.runs.evaluation import MeasureOptions, module_scorer
    from lightning_baqe.runs.report import write_report
    from lightning_baqe.tasks.classifier import loss_of

    metric, tuning, options = _metric(cfg), FineTuning.of(cfg), make(cfg.allocation, sensitivity=make(cfg.sensitivity))
    device = _device(cfg)

    if (cfg.bits.file, cfg.bits.weight, cfg.bits.activation, cfg.bits.first_last) != (None, 8, 8, 8):
        raise ConfigError(
            "bits.file and the like name one bit-config; recipe=hawq finds them: give allocation.budget.*"
        )

    def check(network: nn.Module) -> None:
        if len(layers(network)) < 3:
            raise ConfigError(
                f"{type(network).__name__} has {len(layers(network))} layers, of which the first and the last keep 8 "
                "bits: there is nothing to allocate"
            )
        for bits in {*options.widths, *options.baselines}:
            device.check_bits(network, BitConfig.uniform(network, bits, bits))

    datamodule, task, make_trainer = _prepare(cfg, run_dir, check, metric)
    net = task.net.cpu()
    scorer = module_scorer(net, datamodule.val_dataloader(), torch.device("cpu"), metric)
    console = Console(stderr=True, highlight=False)
    say = partial(console.print, markup=False, soft_wrap=True)
    say(f"{scorer.line}.")
    most = max(cfg.qat.calibration_batches, -(-options.images // datamodule.batch_size))
    with torch.random.fork_rng():
        torch.manual_seed(cfg.seed)  # the same images whenever the run goes on, whatever they are changed by
        batches = [
            input_and_labels(batch, "the train loader", ConfigError)
            for batch in itertools.islice(datamodule.train_dataloader(), most)
        ]

    def train(bits: BitConfig, name: str) -> QuantizedModel:
        torch.manual_seed(cfg.seed)  # each network's training is the same, whichever were trained before
        fresh = make(cfg.task, net=copy.deepcopy(net), num_classes=datamodule.num_classes,
                     **({} if metric is None else {"metric": metric}))  # fmt: skip
        return tuning.train(
            fresh, bits, datamodule, run_dir / "checkpoints" / f"{name}.ckpt", make_trainer, net, scorer
        )

    about = {"recipe": recipe_name(cfg), "model": cfg.model.name, "dataset": datamodule.name}
    measurement = MeasureOptions(repeats=cfg.deploy.repeats, warmup=cfg.deploy.warmup)
    allocator = Allocator(
        options, net, admit(net, datamodule.example_input), batches, tuning.options, tuning.batches, loss_of, train,
        datamodule.val_dataloader(), datamodule.test_dataloader(), scorer, run_dir, about, reach(device.reach),
        device.options, measurement, say,
    )  # fmt: skip
    rows = allocator.rows()
    write_rows(allocator.folder, rows)
    draw_layers(rows, allocator.sensitivities.values, allocator.costs, allocator.folder / "layers.png")
    summary, entries = allocator.run(rows)
    table = budget_table(rows, entries, allocator.costs, summary.measure)
    output = Console(highlight=False, width=None if console.is_terminal else 160)
    with output.capture() as captured:
        output.print(table)
    print(captured.get(), end="")
    write_table(allocator.folder, captured.get())
    write_report(summary, run_dir / "report.html")
    _close(run_dir)
    _show_mistakes(run_dir, datamodule, device.reach)


def ptq(cfg: DictConfig, run_dir: Path) -> None:
    """Correct one bit-config without training and deploy it: :func:`qat` by another name and with other defaults.

    Raises:
        BaqeError: whatever went wrong on purpose.
    """
    qat(cfg, run_dir)


def _check_has_weights(cfg: DictConfig) -> None:
    if (
        cfg.pretrain.epochs == 0
        and str(cfg.model._target_) == "lightning_baqe.tasks.network"
        and not cfg.model.get("weights")
    ):
        raise ConfigError(
            "pretrain.epochs=0 trains nothing, and model.weights=null are random weights: give model.weights=<file>, "
            "or pretrain.epochs."
        )


def _metric(cfg: DictConfig) -> Metric | None:
    """The metric that ``cfg.metric`` makes; None: the data will tell."""
    from lightning_baqe.tasks.scoring import check_metric

    if cfg.metric is None:
        return None
    try:
        # What is no node is no metric either, and is refused below.
        is_node = isinstance(cfg.metric, DictConfig)
        metric: Metric = hydra.utils.instantiate(cfg.metric, _convert_="all") if is_node else cfg.metric
    except InstantiationException as error:
        raise ConfigError(f"metric cannot be made as the configuration says: {error.__cause__ or error}") from error
    check_metric(metric)
    return metric


def _device(cfg: DictConfig) -> DeviceDescription:
    """The device that ``cfg.deploy`` describes, which this machine can compile for and run."""
    from lightning_baqe.hardware.description import DeviceDescription

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
    except ConfigError as error:
        raise ConfigError(f"bits.file: {error}") from error


def tune(cfg: DictConfig, run_dir: Path) -> None:
    """Tune the kernels of a network with random weights, on which latency does not depend; what the records hold is
    not measured again, so that a run that was interrupted goes on, in any run folder.

    Raises:
        BaqeError: whatever went wrong on purpose.
    """
    import torch

    from lightning_baqe.calibration.calibrate import calibrate
    from lightning_baqe.entrance.quantize import quantize
    from lightning_baqe.integer.lowering import lower
    from lightning_baqe.measurement.local import reach
    from lightning_baqe.tasks.networks import settle
    from lightning_baqe.tuning import tune_report, tuner

    for name in ("candidates", "image_size", "num_classes"):
        if not isinstance(cfg[name], int) or cfg[name] < 1:
            raise ConfigError(f"{name}={cfg[name]!r}, but a whole number of 1 or more is wanted: change {name}.")
    if cfg.budget_s is not None and not (isinstance(cfg.budget_s, int | float) and cfg.budget_s >= 0):
        raise ConfigError(f"budget_s={cfg.budget_s!r}, but seconds are wanted, or null for no limit: change budget_s.")
    device, strategy = _device(cfg), make(cfg.strategy)
    console = Console(stderr=True, highlight=False)
    torch.manual_seed(cfg.seed)
    images = torch.randn(4, 3, cfg.image_size, cfg.image_size)
    net = _network(cfg, cfg.num_classes)
    bits = _bits(cfg, net)
    device.check_bits(net, bits)
    quantized = calibrate(quantize(settle(net, images), bits, example_input=images).eval(), [images])
    graph = lower(quantized, example_input=images[:1])
    measured_on = reach(device.reach, cfg.records)
    with tune_report.tune_progress(console) as show:
        result = tuner.tune(
            graph, device.options, cfg.candidates, cfg.budget_s, measured_on, strategy, show,
        )  # fmt: skip
    about = {
        "recipe": recipe_name(cfg), "model": cfg.model.name, "image_size": cfg.image_size,
        "bits": {name: [layer.weight, layer.activation] for name, layer in quantized.bits.items()},
        "strategy": str(cfg.strategy._target_), "candidates": cfg.candidates,
        "device": measured_on.info(device.threads),
    }  # fmt: skip
    path = tune_report.write_tuning(run_dir, result, about)
    output = Console(highlight=False, width=None if console.is_terminal else 160)
    output.print(tune_report.tuning_table(result))
    output.print(tune_report.tuning_line(result, cfg.budget_s), markup=False, soft_wrap=True)
    output.print(f"Figures: {path}", markup=False, soft_wrap=True)


def _show_mistakes(run_dir: Path, datamodule: Any, how: str) -> None:
    """Draw what the most accurate point of the front gets wrong on the test split, if it tells classes apart."""
    import torch

    from lightning_baqe.data.base import ImageDataModule
    from lightning_baqe.measurement.local import reach
    from lightning_baqe.runs.front import Front
    from lightning_baqe.runs.mistakes import find_mistakes, write_mistakes
    from lightning_baqe.tasks.scoring import kind_of

    front = Front.load(run_dir)
    if not front.points or not isinstance(datamodule, ImageDataModule):
        return
    point = front.select_point()
    with closing(front.select()) as artifact:
        run = partial(reach(how).run, artifact)
        x, y = next(iter(datamodule.test_dataloader()))
        outputs = torch.as_tensor(run(x[:1]))
        if kind_of(outputs, y[:1]) != "classes" or outputs.shape[1:] != (len(datamodule.classes),):
            return
        found = find_mistakes(run, datamodule.test_dataloader(), datamodule.classes, datamodule.mean, datamodule.std)
    write_mistakes(found, f"{datamodule.name}: {point.name}, {point.latency_us:.0f} us", run_dir / "mistakes.png")


def _close(run_dir: Path) -> None:
    """Show the front, and where the report is."""
    from lightning_baqe.runs.front import Front

    console = Console(highlight=False)
    console.print(Front.load(run_dir).table())
    console.print(f"Report: {run_dir / 'report.html'}", markup=False, soft_wrap=True)
