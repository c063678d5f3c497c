"""ONNX models in ONNX Runtime and OpenVINO."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper

from lightning_baqe.hardware.target import VNNI_PATHS, can_run

MODES = ("plain", "default", "exact")
# Without VNNI, ONNX Runtime's default mode adds pairs of products of two signed tensors in 16 bits, which saturate.
SIGNED_MODES = MODES if any(map(can_run, VNNI_PATHS)) else ("plain", "exact")


def session(path: Path, mode: str = "exact") -> onnxruntime.InferenceSession:
    """ONNX Runtime on the CPU: ``plain`` runs the operators as written, ``exact`` forbids saturating sums."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if mode == "plain":
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if mode == "exact":
        options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(path: Path, x: torch.Tensor, mode: str = "exact") -> torch.Tensor:
    return torch.from_numpy(session(path, mode).run(["logits"], {"input": x.numpy()})[0])


def run_openvino(path: Path, x: torch.Tensor) -> torch.Tensor:
    openvino = pytest.importorskip("openvino", reason="OpenVINO is in the dependency group bench")
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    return torch.from_numpy(openvino.Core().compile_model(path, "CPU", options)([x.numpy()])[0])


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.cosine_similarity(a.flatten().double(), b.flatten().double(), 0))


def initializers(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def properties(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def run_all(path: Path, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The real values of every node by its name, operators run as written."""
    model = onnx.load(path)
    outputs = [node.output[0] for node in model.graph.node if node.output[0] != "logits"]
    model.graph.output.extend(helper.make_tensor_value_info(name, onnx.TensorProto.UNDEFINED, None) for name in outputs)
    inferred = path.with_suffix(".all.onnx")
    for value in model.graph.output[1:]:
        value.ClearField("type")
    onnx.save(model, inferred)
    names = [node.name for node in model.graph.node if node.output[0] != "logits"]
    results = session(inferred, "plain").run(outputs, {"input": x.numpy()})
    return {name: torch.from_numpy(result) for name, result in zip(names, results, strict=True)}
