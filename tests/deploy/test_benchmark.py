"""The benchmark's arithmetic, its bookkeeping and its engines' processes; the benchmark itself takes minutes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_graphs import Maker, compiled
from torch import nn

from lightning_baqe.benchmarks import deploy, engine_runs, engines
from lightning_baqe.benchmarks.engine_inputs import EngineRequest
from lightning_baqe.benchmarks.engine_runs import EngineResult, ModelRun, RunOptions
from lightning_baqe.benchmarks.layers import kernel_table
from lightning_baqe.benchmarks.networks import default_size, library_of
from lightning_baqe.deploy.peak import peak_gmacs
from lightning_baqe.deploy.target import can_run, get_target
from lightning_baqe.errors import ConfigError, MeasurementError
from lightning_baqe.quantization.config import BitConfig, LayerBits


def test_rows_compare_like_with_like() -> None:
    results = [
        EngineResult("ours-w8a8", 1, [8.0, 10.0, 9.0], {"macs": 1}, [6.0, 7.0, 6.3]),
        EngineResult("openvino-int8", 1, [10.0, 10.0, 10.0]),
        EngineResult("onnxruntime-int8", 1, [6.0, 6.0, 6.0]),
        EngineResult("onnxruntime-int8-exact", 1, [3.0, 3.0, 3.0]),
        EngineResult("openvino-fp32", 1, [3.0, 3.0, 3.0]),
        EngineResult("ours-w8a8", 2, [5.0, 5.0, 5.0], {"macs": 1}, [3.0, 3.0, 3.0]),
        EngineResult("openvino-int8", 2, [4.0, 4.0, 4.0]),
    ]
    ours, vino, ort, exact, flt, two, vino_two = deploy.summarize(results)
    assert ours["best_peer"] == vino["best_peer"] == exact["best_peer"] == "onnxruntime-int8"
    assert ours["ratio_to_best_peer"] == pytest.approx(1.5)
    assert ours["ratio_range"] == pytest.approx([8 / 6, 10 / 6])
    assert ours["floor_share"] == pytest.approx(0.7)
    assert ort["ratio_to_best_peer"] == flt["ratio_to_best_peer"] == 1.0
    assert exact["ratio_to_best_peer"] == 0.5
    assert vino["floor_share"] is None
    assert (two["best_peer"], two["ratio_to_best_peer"]) == ("openvino-int8", 1.25)
    assert (ours["speedup"], two["speedup"], vino_two["speedup"]) == pytest.approx((1.0, 1.8, 2.5))


def test_missing_peers_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert engines.missing_packages("openvino-int8") == ["openvino", "nncf"]
    assert engines.missing_packages("inductor-int8") == ["torchao"]
    assert engines.missing_packages("ours-fp32") == engines.missing_packages("inductor-fp32") == []
    monkeypatch.setattr(deploy, "run_model", lambda *arguments: ModelRun(64))
    deploy.main(["--engines", "onnxruntime-fp32", "--models", "resnet18"])
    assert "uv sync --group bench" in capsys.readouterr().out


def test_a_peer_that_dies_is_left_out_and_one_of_ours_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(request: EngineRequest, cores: list[int]) -> list[str]:
        return [sys.executable, "-c", "raise SystemExit('no C++ compiler here')"]

    monkeypatch.setattr(engine_runs, "command", dies)
    monkeypatch.setattr(engine_runs, "random_network", lambda name, size: nn.Sequential(nn.Flatten()))
    monkeypatch.setattr(engine_runs, "export_onnx", lambda network, path, size: None)
    run = engine_runs.run_model("resnet18", RunOptions(("inductor-fp32",), rounds=1, size=8))
    assert run.results == []
    assert run.left_out["inductor-fp32"].endswith("no C++ compiler here")
    with pytest.raises(MeasurementError, match=r"ours-w8a8 died: no C\+\+ compiler here"):
        engine_runs.run_model("resnet18", RunOptions(("ours-w8a8",), rounds=1, size=8))


def test_an_interrupted_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[str] = []

    def run_model(model: str, options: RunOptions, report: Any) -> ModelRun:
        if model == "resnet50" and len(measured) == 1:
            raise KeyboardInterrupt
        measured.append(model)
        return ModelRun(64, [EngineResult("ours-w8a8", 1, [float(len(measured))], {}, [1.0], 0.99)])

    monkeypatch.setattr(deploy, "run_model", run_model)
    file = tmp_path / "figures.json"
    command = ["--engines", "ours-w8a8", "--rounds", "1", "--json", str(file), "--models", "resnet18", "resnet50"]
    with pytest.raises(KeyboardInterrupt):
        deploy.main(command)
    measured.append("interrupted")
    deploy.main(command)
    assert measured == ["resnet18", "interrupted", "resnet50"]
    figures = json.loads(file.read_text())["models"]
    assert [figures[name]["rows"][0]["latency_us"] for name in ("resnet18", "resnet50")] == [1.0, 3.0]
    with pytest.raises(SystemExit):
        deploy.main([*command, "--rounds", "2"])
    assert "another run's figures" in capsys.readouterr().err


def test_engine_names() -> None:
    assert engines.engine_name("ours-w7a8") == "ours-w7a8"
    for wrong in ("ours-w9a8", "ours-w8", "openvino", "ours-w32a32"):
        with pytest.raises(ConfigError, match="ours-wXaY"):
            engines.engine_name(wrong)


def test_bits_of_our_engines(tmp_path: Path) -> None:
    module = nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(5)))
    assert engines.bit_config("ours-w7a3", module) == BitConfig.uniform(module, weight=7, activation=3)
    assert engines.bit_config("ours-w7a3", module)["2"] == LayerBits(7, 3)
    assert [(b.weight, b.activation) for b in engines.bit_config("ours-mixed", module).values()] == [
        (8, 8), (4, 4), (8, 8), (4, 4), (8, 8),
    ]  # fmt: skip
    file = tmp_path / "bits.json"
    given = BitConfig.uniform(module, weight=5, activation=6)
    file.write_text(given.to_json())
    assert engines.bit_config("ours-mixed", module, str(file)) == given


def test_agreement_ignores_what_all_images_have_in_common() -> None:
    rng = np.random.default_rng(0)
    reference, common = rng.standard_normal((4, 50)), 1e3 * rng.standard_normal(50)
    assert engines.agreement(2 * reference + common, reference) == pytest.approx(1.0)
    assert engines.agreement(-reference, reference) == pytest.approx(-1.0)
    assert abs(engines.agreement(rng.standard_normal((4, 50)) + common, reference + common)) < 0.5


def test_names_and_sizes_of_networks() -> None:
    assert (library_of("resnet18"), library_of("mobilenetv2_100")) == ("torchvision", "timm")
    assert [default_size(name) for name in ("resnet18", "mobilenetv2_100", "inception_v3")] == [224, 224, 299]


@pytest.mark.parametrize(("path", "dot", "chain"), [("vnni512", "vnni", 1), ("avx2", "madd16", 1), ("avx2", "fma", 1)])
def test_peaks_are_plausible(path: str, dot: str, chain: int) -> None:
    if not can_run(path):
        pytest.skip(f"this CPU does not run {path} code")
    assert 1.0 < peak_gmacs(get_target(path), dot, chain, seconds=0.02) < 5000


def test_every_kernel_has_a_row() -> None:
    maker = Maker(16, 8)
    maker.conv(maker.conv(out=16, groups=16, padding=1), out=32, padding=1, limits=None)
    graph = maker.graph()
    artifact = compiled(graph, get_target())
    rows = kernel_table(artifact.plan)
    assert [row["nodes"][-1] for row in rows] == [call.result for call in artifact.plan.calls]
    assert sum(row["macs"] for row in rows) == graph.macs
    assert all(row["latency_us"] > 0 for row in rows)
