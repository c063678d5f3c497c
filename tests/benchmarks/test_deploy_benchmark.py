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

from lightning_baqe.benchmarks import deploy
from lightning_baqe.engines import engine_process as engines
from lightning_baqe.engines import engine_runs
from lightning_baqe.engines.engine_runs import EngineResult, ModelRun, RunOptions
from lightning_baqe.engines.layer_tables import (
    Layer,
    assign,
    kind_rows,
    layer_rows,
    median_rows,
    network_layers,
)
from lightning_baqe.engines.peers import onnxruntime_rows, onnxruntime_session
from lightning_baqe.engines.requests import EngineRequest
from lightning_baqe.engines.saturation import check_convolution, difference
from lightning_baqe.engines.zoo import default_size, export_onnx, library_of
from lightning_baqe.errors import ConfigError, MeasurementError
from lightning_baqe.hardware.target import can_run, get_target
from lightning_baqe.measurement.clock import WARM_UP
from lightning_baqe.measurement.peak import peak_gmacs
from lightning_baqe.measurement.profile import KernelProfile
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


def test_kernels_one_by_one_compute_the_network() -> None:
    maker = Maker(16, 8)
    maker.conv(maker.conv(maker.conv(out=16, groups=16, padding=1), out=16, padding=1), out=32, limits=None)
    graph = maker.graph()
    artifact = compiled(graph, get_target())
    kernels = KernelProfile(artifact.plan, graph.input_shape)
    for seed in range(2):  # the second finds buffers that the first has used
        image = np.random.default_rng(seed).standard_normal((1, *graph.input_shape), np.float32)
        assert np.array_equal(kernels.run(image).ravel(), artifact.run_array(image).ravel())
    rows = kernels.profile(image, 0.001)
    assert [row["names"][-1] for row in rows] == [call.result for call in artifact.plan.calls]
    assert all(row["us"] > 0 for row in rows)


def small_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU6(), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.Conv2d(8, 8, (1, 3)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    ).eval()  # fmt: skip


def test_onnxruntime_profile_is_matched_to_the_layers(tmp_path: Path) -> None:
    network, file = small_network(), tmp_path / "network.onnx"
    export_onnx(network, file, 16)
    layers = network_layers(network, file, 16)
    assert [(layer.name, layer.kind) for layer in layers] == [
        ("0", "stem"), ("3", "depthwise"), ("5", "1x1"), ("6", "3x3"), ("8", "other conv"), ("11", "linear"),
    ]  # fmt: skip
    assert [layer.macs for layer in layers] == [
        256 * 8 * 27, 64 * 8 * 9, 64 * 8 * 8, 36 * 8 * 8 * 9, 24 * 8 * 8 * 3, 40,
    ]  # fmt: skip
    session = onnxruntime_session(str(file), 1, exact=False, profile=str(tmp_path / "profile"))
    for _ in range(WARM_UP + 2):
        session.run(None, {"x": np.zeros((1, 3, 16, 16), np.float32)})
    rows = assign(onnxruntime_rows(json.loads(Path(session.end_profiling()).read_text())), layers)
    kinds = {row["op"]: row["kind"] for row in rows if row["layer"] is None}
    assert kinds["MaxPool"] == "pool"
    by_layer = layer_rows({"onnxruntime-fp32": rows}, layers)
    assert all(row["us"]["onnxruntime-fp32"] is not None for row in by_layer)
    by_kind = kind_rows({"onnxruntime-fp32": rows}, layers)
    assert by_kind[-1]["us"]["onnxruntime-fp32"] == pytest.approx(sum(row["us"] for row in rows))
    assert sum(r["us"]["onnxruntime-fp32"] for r in by_kind[:-1]) == pytest.approx(sum(row["us"] for row in rows))


def test_profiles_name_layers_in_several_ways() -> None:
    layers = [Layer("conv1", "stem", 10, {"/conv1/Conv", "/relu/Relu"}), Layer("conv10", "1x1", 5, {"/conv1/Conv_1"})]
    rows = [
        {"name": "quantize", "names": ["quantize"], "op": "Subgraph", "us": 1.0},
        {"name": "a", "names": ["a", "/relu/Relu/fq_output_0"], "op": "Convolution", "us": 4.0},
        {"name": "/conv1/Conv_acdb_", "names": ["/conv1/Conv_acdb_"], "op": "Reorder", "us": 2.0},
        {"name": "b", "names": ["/conv1/Conv_1/WithoutBiases"], "op": "Convolution", "us": 8.0},
        {"name": "c", "names": ["conv10"], "op": "conv", "us": 16.0},
        {"name": "d", "names": ["mean"], "op": "ReduceMean", "us": 32.0},
    ]
    assigned = assign(rows, layers)
    assert [row["layer"] for row in assigned] == [None, "conv1", None, "conv10", "conv10", None]
    assert [row["kind"] for row in assigned] == ["input", "stem", "rest", "1x1", "1x1", "pool"]
    assert [row["us"] for row in layer_rows({"e": assigned}, layers)] == [{"e": 4.0}, {"e": 24.0}]


def test_two_layers_that_share_a_kernel_keep_their_own_medians() -> None:
    bursts = [[{"name": "k", "us": first}, {"name": "k", "us": 10 * first}] for first in (3.0, 1.0, 2.0)]
    assert [row["us"] for row in median_rows(bursts)] == [2.0, 20.0]


def test_exact_mode_of_onnxruntime_computes_the_exact_convolution() -> None:
    def open_model(path: str) -> Any:
        session = onnxruntime_session(path, 1, exact=True)
        return lambda x: session.run(None, {"x": x})[0]

    row = check_convolution(open_model)
    assert row["differing"] == row["largest"] == 0
    assert row["elements"] == 4 * 64 * 16 * 16


def test_saturating_sums_of_pairs_are_found() -> None:
    import onnx
    from onnx import numpy_helper

    def open_model(path: str) -> Any:
        constants = {value.name: numpy_helper.to_array(value) for value in onnx.load(path).graph.initializer}
        weights = constants["w"][:, :, 0, 0].astype(np.int64)

        def run(x: np.ndarray) -> np.ndarray:  # vpmaddubsw: sums of two neighbouring channels' products in int16
            products = weights[:, :, None, None] * x[0].astype(np.int64)[None]
            pairs = np.clip(products[:, ::2] + products[:, 1::2], -(2**15), 2**15 - 1)
            step = float(constants["step"])
            return (np.clip(np.rint(pairs.sum(1) / step), -128, 127) * step)[None]

        return run

    row = check_convolution(open_model)
    assert 0.01 < row["differing"] / row["elements"] < 0.9


def test_differences_are_counted() -> None:
    row = difference("x", np.array([1.0, 2.0, -3.5, 4.0]), np.array([1.0, 2.0, -4.0, 4.0]))
    assert (row["elements"], row["differing"], row["largest"]) == (4, 1, 0.125)
