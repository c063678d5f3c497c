"""The search in plain Trainers and somebody else's module."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import pytorch_lightning as pl
import torch
import yaml
from fake_device import FakeDevice
from foreign_module import ForeignModule, random_loader
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_baqe as baqe
import lightning_baqe.recipes
from lightning_baqe.callbacks import BayesianSearch
from lightning_baqe.data import DigitsDataModule
from lightning_baqe.errors import BaqeError, ConfigError, InfeasibleError, MeasurementError
from lightning_baqe.hardware.description import DeviceDescription
from lightning_baqe.measurement.device import Kernel
from lightning_baqe.runs.study import SearchStudy

Make = Callable[..., Any]
FILES = ("study.db", "summary.json", "pareto.csv", "report.html")


def summary_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def test_a_search_in_a_foreign_module(tmp_path: Path, foreign: Make, search: Make, fit: Make, digits: Any) -> None:
    module = foreign()
    before = {name: value.clone() for name, value in module.body.classifier.state_dict().items()}
    kind = type(module.body.classifier)
    fit(module, search(), digits)

    assert type(module.body.classifier) is kind
    for name, value in module.body.classifier.state_dict().items():
        assert torch.equal(value, before[name])

    folder = tmp_path / "run"
    assert all((folder / name).exists() for name in FILES)
    summary = summary_of(folder)
    assert summary["dataset"] == "digits"
    assert summary["reference_point"] == [1.0, 1.5, 1.1]
    assert [e["state"] for e in summary["trials"]] == ["complete"] * 3
    assert [e["phase"] for e in summary["trials"]] == ["ted", "ted", "bo"]
    assert [e["name"] for e in summary["baselines"]] == ["w8a8"]
    assert summary["hypervolume"] >= summary["baselines_hypervolume"] > 0
    for entry in summary["trials"] + summary["baselines"]:
        assert 0 <= entry["accuracy"] <= 1
        assert entry["latency_us"] > 0
        assert entry["differing_elements"] == 0
        assert set(entry["bits"]) == {"stem.0", "block.conv1", "block.conv2", "head"}
        assert entry["bits"]["stem.0"] == entry["bits"]["head"] == [8, 8]
        assert {"train", "build", "measure", "propose"} <= set(entry["seconds"])
        name = f"baseline_{entry['name']}" if "name" in entry else f"trial_{entry['number']}"
        assert (folder / "artifacts" / name).exists() == entry["pareto"]
        assert (entry.get("test_accuracy") is not None) == entry["pareto"]
    assert summary["float"]["test_accuracy"] > 0.5  # a trained network, not chance

    # Every trial had its own parameters, and the optimiser saw them.
    assert len(module.installed) == 1 + 4
    assert all(not (a & b) for a, b in zip(module.installed, module.installed[1:], strict=False))

    front = baqe.Front.load(folder)
    artifact = front.select(accuracy=0.1)
    x, _ = next(iter(digits.val_dataloader()))
    assert not any(baqe.verify(artifact, x).values())
    torch.testing.assert_close(artifact.run(x), artifact.graph.run(x), rtol=1e-3, atol=1e-3)
    with pytest.raises(InfeasibleError, match="latency"):
        front.select(latency_us=1e-3)


def test_deployed_accuracy_is_that_of_the_artifact(
    tmp_path: Path, foreign: Make, search: Make, fit: Make, digits: Any
) -> None:
    fit(foreign(), search(trials=1, n_initial=1), digits)
    point = next(iter(baqe.Front.load(tmp_path / "run")))
    artifact = baqe.Artifact.load(point.artifact_path)
    right = total = 0
    for x, y in digits.val_dataloader():
        right += int((artifact.run(x).argmax(1) == y).sum())
        total += len(y)
    assert point.accuracy == right / total


def test_their_trainer_gets_its_limit_back(
    tmp_path: Path, foreign: Make, search: Make, fit: Make, made_up_device: FakeDevice
) -> None:
    limits = []

    def look(step: int) -> bool:
        limits.append(module.trainer.limit_train_batches)
        if step == 2:
            raise RuntimeError("theirs")
        return False

    options = {"measure_on": made_up_device, "trials": 1, "n_initial": 1}
    data = (random_loader(), random_loader())
    module = foreign(poison=look)
    fit(module, search(baselines=(), **options), data)
    assert module.trainer.limit_train_batches == 1.0
    module = foreign(poison=look)
    with pytest.raises(RuntimeError, match="theirs"):
        fit(module, search(run_dir=tmp_path / "other", **options), data)
    assert module.trainer.limit_train_batches == 1.0
    assert set(limits) == {2}


def test_a_summary_is_made_once_a_trial_and_artifacts_are_closed(
    monkeypatch: pytest.MonkeyPatch, foreign: Make, search: Make, fit: Make, digits: Any, made_up_device: FakeDevice
) -> None:
    calls: list[str] = []
    for kind, name in ((SearchStudy, "summary"), (baqe.Artifact, "load"), (baqe.Artifact, "close")):
        monkeypatch.setattr(kind, name, _counted(getattr(kind, name), name, calls))
    fit(foreign(), search(measure_on=made_up_device, trials=2), digits)
    made_at_start_and_end = 1 + 3  # before the test split, for it, and after it
    assert calls.count("summary") == made_at_start_and_end + 3  # a baseline and two trials
    assert 0 < calls.count("load") <= calls.count("close")


def _counted(function: Callable[..., Any], name: str, calls: list[str]) -> Callable[..., Any]:
    @functools.wraps(function)
    def counted(*args: Any, **options: Any) -> Any:
        calls.append(name)
        return function(*args, **options)

    return counted


def test_fast_dev_run_is_one_trial(tmp_path: Path, foreign: Make, search: Make, fit: Make, digits: Any) -> None:
    fit(foreign(), search(), digits, fast_dev_run=True, max_epochs=1)
    summary = summary_of(tmp_path / "run")
    assert [e["state"] for e in summary["trials"]] == ["complete"]


def test_a_device_that_fuses_no_sums(tmp_path: Path, foreign: Make, search: Make, fit: Make, digits: Any) -> None:
    mapping = yaml.safe_load((Path(lightning_baqe.recipes.__file__).parent / "deploy" / "native.yaml").read_text())
    device = DeviceDescription.of({**mapping, "fuses": ["requantization"]})
    fit(foreign(), search(device=device), digits, fast_dev_run=True, max_epochs=1)
    artifacts = [baqe.Artifact.load(folder) for folder in (tmp_path / "run" / "artifacts").iterdir()]
    assert artifacts
    for artifact in artifacts:
        assert not artifact.plan.options.fuse_residual
        assert all(getattr(call.spec, "residual", None) is None for call in artifact.plan.calls)


def test_every_network_gets_the_activation_range(foreign: Make, search: Make, fit: Make, digits: Any) -> None:
    trained: list[str] = []

    def look(step: int) -> bool:
        trained.extend(quantizer.range_method for quantizer in module.body.classifier.quantizers().values())
        return False

    module, callback = foreign(poison=look), search(activation_range="percentile:99", bit_choices=(4, 8))
    fit(module, callback, digits, fast_dev_run=True, max_epochs=1)
    assert trained
    context = callback.loop.context  # which makes those that are only measured, too
    others = context.quantized(baqe.BitConfig.uniform(context.network, 4, 4), 1).quantizers().values()
    assert {*trained, *(quantizer.range_method for quantizer in others)} == {"percentile:99"}


def test_loaders_without_a_datamodule(tmp_path: Path, foreign: Make, search: Make, fit: Make) -> None:
    fit(foreign(), search(trials=1, n_initial=1), (random_loader(), random_loader()))
    summary = summary_of(tmp_path / "run")
    assert summary["trials"][0]["state"] == "complete"
    assert summary["float"]["test_accuracy"] is None  # nobody gave a test split


def test_another_sampler(tmp_path: Path, foreign: Make, search: Make, fit: Make, digits: Any) -> None:
    fit(foreign(), search(sampler=optuna.samplers.TPESampler(seed=0), trials=2), digits)
    assert [e["phase"] for e in summary_of(tmp_path / "run")["trials"]] == ["TPESampler"] * 2


def test_the_same_run_dir_goes_on(tmp_path: Path, foreign: Make, search: Make, fit: Make, digits: Any) -> None:
    fit(foreign(), search(trials=2), digits)
    first = summary_of(tmp_path / "run")
    other = foreign()
    with torch.no_grad():  # other weights: the run keeps those that it began with
        other.body.classifier.head.weight.zero_()
    with pytest.warns(UserWarning, match="began with take the place"):
        fit(other, search(trials=4), digits)
    second = summary_of(tmp_path / "run")
    assert [e["number"] for e in second["trials"]] == [0, 1, 2, 3]
    assert second["baselines"][0]["latency_us"] == first["baselines"][0]["latency_us"]
    assert second["float"]["accuracy"] == first["float"]["accuracy"]
    for before, after in zip(first["trials"], second["trials"], strict=False):
        assert before["accuracy"] == after["accuracy"]
        assert before["bits"] == after["bits"]
    points = [json.dumps([e["bits"], e["schedules"]], sort_keys=True) for e in second["trials"]]
    assert len(set(points)) == 4

    fit(foreign(), search(trials=4), digits)  # nothing left to do
    assert summary_of(tmp_path / "run")["trials"] == second["trials"]


def test_a_nan_loss_fails_one_trial_only(tmp_path: Path, foreign: Make, search: Make, fit: Make, digits: Any) -> None:
    # Steps 0 and 1 tune the baseline, 2 and 3 the first trial.
    fit(foreign(poison=lambda step: step == 3), search(trials=2), digits)
    trials = summary_of(tmp_path / "run")["trials"]
    assert [e["state"] for e in trials] == ["failed", "complete", "complete"]
    assert "the loss became nan at step 1" in trials[0]["error"]
    assert trials[0]["accuracy"] is None


class Flaky(FakeDevice):
    """Fails at the third network: float, baseline, first trial (where its bits differ from the baseline's)."""

    why = "gave no answer within 60 s"

    def network_us(self, artifact: baqe.Artifact) -> float:
        if len(self.networks) == 3:
            raise MeasurementError(self.why)
        return super().network_us(artifact)


class Starved(Flaky):
    why = "the process ended with 1: OSError: [Errno 28] No space left on device"


def test_measuring_that_fails_is_recorded(tmp_path: Path, foreign: Make, search: Make, fit: Make, digits: Any) -> None:
    fit(foreign(), search(trials=1, bit_choices=(4,), measure_on=Flaky(tmp_path / "records.db")), digits)
    trials = summary_of(tmp_path / "run")["trials"]
    assert [e["state"] for e in trials] == ["failed", "complete"]
    assert trials[0]["error"] == "MeasurementError: gave no answer within 60 s"


def test_a_full_disk_is_no_trials_failure(tmp_path: Path, foreign: Make, search: Make, fit: Make, digits: Any) -> None:
    with pytest.raises(MeasurementError, match="No space left"):
        fit(foreign(), search(trials=2, bit_choices=(4,), measure_on=Starved(tmp_path / "records.db")), digits)
    assert [e["state"] for e in summary_of(tmp_path / "run")["trials"]] == ["running"]
    fit(foreign(), search(trials=2, bit_choices=(4,), measure_on=FakeDevice(tmp_path / "records.db")), digits)
    trials = summary_of(tmp_path / "run")["trials"]
    assert [e["state"] for e in trials] == ["failed", "complete", "complete"]
    assert trials[0]["error"] == "interrupted: the process ended in the middle of this trial"


@pytest.mark.parametrize("mode", ["paper", "beyond"])
def test_another_device(
    mode: str, tmp_path: Path, foreign: Make, search: Make, fit: Make, digits: Any, made_up_device: FakeDevice
) -> None:
    """A whole search, its tuning and its tests included, on a device that is not this process."""
    options = {"mode": mode, "bit_choices": (4, 8), "tune_s": 60.0}
    fit(foreign(), search(measure_on=made_up_device, **options), digits)
    summary = summary_of(tmp_path / "run")
    assert summary["device"]["cpu"] == "made up"
    assert [e["state"] for e in summary["trials"]] == ["complete"] * 3
    for entry in [summary["float"], *summary["baselines"], *summary["trials"]]:
        assert entry["latency_us"] == entry["size_bytes"] / 10
    assert summary["float"]["test_accuracy"] > 0.5
    assert made_up_device.kernels
    with made_up_device.records.reading() as connection:
        devices = connection.execute("SELECT DISTINCT json_extract(info, '$.cpu') FROM devices").fetchall()
    assert devices == [("made up",)]
    asked = len(made_up_device.kernels), len(made_up_device.networks)
    fit(foreign(), search(measure_on=made_up_device, **options), digits)
    assert (len(made_up_device.kernels), len(made_up_device.networks)) == asked
    with pytest.raises(ConfigError, match="begun with device ="):  # the figures of two devices do not compare
        fit(foreign(), search(**options), digits)


def test_a_device_keeps_its_own_records(made_up_device: FakeDevice) -> None:
    with pytest.raises(ConfigError, match=r"records='other\.db', but measure_on keeps its own"):
        BayesianSearch(measure_on=made_up_device, records="other.db")


def test_gives_up_after_max_failures(tmp_path: Path, foreign: Make, search: Make, fit: Make, digits: Any) -> None:
    fit(foreign(poison=lambda step: step >= 2), search(trials=5, max_failures=2), digits)
    summary = summary_of(tmp_path / "run")
    assert [e["state"] for e in summary["trials"]] == ["failed", "failed"]
    assert summary["baselines"][0]["state"] == "complete"  # the front found so far is there
    assert len(baqe.Front.load(tmp_path / "run")) == 1


def test_an_error_in_their_code_leaves_a_summary(
    tmp_path: Path, foreign: Make, search: Make, fit: Make, digits: Any
) -> None:
    def crash(step: int) -> bool:
        if step == 5:
            raise RuntimeError("theirs")
        return False

    with pytest.raises(RuntimeError, match="theirs"):
        fit(foreign(poison=crash), search(), digits)
    summary = summary_of(tmp_path / "run")
    assert [e["state"] for e in summary["trials"]] == ["complete", "running"]
    assert (tmp_path / "run" / "report.html").exists()

    fit(foreign(), search(), digits)  # the trial that was running is tried again
    trials = summary_of(tmp_path / "run")["trials"]
    assert [e["state"] for e in trials].count("complete") == 3
    assert trials[1]["error"].startswith("interrupted")
    assert trials[2]["bits"] == trials[1]["bits"] != {}


class Guarded(DigitsDataModule):
    """Gives its test split away only after two trials."""

    run_dir: Path

    def test_dataloader(self) -> Any:
        trials = summary_of(self.run_dir)["trials"]
        assert [e["state"] for e in trials] == ["complete"] * 2
        return super().test_dataloader()


def test_the_test_split_is_read_at_the_end_only(
    tmp_path: Path, foreign: Make, search: Make, fit: Make, made_up_device: FakeDevice
) -> None:
    data = Guarded(batch_size=32)
    data.run_dir = tmp_path / "run"
    fit(foreign(), search(trials=2, measure_on=made_up_device), data)
    assert summary_of(tmp_path / "run")["float"]["test_accuracy"] is not None


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"network": "body.nothing"}, "has no 'body.nothing'.*it has \\['body'\\]"),
        ({"network": "poison"}, "must name the attribute"),
        ({"trials": 0}, "trials must be at least 1, got 0"),
        ({"bit_choices": (1, 8)}, "bit_choices are 2..8 or 32"),
        ({"baselines": (8, 8)}, "each once; got"),
        ({"activation_range": "widest"}, "activation_range must be one of"),
        ({"target": "z80"}, "unknown target 'z80'"),
    ],
)
def test_bad_arguments(
    options: dict[str, Any], match: str, foreign: Make, search: Make, fit: Make, digits: Any
) -> None:
    with pytest.raises(BaqeError, match=match):
        fit(foreign(), search(**options), digits)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_needs_a_validation_loader(foreign: Make, search: Make, fit: Make) -> None:
    with pytest.raises(ConfigError, match="val_dataloader"):
        fit(foreign(), search(), (random_loader(),))


def test_batches_are_pairs(foreign: Make, search: Make, fit: Make) -> None:
    images = DataLoader(TensorDataset(torch.randn(8, 3, 32, 32)), batch_size=8)
    with pytest.raises(ConfigError, match=r"validation loader gives a list of \(float32 .*batches \(x, y\)"):
        fit(foreign(), search(), (random_loader(), images))


class OfDicts(ForeignModule):
    """Whose loaders give what those of Hugging Face do."""

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return super().training_step((batch["pixel_values"], batch["labels"]), index)

    def validation_step(self, batch: Any, index: int) -> None:
        super().validation_step((batch["pixel_values"], batch["labels"]), index)


def test_batches_may_be_dicts(tmp_path: Path, search: Make, fit: Make, made_up_device: FakeDevice) -> None:
    x, y = random_loader().dataset.tensors
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(x, y, strict=True)]
    loader = DataLoader(rows, batch_size=32)
    fit(OfDicts(), search(measure_on=made_up_device, trials=1, n_initial=1), (loader, loader))
    assert [e["state"] for e in summary_of(tmp_path / "run")["trials"]] == ["complete"]


class Normalising(ForeignModule):
    """Bytes are scaled on their way to the device, and turned in training alone."""

    def on_after_batch_transfer(self, batch: Any, index: int) -> Any:
        x, y = batch
        x = x.float() / 255
        assert self.training == self.trainer.training
        return (x.flip(-1) if self.trainer.training else x), y


def test_batches_are_what_the_hooks_make_of_them(search: Make, fit: Make, made_up_device: FakeDevice) -> None:
    images = torch.randint(0, 256, (64, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    loader = DataLoader(TensorDataset(images, torch.arange(64) % 10), batch_size=32)
    callback, module = search(measure_on=made_up_device, trials=1, n_initial=1), Normalising()
    fit(module, callback, (loader, loader))
    context = callback.loop.context
    assert torch.equal(context.calibration[0], images[:32].flip(-1) / 255)
    modes = {name: part.training for name, part in module.named_modules()}
    assert torch.equal(torch.cat([x for x, _ in context.validation]), images / 255)
    assert {name: part.training for name, part in module.named_modules()} == modes


class TestRefusedBeforeTraining:
    """Each within a moment, with no step of training."""

    @staticmethod
    def refused(match: str, foreign: Make, search: BayesianSearch, options: dict[str, Any], *more: pl.Callback) -> None:
        def never(step: int) -> bool:
            raise AssertionError("trained")

        module, plain = foreign(poison=never), {"logger": False, "accelerator": "cpu", "max_epochs": -1}
        trainer = pl.Trainer(**{**plain, **options}, callbacks=[search, *more], enable_checkpointing=False)
        with pytest.raises(BaqeError, match=match):
            trainer.fit(module, random_loader(), random_loader())

    @pytest.mark.parametrize(
        ("spoil", "advice"),
        [
            (lambda conv: nn.utils.prune.l1_unstructured(conv, "weight", 0.3), r"prune\.remove"),
            (lambda conv: nn.utils.weight_norm(conv), "remove_weight_norm"),
            (lambda conv: nn.utils.spectral_norm(conv), "remove_spectral_norm"),
            (lambda conv: nn.utils.parametrizations.weight_norm(conv), "remove_parametrizations"),
        ],
    )
    @pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
    def test_weights_that_change_at_each_call(
        self, spoil: Callable[[nn.Module], Any], advice: str, foreign: Make, search: Make
    ) -> None:
        def spoilt(**more: Any) -> pl.LightningModule:
            module = foreign(**more)
            spoil(next(layer for layer in module.modules() if isinstance(layer, nn.Conv2d)))
            return module

        self.refused(advice, spoilt, search(), {})

    @pytest.mark.filterwarnings("ignore:.*UninitializedParameter")
    @pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
    def test_lazy_layers(self, foreign: Make, search: Make) -> None:
        def lazy(**more: Any) -> pl.LightningModule:
            module = foreign(**more)
            module.network = nn.Sequential(nn.LazyConv2d(4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
            return module

        self.refused("is not initialised: a lazy module", lazy, search(network="network"), {})

    @pytest.mark.parametrize(
        ("callback", "advice"),
        [
            (lambda: pl.callbacks.EMAWeightAveraging(), "in a fit of the float network before the search"),
            (lambda: pl.callbacks.WeightAveraging(), "in a fit of the float network before the search"),
            (lambda: pl.callbacks.StochasticWeightAveraging(1e-2), "in a fit of the float network before the search"),
            (lambda: pl.callbacks.BackboneFinetuning(), "fine-tune before the search"),
            (lambda: pl.callbacks.ModelPruning("l1_unstructured", amount=0.5), "prune before the search"),
            (lambda: pl.callbacks.EarlyStopping("val/loss"), "prune=True"),
        ],
    )
    def test_callbacks_that_hold_on(self, callback: Make, advice: str, foreign: Make, search: Make) -> None:
        other = callback()
        self.refused(f"{type(other).__name__} stands beside BayesianSearch.*{advice}", foreign, search(), {}, other)

    def test_another_search(self, foreign: Make, search: Make) -> None:
        self.refused("several BayesianSearch", foreign, search(), {}, search(network="body"))

    @pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
    def test_weights_of_another_type(self, precision: str, foreign: Make, search: Make) -> None:
        self.refused(rf"precision='{precision}'.*or 'bf16-mixed'", foreign, search(), {"precision": precision})

    def test_a_network_of_another_type(self, foreign: Make, search: Make) -> None:
        self.refused(r"is bfloat16.*call \.float\(\)", lambda **more: foreign(**more).bfloat16(), search(), {})

    def test_run_folders(self, tmp_path: Path, foreign: Make, search: Make) -> None:
        (tmp_path / "file").write_text("x")
        for folder in (tmp_path / "file", tmp_path / "file" / "deeper", Path("/proc/none")):
            message = rf"run_dir={folder} cannot be made or written.*give another run_dir"
            self.refused(message, foreign, search(run_dir=folder), {})

    def test_what_is_no_study(self, tmp_path: Path, foreign: Make, search: Make) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "study.db").write_text("this is no database " * 100)
        self.refused(r"study\.db cannot be opened.*another run_dir or storage", foreign, search(), {})
        storage = f"sqlite:///{tmp_path}/none/study.db"
        self.refused("cannot be opened.*another run_dir or storage", foreign, search(storage=storage), {})

    def test_records(self, foreign: Make, search: Make) -> None:
        self.refused("records=/proc/none cannot be made", foreign, search(records="/proc/none/records.db"), {})


def test_another_space_or_network_in_the_same_folder(foreign: Make, search: Make, fit: Make, digits: Any) -> None:
    fit(foreign(), search(trials=1, n_initial=1), digits)
    with pytest.raises(ConfigError, match="begun with bit_choices = \\[4, 8, 32\\], now it is \\[4, 8\\]"):
        fit(foreign(), search(bit_choices=(4, 8)), digits)
    with pytest.raises(ConfigError, match="begun with activation_range = 'mse', now it is 'ema'"):
        fit(foreign(), search(activation_range="ema"), digits)
    module = foreign()
    module.body.classifier.head = torch.nn.Linear(16, 7)
    with pytest.raises(ConfigError, match="float weights of another network"):
        fit(module, search(), digits)


class Pairwise(FakeDevice):
    """Twice as fast where sums of two products fit into 16 bits."""

    def kernel_us(self, kernel: Kernel) -> float:
        sums = getattr(kernel.spec, "dot", None) == "maddubs" and kernel.knobs["intrinsic"] == "on"
        return 1.0 if sums else 2.0


def test_auto_bits_are_what_the_device_rewards(
    tmp_path: Path, foreign: Make, search: Make, fit: Make, digits: Any
) -> None:
    device = Pairwise(tmp_path / "records.db")
    options = {"trials": 1, "n_initial": 1, "baselines": (), "target": "avx2", "tune_s": 60.0, "measure_on": device}
    fit(foreign(), search(mode="beyond", **options), digits)
    summary = summary_of(tmp_path / "run")
    assert {bits for trial in summary["trials"] for bits, _ in trial["bits"].values()} <= {4, 7, 8}
    assert summary["rewards"]["widths"]["4"]["speedup"] == 2.0
    assert "4 bit buys 2.00x the speed" in summary["rewards"]["line"]
    fit(foreign(), search(run_dir=tmp_path / "paper", **options), digits)
    widths = summary_of(tmp_path / "paper")["rewards"]["widths"]
    assert set(widths) == {"4", "8"}  # BAQE's 4, 8 and 32


def test_auto_bits_without_tuning(tmp_path: Path, foreign: Make, search: Make, fit: Make, digits: Any) -> None:
    options = {"mode": "beyond", "trials": 1, "n_initial": 1, "baselines": ()}
    with pytest.raises(ConfigError, match="tune first"):
        fit(foreign(), search(**options), digits)
    fit(foreign(), search(run_dir=tmp_path / "dev", **options), digits, fast_dev_run=True, max_epochs=1)
    assert [e["state"] for e in summary_of(tmp_path / "dev")["trials"]] == ["complete"]
