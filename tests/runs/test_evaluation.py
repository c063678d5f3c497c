"""Evaluation on the device: accuracy of the compiled network, and figures that noise cannot spoil for good."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_device import FakeDevice
from sklearn.metrics import jaccard_score
from torch import nn
from torchmetrics.classification import MulticlassJaccardIndex

import lightning_baqe as baqe
from lightning_baqe.errors import BuildError, ConfigError
from lightning_baqe.hardware.options import BuildOptions
from lightning_baqe.measurement.device import Measurement
from lightning_baqe.measurement.memory import give_back_memory
from lightning_baqe.runs.evaluation import (
    MeasureOptions,
    deployed_accuracy,
    evaluate,
    measure_quietly,
    module_accuracy,
    module_scorer,
)


@pytest.fixture
def quantized() -> baqe.QuantizedModel:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    x = torch.randn(8, 3, 12, 12)
    return baqe.calibrate(baqe.quantize(net.eval(), baqe.BitConfig.uniform(net, 8, 8), x), [x]).eval()


@pytest.fixture
def artifact(quantized: baqe.QuantizedModel, tmp_path: Path) -> Any:
    built = baqe.build(baqe.lower(quantized), schedules="default")
    built.save(tmp_path / "artifact")
    return built


class Answers(FakeDevice):
    """Gives prepared answers; nothing is measured where none is left."""

    answers: list[Measurement]

    def measure_artifact(self, *_: Any) -> Measurement:
        return self.answers.pop(0)


@pytest.fixture
def device(tmp_path: Path) -> Answers:
    return Answers(tmp_path / "records.db")


def fake(latency_us: float, spread: float, count: int = 50) -> Measurement:
    low, high = latency_us * (1 - spread / 2), latency_us * (1 + spread / 2)
    samples = [low] * (count // 2 - 1) + [latency_us] * 2 + [high] * (count // 2 - 1)
    return Measurement(latency_us, tuple(samples), {})


def test_the_quiet_figure_counts_and_is_kept(artifact: Any, tmp_path: Path, device: Answers) -> None:
    folder, options = tmp_path / "artifact", MeasureOptions()
    device.answers = [fake(200.0, 0.5), fake(100.0, 0.01)]
    assert measure_quietly(artifact, folder, options, device).latency_us == 100.0
    again = measure_quietly(artifact, folder, options, device)  # no answer is left: it must not measure
    assert again.cached
    assert again.latency_us == 100.0


def test_a_noisy_or_thin_record_is_measured_again(artifact: Any, tmp_path: Path, device: Answers) -> None:
    folder, options = tmp_path / "artifact", MeasureOptions(attempts=2)
    device.answers = [fake(200.0, 0.5), fake(150.0, 0.4)]
    assert measure_quietly(artifact, folder, options, device).latency_us == 150.0  # the less noisy of two
    device.answers = [fake(100.0, 0.0, count=10)]
    assert measure_quietly(artifact, folder, MeasureOptions(repeats=10), device).latency_us == 100.0
    device.answers = [fake(101.0, 0.0)]
    assert measure_quietly(artifact, folder, options, device).latency_us == 101.0  # 10 samples are fewer than 50
    assert device.answers == []


def test_evaluate_takes_all_figures(quantized: baqe.QuantizedModel, tmp_path: Path) -> None:
    x = torch.randn(20, 3, 12, 12)
    y = baqe.lower(quantized).run(x).argmax(1)
    y[:5] = (y[:5] + 1) % 5
    options = MeasureOptions(repeats=5, warmup=1, attempts=1)
    found = evaluate(
        quantized, [(x[:10], y[:10]), (x[10:], y[10:])], tmp_path / "a", BuildOptions(), "default", options=options
    )
    assert found.accuracy == 15 / 20
    assert found.latency_us > 0
    assert found.size_bytes == baqe.lower(quantized).size_bytes
    assert set(found.seconds) == {"build", "evaluate", "measure"}
    artifact = baqe.Artifact.load(tmp_path / "a")
    assert not any(baqe.verify(artifact, x).values())
    assert torch.equal(artifact.run(x).argmax(1), baqe.lower(quantized).run(x).argmax(1))


def test_pixels_of_a_compiled_network_are_counted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 1)).eval()
    x = torch.randn(8, 3, 6, 6)
    model = baqe.calibrate(baqe.quantize(net, baqe.BitConfig.uniform(net, 8, 8), x), [x]).eval()
    y = baqe.lower(model).run(x).argmax(1)
    y[:2] = (y[:2] + 1) % 4
    options, batches = MeasureOptions(repeats=5, warmup=1, attempts=1), [(x[:4], y[:4]), (x[4:], y[4:])]
    scorer = module_scorer(net, batches, torch.device("cpu"))
    assert scorer.name == "PixelAccuracy(num_classes=4)"
    found = evaluate(model, batches, tmp_path / "a", BuildOptions(), "default", options=options, scorer=scorer)
    assert found.accuracy == 6 / 8
    jaccard = module_scorer(net, batches, torch.device("cpu"), MulticlassJaccardIndex(num_classes=4))
    found_again = deployed_accuracy(baqe.Artifact.load(tmp_path / "a"), batches, scorer=jaccard)
    outputs = baqe.lower(model).run(x).argmax(1)
    assert found_again == pytest.approx(jaccard_score(y.flatten(), outputs.flatten(), average="macro"))


def test_modes_are_given_back(quantized: baqe.QuantizedModel) -> None:
    quantized.train()
    next(part for part in quantized.modules() if isinstance(part, nn.ReLU | nn.Linear)).eval()  # frozen by somebody
    before = {name: part.training for name, part in quantized.named_modules()}
    batches = [(torch.randn(4, 3, 12, 12), torch.arange(4))]
    assert 0 <= module_accuracy(quantized, batches, torch.device("cpu")) <= 1
    assert {name: part.training for name, part in quantized.named_modules()} == before


def test_accuracy_needs_images(artifact: Any) -> None:
    with pytest.raises(ConfigError, match="at least one image"):
        deployed_accuracy(artifact, [])


@pytest.mark.parametrize("options", [{"repeats": 0}, {"warmup": -1}, {"timeout_s": 0.0}, {"attempts": 0}])
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be positive"):
        MeasureOptions(**options)


def test_the_graph_of_any_version_can_be_read(artifact: Any, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 12, 12)
    assert torch.equal(baqe.Artifact.load_graph(tmp_path / "artifact").run(x), artifact.graph.run(x))
    (tmp_path / "artifact" / "tensors.npz").write_bytes(b"cut")
    with pytest.raises(BuildError, match="cannot be read"):
        baqe.Artifact.load_graph(tmp_path / "artifact")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps what was freed")
def test_freed_memory_goes_back_to_the_system() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    pieces = [bytearray(60_000) for _ in range(3000)]
    del pieces[:-1]  # the last one keeps the heap from shrinking
    before = resident()
    give_back_memory()
    assert resident() < before - 50_000_000
    assert len(pieces) == 1
