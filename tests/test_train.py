"""The command line: help, errors that name what is near, run folders, and every recipe in its smallest form."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image
from sklearn.metrics import f1_score
from small_data import mixed_pictures, small_elpv
from smallest import HAWQ, LEARNED_BITS, SMALLEST

from lightning_baqe import flows
from lightning_baqe.errors import ConfigError
from lightning_baqe.tasks.classifier import CHECKPOINT_KEY
from lightning_baqe.train import compose, main, open_run, quoted, recipe_groups, resume_command

ROOT = Path(__file__).parent.parent
RECIPES = sorted(path.stem for path in (ROOT / "recipes/recipe").glob("*.yaml"))
GROUPS = (
    "data", "deploy", "logger", "model", "pressure", "recipe", "search", "sensitivity", "strategy", "task", "trainer",
)  # fmt: skip


def test_help_lists_every_choice_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for group, choices in recipe_groups().items():
        assert f"{group}:" in text
        for choice, what in choices.items():
            assert what, f"recipes/{group}/{choice}.yaml begins with no comment that says what it is"
            assert f"  {choice}" in text
            assert what in text
    assert set(GROUPS) <= set(recipe_groups())


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ([], ["recipe=<name>", "qat_search"]),
        (["recipe=qat_serch"], ["'qat_serch'", "did you mean 'qat_search'", "qat, qat_search"]),
        (["recipe=null"], ["There is no recipe"]),
        (["recipe=qat_search", "search=null"], ["There is no search", "bayesian"]),
        (["recipe=qat", "logger=null"], ["There is no logger", "none"]),
        (["recipe=tune", "strategy=rankd"], ["There is no strategy 'rankd'", "'ranked'", "sa_xgb"]),
        (["recipe=tune", "candidate=3"], ["There is no key 'candidate'", "'candidates'"]),
        (["recipe=qat", "data=digit"], ["There is no data 'digit'", "'digits'", "imagefolder"]),
        (["recipe=qat", "model=resnet19"], ["There is no model", "'resnet18'"]),
        (["recipe=qat", "pretrain.epoch=1"], ["There is no key 'pretrain.epoch'", "'pretrain.epochs'"]),
        (["recipe=qat_search", "trials=3"], ["There is no key 'trials'", "'search.trials'"]),
        (["recipe=qat", "search.trials=3"], ["There is no key 'search.trials'"]),
        (["recipe"], ["recipe", "key=value"]),
        (["recipe=qat", "seed=1,2"], ["several values"]),
        (["recipe=qat", "~model.nonsense"], ["nonsense"]),
        (["recipe=qat", "--trials", "3"], ["'--trials' is no key=value"]),
        (["recipe=qat", "=3"], ["'=3' has no key"]),
        (["recipe=qat", "model.name=a=b"], ["'model.name=a=b' cannot be read", """'model.name='"'"'a=b'"'"''"""]),
        (["recipe=qat", "model.name=été"], ["cannot be read", "quotes"]),
        (["recipe=qat", "model.name=a, b"], ["several values", "quotes"]),
        (["recipe=qat", "bits=bits.json"], ["'bits=bits.json'", "bits.file=... or bits.weight=..."]),
        (["recipe=qat", "pretrain=null"], ["'pretrain=null'", "pretrain.epochs=..."]),
        (["recipe=qat", "run_dir=a/${nothing}"], ["nothing"]),
        (["recipe=qat", "data=imagefolder"], ["data.root must be given: add data.root=..."]),
    ],
)
def test_wrong_command_lines(arguments: list[str], wanted: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    for part in wanted:
        assert part in error


CHOICES = [f"{group}={choice}" for group, choices in recipe_groups().items() for choice in choices if group != "recipe"]


@pytest.mark.parametrize(
    "arguments",
    [[f"recipe={recipe}"] for recipe in RECIPES] + [["recipe=qat_search", choice] for choice in CHOICES],
    ids=" ".join,
)
def test_everything_composes(arguments: list[str]) -> None:
    cfg = compose([*arguments, "run_dir=somewhere"])
    missing = OmegaConf.missing_keys(cfg)
    assert missing <= {"data.root"}
    cfg = compose([*arguments, "run_dir=somewhere", *(f"{key}=x" for key in missing)])
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)


def test_every_target_can_be_called() -> None:
    from hydra.utils import get_method

    for path in (ROOT / "recipes").rglob("*.yaml"):
        for line in path.read_text().splitlines():
            key, _, value = line.strip().partition(": ")
            if key == "_target_":
                assert callable(get_method(value)), path


def test_comments_say_what_each_file_is() -> None:
    for path in (ROOT / "recipes").rglob("*.yaml"):
        assert path.read_text().startswith("# "), path


def test_numbers_are_numbers() -> None:
    cfg = compose(["recipe=qat", "task.learning_rate=1e-4"])
    assert (cfg.task.learning_rate, cfg.pretrain.learning_rate) == (1e-4, 2e-3)


PATHS_AS_PEOPLE_HAVE_THEM = [
    "/data/lr=0.1, wd=1e-4 (β)", "~/images", "/a/it's", "/a b/été/猫",
    "1e3", "true", "C:\\x\\", "/a/[b]{c}", "a#1", " a ", "a\\'b\\",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS_AS_PEOPLE_HAVE_THEM)
def test_paths_are_read_as_they_are_written(path: str) -> None:
    cfg = compose(["recipe=qat", "data=imagefolder", f"data.root={path}", f"bits.file={path}", f"run_dir={path}"])
    assert cfg.data.root == cfg.bits.file == cfg.run_dir == path


def test_paths_may_be_in_quotes_and_refer_to_keys() -> None:
    cfg = compose(["recipe=qat", "data=imagefolder", "data.root='/a=b'", "bits.file=null", "run_dir=runs/${seed}"])
    assert (cfg.data.root, cfg.bits.file, cfg.run_dir) == ("/a=b", None, "runs/0")


@given(st.text(st.characters(exclude_categories=["C"]), max_size=12).filter(lambda text: "${" not in text))
@settings(deadline=None)
def test_quotes_hold_any_text(text: str) -> None:
    override = OverridesParser.create().parse_override(f"key={quoted(text)}")
    assert override.value() == text


def test_keys_can_be_added() -> None:
    assert compose(["recipe=qat", "+trainer.gradient_clip_algorithm=norm"]).trainer.gradient_clip_algorithm == "norm"


class TestRunFolder:
    def test_default(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        run_dir = open_run(compose(["recipe=qat"]))
        assert run_dir.parent == tmp_path / "outputs" / "qat"
        assert yaml.safe_load((run_dir / "config.yaml").read_text())["run_dir"] == str(run_dir)

    def test_same_arguments_resume(self, tmp_path: Path) -> None:
        arguments = ["recipe=qat_search", f"run_dir={tmp_path}/run", "search.bit_choices=[2,4]"]
        assert open_run(compose(arguments)) == open_run(compose(arguments)) == tmp_path / "run"

    @pytest.mark.parametrize("change", ["search.trials=50", "trainer=auto", "logger=wandb", "search.max_failures=3"])
    def test_what_may_change(self, change: str, tmp_path: Path) -> None:
        open_run(compose(["recipe=qat_search", f"run_dir={tmp_path}"]))
        open_run(compose(["recipe=qat_search", f"run_dir={tmp_path}", change]))

    @pytest.mark.parametrize(
        ("change", "wanted"),
        [
            ("model=resnet34", "model.name: 'resnet20' there, 'resnet34' here"),
            ("data=digits", "data._target_"),
            ("search.bit_choices=[2,8]", r"search.bit_choices: \[2, 3, 4, 5, 6, 8\] there, \[2, 8\] here"),
            ("seed=1", "seed: 0 there, 1 here"),
            ("metric={_target_: torchmetrics.R2Score}", "metric"),
            ("+model.zero_init_residual=true", "model.zero_init_residual: nothing there, True here"),
        ],
    )
    def test_what_may_not(self, change: str, wanted: str, tmp_path: Path) -> None:
        open_run(compose(["recipe=qat_search", f"run_dir={tmp_path}"]))
        before = (tmp_path / "config.yaml").read_bytes()
        with pytest.raises(ConfigError, match=wanted):
            open_run(compose(["recipe=qat_search", f"run_dir={tmp_path}", change]))
        assert (tmp_path / "config.yaml").read_bytes() == before

    def test_another_recipe(self, tmp_path: Path) -> None:
        open_run(compose(["recipe=qat_search", f"run_dir={tmp_path}"]))
        with pytest.raises(ConfigError, match=r"flow\._target_"):
            open_run(compose(["recipe=qat", f"run_dir={tmp_path}"]))

    def test_a_broken_configuration_in_it(self, tmp_path: Path) -> None:
        (tmp_path / "config.yaml").write_text("a: [")
        with pytest.raises(ConfigError, match=r"(?s)config\.yaml cannot be read.*remove it, or give another run_dir"):
            open_run(compose(["recipe=qat", f"run_dir={tmp_path}"]))

    def test_one_that_cannot_be_made(self) -> None:
        for folder in ("/proc/none", "/" + "a" * 300):
            with pytest.raises(ConfigError, match=r"cannot be made or written.*give another run_dir"):
                open_run(compose(["recipe=qat", f"run_dir={folder}"]))

    def test_a_file_in_its_place(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "file").touch()
        assert main(["recipe=qat", f"run_dir={tmp_path}/file"]) == 1
        assert "give another run_dir" in capsys.readouterr().err


def test_errors_of_the_run_show_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe=qat", "data=imagefolder", f"data.root={tmp_path}/none", f"run_dir={tmp_path}/run"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("DataError: ")
    assert "Traceback" not in error


def test_unknown_arguments_of_a_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe=qat", "+data.nonsense=1", f"run_dir={tmp_path}"]) == 1
    assert "nonsense" in capsys.readouterr().err


def test_missing_optional_dependency(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setattr("pytorch_lightning.loggers.tensorboard._TENSORBOARD_AVAILABLE", False, raising=False)
    monkeypatch.setattr("lightning_fabric.loggers.tensorboard._TENSORBOARD_AVAILABLE", False)
    monkeypatch.setattr("lightning_fabric.loggers.tensorboard._TENSORBOARDX_AVAILABLE", False)
    cfg = compose(["recipe=qat", "logger=tensorboard", f"run_dir={tmp_path}"])
    with pytest.raises(ConfigError, match=r"pip install 'lightning-baqe\[tensorboard\]'"):
        flows.make(cfg.logger)


@pytest.mark.parametrize("how", ["interrupt", "lightning"])
def test_interrupted(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        if how == "interrupt":
            raise KeyboardInterrupt
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    monkeypatch.setattr(flows, "qat", interrupted)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert main(["recipe=qat", "seed=3", f"run_dir={tmp_path}"]) == 130
    assert f"python train.py recipe=qat seed=3 run_dir={tmp_path}" in capsys.readouterr().err


def test_resume_command_survives_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    import shlex

    monkeypatch.setattr(sys, "argv", ["/usr/bin/lightning-baqe"])
    run_dir = Path("/a folder/it's=1,2")
    program, *arguments = shlex.split(resume_command(["recipe=qat", "run_dir=old", "logger=none"], run_dir))
    assert program == "lightning-baqe"
    cfg = compose(arguments)
    assert cfg.run_dir == str(run_dir)
    assert not cfg.logger


SMALLEST_OF = {
    "qat": ["qat.epochs=1", "qat.calibration_batches=1"],
    "ptq": ["qat.calibration_batches=1"],
    "qat_search": [
        *(
            "data=digits",
            "search.bit_choices=auto",
            "search.steps_per_trial=2",
            "search.baselines=[8]",
            "search.calibration_batches=1",
        ),
        *("search.n_initial=2", "search.pool_size=8", "search.tune_s=5"),
    ],
    "solar_cells": [
        *("model.weights=null", "data.image_size=32", "data.batch_size=8", "search.trials=2"),
        *("search.bit_choices=[4,8]", "search.steps_per_trial=2", "search.baselines=[8]"),
        *("search.calibration_batches=1", "search.n_initial=1", "search.pool_size=8", "search.tune_s=1"),
        "pretrain.frozen=[stem]",
    ],
    "hawq": HAWQ,
    "learned_bits": LEARNED_BITS,
    "tune": ["model._target_=smallest.network", "image_size=16", "num_classes=10", "candidates=2"],
}


@pytest.fixture(autouse=True)
def _own_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_BAQE_CACHE", str(tmp_path / "cache"))


def summary_of(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text())


def test_every_recipe_has_a_smallest_form() -> None:
    assert set(SMALLEST_OF) == set(RECIPES)


def test_ptq_trains_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir, ours = tmp_path / "run", ["recipe=ptq", "bits.weight=4", f"run_dir={tmp_path}/run"]
    assert main([*ours, *SMALLEST, *SMALLEST_OF["ptq"], "pretrain.epochs=0"]) == 0
    assert "trial_0" in capfd.readouterr().out
    (trial,) = summary_of(run_dir)["trials"]
    assert trial["phase"] == summary_of(run_dir)["recipe"] == "ptq"
    assert trial["fake_quant_accuracy"] == pytest.approx(trial["accuracy"], abs=0.01)
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["float.ckpt", "qat.ckpt"]
    before = {path: path.stat().st_mtime_ns for path in (run_dir / "checkpoints").iterdir()}
    assert main([*ours, *SMALLEST, *SMALLEST_OF["ptq"], "pretrain.epochs=0"]) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_without_weights_and_without_training_there_is_nothing_to_quantize(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["recipe=ptq", f"run_dir={tmp_path}/run"]) == 1
    assert "give model.weights=<file>" in capfd.readouterr().err


@pytest.mark.parametrize("option", ["qat.distillation=0.5", "qat.freeze_batch_norm_after=1", "qat.epochs=-1"])
def test_without_training_nothing_is_asked_of_it(
    option: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["recipe=ptq", option, f"run_dir={tmp_path}/run"]) == 1
    assert "qat.epochs" in capfd.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_qat(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ranges = ["qat.activation_range=percentile:99.5", "qat.activation_quantizer=static", "qat.gradients.weights=ewgs"]
    arguments = ["recipe=qat", *SMALLEST, *SMALLEST_OF["qat"], *ranges, "bits.weight=4", f"run_dir={tmp_path}/run"]
    assert main(arguments) == 0
    assert "trial_0" in capfd.readouterr().out
    run_dir = tmp_path / "run"
    summary = summary_of(run_dir)
    (trial,) = summary["trials"]
    assert trial["bits"]["conv1.0"] == [4, 8]
    assert trial["bits"]["fc"] == [8, 8]
    assert summary["dataset"] == "digits"
    assert 0 < summary["hypervolume"] < 1.65
    files = {path.name for path in run_dir.iterdir()}
    assert files >= {"config.yaml", "pareto.csv", "report.html", "mistakes.png", "artifacts"}
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["float.ckpt", "qat.ckpt"]
    structure = torch.load(run_dir / "checkpoints" / "qat.ckpt", weights_only=True)[CHECKPOINT_KEY]
    assert structure["options"] == {"activation_quantizer": "static", "activation_range": "percentile:99.5"}

    before = {path: path.stat().st_mtime_ns for path in (run_dir / "checkpoints").iterdir()}
    assert main(arguments) == 0  # nothing is trained again
    assert {path: path.stat().st_mtime_ns for path in (run_dir / "checkpoints").iterdir()} == before
    assert summary_of(run_dir)["trials"][0]["accuracy"] == trial["accuracy"]


def test_a_folder_of_mixed_pictures(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Grey, palette, alpha, CMYK, turned by EXIF, 16 bit and black-and-white ones run; a truncated one is named."""
    pictures = mixed_pictures(tmp_path / "pictures")
    modes = set()
    for path in pictures:
        with Image.open(path) as picture:
            modes.add(picture.mode)
    assert len(modes) == 7  # the turned one is RGB, too
    data = ["data=imagefolder", f"data.root={tmp_path}/pictures", "data.image_size=32", "data.num_workers=0"]
    ours = ["recipe=qat", *data, "data.batch_size=8", *SMALLEST, *SMALLEST_OF["qat"]]
    assert main([*ours, f"run_dir={tmp_path}/run"]) == 0
    assert summary_of(tmp_path / "run")["dataset"] == "imagefolder"
    whole = pictures[-3].read_bytes()  # of the validation split, all of which is read
    pictures[-3].write_bytes(whole[: len(whole) // 2])
    capfd.readouterr()
    assert main([*ours, f"run_dir={tmp_path}/other"]) == 1
    told = capfd.readouterr().err
    assert str(pictures[-3]) in told
    assert "Traceback" not in told


F1 = "metric={_target_: torchmetrics.classification.BinaryF1Score, threshold: 0.4}"


@pytest.mark.parametrize("metric", [[], [F1]], ids=["default", "f1"])
def test_qat_of_one_logit(metric: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import smallest

    import lightning_baqe as baqe

    options = ["data._target_=smallest.RoundDigits", "qat.distillation=0.5", "trainer.limit_train_batches=1.0"]
    arguments = ["recipe=qat", *SMALLEST, *SMALLEST_OF["qat"], *options, *metric, f"run_dir={tmp_path}/run"]
    assert main(arguments) == 0
    summary = summary_of(tmp_path / "run")
    assert summary["metric"] == ("BinaryF1Score(threshold=0.4)" if metric else "BinaryAccuracy")
    assert f"accuracy is {summary['metric']} of outputs (32, 1)" in capfd.readouterr().err
    data, (trial,) = smallest.RoundDigits(), summary["trials"]
    for entry, folder in ((summary["float"], "float"), (trial, "trial_0")):
        graph = baqe.Artifact.load_graph(tmp_path / "run" / "artifacts" / folder)
        for loader, key in ((data.val_dataloader(), "accuracy"), (data.test_dataloader(), "test_accuracy")):
            x, y = (torch.cat(tensors) for tensors in zip(*loader, strict=True))
            logits = graph.run(x)[:, 0]
            found = f1_score(y, logits.sigmoid() > 0.4) if metric else float(((logits > 0) == y).double().mean())
            assert entry[key] == pytest.approx(found, abs=0.01 if folder == "float" else 1e-6)
    assert trial["accuracy"] > 0.5
    if metric:
        assert "BinaryF1Score over latency" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["metric={_target_: torchmetrics.MeanSquaredError}"], "MeanSquaredError: lower is better"),
        (["metric={_target_: torchmetrics.classification.BinaryF1Score}"], "BinaryF1Score does not take outputs"),
        (
            ["metric={_target_: torchmetrics.classification.MulticlassRecall, num_classes: 10, average: null}"],
            "MulticlassRecall(num_classes=10) gives a tensor (10,)",
        ),
        (["metric=accuracy"], "metric is a str"),
        (["metric={_target_: torchmetrics.classification.MulticlassRecall}"], "num_classes"),
    ],
)
@pytest.mark.parametrize("recipe", ["qat", "qat_search"])
def test_metrics_are_refused_before_any_training(
    recipe: str, options: list[str], wanted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"recipe={recipe}", "data=digits", *SMALLEST, *options, f"run_dir={tmp_path}/run"]) == 1
    assert wanted in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_qat_of_a_bit_config_file(tmp_path: Path) -> None:
    import smallest

    import lightning_baqe as baqe

    bits = baqe.BitConfig.uniform(smallest.SmallestNet(10), 8, 8).replace({"conv2.0": baqe.LayerBits(3, 5)})
    (tmp_path / "bits.json").write_text(bits.to_json())
    run = [f"bits.file={tmp_path}/bits.json", f"run_dir={tmp_path}/run", "logger=none"]
    assert main(["recipe=qat", *SMALLEST, *SMALLEST_OF["qat"], *run]) == 0
    assert summary_of(tmp_path / "run")["trials"][0]["bits"]["conv2.0"] == [3, 5]


@pytest.mark.parametrize(
    ("option", "wanted"),
    [
        ("activation_range=percentile:30", "above 50"),
        ("activation_quantizer=dynamic", "activation_quantizer must be one of"),
        ("gradients.weights=straight", "'straight' is unknown"),
        ("gradients.alpha=3 qat.gradients.activations=invtanh", "alpha=3"),
        ("freeze_batch_norm_after=-1", "after_epochs=-1"),
        ("fold_batch_norm=true", "qat.freeze_batch_norm_after=null never"),
    ],
)
def test_wrong_options_are_refused_before_any_training(
    option: str, wanted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recipe=qat", *SMALLEST, *f"qat.{option}".split(), f"run_dir={tmp_path}/run"]) == 1
    assert wanted in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["recipe=qat", "bits.weight=4"], "'conv2.0' (convolution) has weights of [8, 32] bit, not [4]"),
        (["recipe=qat_search", "search.baselines=[8,4]"], "'conv2.0' (convolution) has weights of [8, 32] bit, not"),
        (["recipe=qat_search", "search.baselines=[8]", "search.bit_choices=[4]"], "has none of [4], but [8, 32]"),
        (["recipe=qat", "deploy.instructions=[amx_of_the_future]"], "it lacks amx_of_the_future"),
        (["recipe=qat_search", "deploy.version=2"], "deploy.version is 2"),
    ],
)
def test_what_the_device_does_not_have_is_refused_before_any_training(
    options: list[str], wanted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    widths = [f"deploy.bits.convolution.{what}=[8,32]" for what in ("weight", "activation")]
    assert main([*options, *SMALLEST, *widths, f"run_dir={tmp_path}/run"]) == 1
    assert wanted in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("fold", [False, True])
def test_qat_with_frozen_batch_norms(fold: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_baqe.callbacks import FreezeBatchNorm

    seen = []
    original = FreezeBatchNorm.on_train_epoch_start

    def spy(self: FreezeBatchNorm, trainer: Any, module: Any) -> None:
        original(self, trainer, module)
        norms = [part for part in module.net.modules() if type(part).__name__ == "BatchNorm2d"]
        seen.append((len(norms), any(part.training for part in norms)))

    monkeypatch.setattr(FreezeBatchNorm, "on_train_epoch_start", spy)
    options = ["qat.freeze_batch_norm_after=1", f"qat.fold_batch_norm={fold}", "qat.calibration_batches=1"]
    options += ["qat.distillation=0.5", "trainer.log_every_n_steps=1"]
    assert main(["recipe=qat", *SMALLEST, *options, "qat.epochs=2", "logger=csv", f"run_dir={tmp_path}/run"]) == 0
    logged = "\n".join(path.read_text() for path in (tmp_path / "run").rglob("metrics.csv"))
    assert "distillation_loss" in logged
    assert seen == [(3, True), (0, False) if fold else (3, False)]
    assert 0 <= summary_of(tmp_path / "run")["trials"][0]["accuracy"] <= 1


def test_bit_config_files_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.json").write_text('{"layers": ')
    for name in ("none.json", "broken.json"):
        run = [f"bits.file={tmp_path / name}", f"run_dir={tmp_path}/{name}-run"]
        assert main(["recipe=qat", *SMALLEST, *run]) == 1
        error = capsys.readouterr().err
        assert "bits.file" in error
        assert str(tmp_path / name) in error
        assert not (tmp_path / f"{name}-run" / "checkpoints").exists()


@pytest.mark.parametrize("recipe", ["qat", "qat_search"])
def test_precision_is_checked_before_any_training(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["trainer.precision=bf16-true", f"run_dir={tmp_path}/run"]
    assert main([f"recipe={recipe}", *SMALLEST, *SMALLEST_OF[recipe], *options]) == 1
    assert "precision='bf16-true'" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("options", [[], ["search.mode=paper", "search.tune_s=0"]], ids=["default", "paper"])
def test_qat_search_and_its_resumption(options: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["recipe=qat_search", *SMALLEST, *SMALLEST_OF["qat_search"], *options, f"run_dir={tmp_path}/run"]
    assert main([*arguments, "search.trials=2"]) == 0
    assert "Report:" in capfd.readouterr().out
    assert (tmp_path / "run" / "mistakes.png").is_file()
    first = summary_of(tmp_path / "run")
    assert [trial["state"] for trial in first["trials"]] == ["complete"] * 2
    assert first["metric"] == "TopOneAccuracy(num_classes=10)"
    assert main([*arguments, "search.trials=3"]) == 0
    second = summary_of(tmp_path / "run")
    assert [trial["latency_us"] for trial in second["trials"][:2]] == [trial["latency_us"] for trial in first["trials"]]
    assert len(second["trials"]) == 3
    assert second["recipe"] == "qat_search"
    schedules = {name: knobs for trial in second["trials"] for name, knobs in trial["schedules"].items()}
    assert schedules  # best known ones, or those of the trial


def test_solar_cells(tmp_path: Path) -> None:
    small_elpv(tmp_path / "cells", 64)
    arguments = ["recipe=solar_cells", *SMALLEST, *SMALLEST_OF["solar_cells"], f"data.root={tmp_path}/cells"]
    assert main([*arguments, f"run_dir={tmp_path}/run"]) == 0
    assert (tmp_path / "run" / "mistakes.png").is_file()
    found = summary_of(tmp_path / "run")
    assert (found["dataset"], found["recipe"]) == ("elpv", "solar_cells")


def test_tune_and_its_resumption(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["recipe=tune", *SMALLEST_OF["tune"], f"run_dir={tmp_path}/run"]

    def tuning(*more: str) -> dict[str, Any]:
        assert main([*arguments, *more]) == 0
        return json.loads((tmp_path / "run" / "tuning.json").read_text())

    begun = tuning("budget_s=0")
    assert (begun["measured"], begun["complete"]) == (0, False)
    assert "the same command goes on" in capfd.readouterr().out
    first = tuning()
    output = capfd.readouterr()
    assert "0 of them gave wrong results" in output.out
    assert "GMAC/s" in output.err
    assert (first["measured"], first["complete"]) == (sum(k["known"] for k in first["kernels"]), True)
    assert sorted(layer for kernel in first["kernels"] for layer in kernel["layers"]) == [
        "conv1.0", "conv2.0", "fc", "stem.0",
    ]  # fmt: skip
    assert all(kernel["best_us"] <= kernel["default_us"] and not kernel["inexact"] for kernel in first["kernels"])
    assert first["default_us"] >= first["best_us"] > 0
    second = tuning()
    assert second["measured"] == 0
    assert [k["best_us"] for k in second["kernels"]] == [k["best_us"] for k in first["kernels"]]


@pytest.mark.parametrize(
    ("option", "wanted"),
    [
        ("candidates=0", "candidates=0"),
        ("image_size=1.5", "image_size=1.5"),
        ("budget_s=-1", "budget_s=-1"),
        ("bits.weight=9", "9"),
        ("deploy.target=nothing", "unknown target 'nothing'"),
        ("deploy.bits.linear.weight=[32]", "(linear) has weights of [32] bit, not [8]"),
        ("deploy.threads=4096", "threads"),
    ],
)
def test_wrong_options_of_tune(option: str, wanted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe=tune", *SMALLEST_OF["tune"], option, f"run_dir={tmp_path}/run"]) == 1
    assert wanted in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "group", "name"),
    [(recipe, group, name) for recipe, group in (("hawq", "sensitivity"), ("learned_bits", "pressure"))
     for name in recipe_groups()[group]],
)  # fmt: skip
def test_groups_have_the_defaults_of_their_classes(recipe: str, group: str, name: str) -> None:
    made = flows.make(compose([f"recipe={recipe}", f"{group}={name}"])[group])
    assert made == type(made)()


@pytest.mark.parametrize("name", recipe_groups()["strategy"])
def test_strategies_have_the_defaults_of_their_classes(name: str) -> None:
    cfg = compose(["recipe=tune", f"strategy={name}", "seed=7"])
    strategy = flows.make(cfg.strategy)
    assert strategy.seed == 7
    for key, value in vars(type(strategy)(seed=7)).items():
        if not key.startswith("_"):
            written = getattr(strategy, key)
            assert (tuple(written) if isinstance(written, list) else written) == value, key


def test_tune_says_that_an_image_is_too_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe=tune", "model.name=alexnet", "image_size=16", f"run_dir={tmp_path}/run"]) == 1
    assert "does not run on images (4, 3, 16, 16)" in capsys.readouterr().err


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb"))
    run = ["logger=wandb", "logger.offline=true", f"run_dir={tmp_path}/run"]
    assert main(["recipe=qat", *SMALLEST, *SMALLEST_OF["qat"], *run]) == 0
    import wandb

    wandb.finish()
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))


@pytest.mark.parametrize("command", [[sys.executable, str(ROOT / "train.py")], ["lightning-baqe"]])
def test_from_any_working_directory(command: list[str], tmp_path: Path) -> None:
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [*command, "recipe=qat_serch"],
        cwd=tmp_path,
        env={**os.environ, "PATH": search},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 2, done.stderr
    assert "did you mean 'qat_search'" in done.stderr
    assert list(tmp_path.iterdir()) == []
