"""The benchmark's arithmetic; the benchmark itself takes minutes."""

from __future__ import annotations

import importlib.util

import pytest
from small_graphs import Maker, compiled

from lightning_baqe.benchmarks import deploy, engines
from lightning_baqe.benchmarks.layers import kernel_table
from lightning_baqe.benchmarks.peak import peak_gmacs
from lightning_baqe.deploy.target import can_run, get_target


def test_rows_compare_like_with_like() -> None:
    results = [
        deploy.EngineResult("ours-w8a8", [8.0, 10.0, 9.0], {"macs": 1}, [6.0, 7.0, 6.3]),
        deploy.EngineResult("openvino-int8", [10.0, 10.0, 10.0]),
        deploy.EngineResult("onnxruntime-int8", [6.0, 6.0, 6.0]),
        deploy.EngineResult("openvino-fp32", [3.0, 3.0, 3.0]),
    ]
    ours, vino, ort, flt = deploy.summarize(results)
    assert ours["best_peer"] == vino["best_peer"] == "onnxruntime-int8"
    assert ours["ratio_to_best_peer"] == pytest.approx(1.5)
    assert ours["ratio_range"] == pytest.approx([8 / 6, 10 / 6])
    assert ours["floor_share"] == pytest.approx(0.7)
    assert ort["ratio_to_best_peer"] == flt["ratio_to_best_peer"] == 1.0
    assert vino["floor_share"] is None


def test_missing_peers_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert engines.missing_packages("openvino-int8") == ["openvino", "nncf"]
    assert engines.missing_packages("ours-fp32") == []
    monkeypatch.setattr(deploy, "run_model", lambda *arguments: ([], []))
    deploy.main(["--engines", "onnxruntime-fp32"])
    assert "uv sync --group bench" in capsys.readouterr().out


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
