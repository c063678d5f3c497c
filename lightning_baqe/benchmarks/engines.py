"""Inference engines side by side: each prepares one network in a process of its own and runs bursts when asked.

An engine is a function from an :class:`EngineRequest` to a callable that takes one float32 image ``(1, 3, height,
width)`` and returns logits, with as little around the engine's own call as its API allows.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

Run = Callable[[np.ndarray], np.ndarray]
CALIBRATION_IMAGES = 8
PEER_PACKAGES = {"openvino": ("openvino", "nncf"), "onnxruntime": ("onnxruntime", "onnx")}


@dataclass(frozen=True)
class EngineRequest:
    """What an engine prepares.

    Args:
        engine: a key of :data:`ENGINES`.
        model: a torchvision name.
        weights: file with its state dict.
        onnx: the float network as ONNX.
        threads: of the inference.
        size: of the square input image.
    """

    engine: str
    model: str
    weights: str
    onnx: str
    threads: int
    size: int


def missing_packages(engine: str) -> list[str]:
    """Packages that an engine needs and that are not installed."""
    return [name for name in PEER_PACKAGES.get(engine.split("-")[0], ()) if importlib.util.find_spec(name) is None]


def random_network(name: str, size: int, seed: int = 0) -> Any:
    """A torchvision network with seeded random weights and batch-norm statistics of random images, in eval mode."""
    import torch
    import torchvision

    torch.manual_seed(seed)
    network = torchvision.models.get_model(name, weights=None)
    network.train()
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(4, 3, size, size))
    return network.eval()


def calibration_images(size: int) -> np.ndarray:
    """Seeded random images, float32 ``(n, 3, size, size)``."""
    shape = (CALIBRATION_IMAGES, 3, size, size)
    return np.random.default_rng(1).standard_normal(shape, np.float32)


def _torch_network(request: EngineRequest) -> Any:
    import torch
    import torchvision

    network = torchvision.models.get_model(request.model, weights=None)
    network.load_state_dict(torch.load(request.weights, weights_only=True))
    return network.eval()


def ours(request: EngineRequest, weight: int, activation: int) -> tuple[Run, dict[str, Any]]:
    """Quantized, lowered and built by this package with the best knobs in the user's records."""
    import torch

    import lightning_baqe as baqe
    from lightning_baqe.benchmarks.layers import kernel_table
    from lightning_baqe.deploy.conv_template import ConvSpec

    network = _torch_network(request)
    images = torch.from_numpy(calibration_images(request.size))
    bits = baqe.BitConfig.uniform(network, weight=weight, activation=activation)
    quantized = baqe.quantize(network, bits, example_input=images)
    if weight != 32:
        baqe.calibrate(quantized, [images])
    graph = baqe.lower(quantized, example_input=images[:1])
    artifact = baqe.build(graph, threads=request.threads)
    work: dict[tuple[str, int], int] = {}
    for call in artifact.plan.calls:
        if isinstance(call.spec, ConvSpec):
            arithmetic = (call.spec.dot, call.spec.chain)
            work[arithmetic] = work.get(arithmetic, 0) + call.spec.macs

    if weight != 32 and not torch.equal(artifact.run(images[:1]), graph.run(images[:1])):
        raise AssertionError("the compiled network differs from its integer graph")
    dot, chain = max(work, key=work.__getitem__)
    info = {"macs": graph.macs, "size_bytes": graph.size_bytes, "dot": dot, "chain": chain}
    return artifact.run_array, {**info, "layers": lambda: kernel_table(artifact.plan)}


def openvino(request: EngineRequest, integer: bool) -> tuple[Run, dict[str, Any]]:
    """OpenVINO; integers by NNCF's post-training quantization with its defaults."""
    import openvino as ov

    model = ov.convert_model(request.onnx)
    model.reshape([1, 3, request.size, request.size])
    options: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": request.threads,
        "NUM_STREAMS": 1,
    }
    if integer:
        import nncf

        images = [image[None] for image in calibration_images(request.size)]
        model = nncf.quantize(model, nncf.Dataset(images), subset_size=len(images))
    else:
        options["INFERENCE_PRECISION_HINT"] = "f32"  # the default is bf16 where the CPU has it
    inference = ov.Core().compile_model(model, "CPU", options).create_infer_request()
    image = np.zeros((1, 3, request.size, request.size), np.float32)
    inference.set_input_tensor(ov.Tensor(image, shared_memory=True))

    def run(x: np.ndarray) -> np.ndarray:
        np.copyto(image, x)
        inference.infer()
        return np.asarray(inference.get_output_tensor().data)

    return run, {}


def onnxruntime(request: EngineRequest, integer: bool, exact: bool = False) -> tuple[Run, dict[str, Any]]:
    """ONNX Runtime; integers by its static QDQ quantization, unsigned activations, signed weights by channel."""
    import onnxruntime as ort

    path = request.onnx
    if integer:
        path = str(Path(request.onnx).with_suffix(f".{request.engine}.onnx"))
        _quantize_onnx(request, path)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = request.threads, 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    if exact:  # no saturating int16 sums on CPUs without VNNI
        options.add_session_config_entry("session.x64quantprecision", "1")
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(x: np.ndarray) -> np.ndarray:
        return np.asarray(session.run(None, {name: x})[0])

    return run, {}


def _quantize_onnx(request: EngineRequest, path: str) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.images: Iterator[np.ndarray] = iter(calibration_images(request.size))

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.images, None)
            return None if image is None else {"x": image[None]}

    prepared = f"{path}.prepared.onnx"
    quant_pre_process(request.onnx, prepared)
    quantize_static(
        prepared, path, Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip


ENGINES: dict[str, Callable[[EngineRequest], tuple[Run, dict[str, Any]]]] = {
    "ours-w8a8": lambda request: ours(request, 8, 8),
    "ours-w4a8": lambda request: ours(request, 4, 8),
    "openvino-int8": lambda request: openvino(request, True),
    "onnxruntime-int8": lambda request: onnxruntime(request, True),
    "onnxruntime-int8-exact": lambda request: onnxruntime(request, True, exact=True),
    "ours-fp32": lambda request: ours(request, 32, 32),
    "openvino-fp32": lambda request: openvino(request, False),
    "onnxruntime-fp32": lambda request: onnxruntime(request, False),
}


def serve(request: EngineRequest, cores: list[int]) -> None:
    """Prepare, then answer requests, a JSON object a line: ``{"burst_s": t}`` with latencies, ``{"layers": true}``."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what engines print is not an answer
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    os.environ.update(OMP_NUM_THREADS=str(request.threads), TVM_NUM_THREADS=str(request.threads))
    run, info = ENGINES[request.engine](request)
    layers = info.pop("layers", None)
    image = calibration_images(request.size)[:1]

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    answer(info)
    for line in sys.stdin:
        asked = json.loads(line)
        if "layers" in asked:
            answer({"layers": layers() if layers is not None else []})
            continue
        for _ in range(3):
            run(image)
        samples: list[float] = []
        begin = time.perf_counter()
        while time.perf_counter() - begin < asked["burst_s"] or len(samples) < 5:
            start = time.perf_counter_ns()
            run(image)
            samples.append((time.perf_counter_ns() - start) / 1e3)
        answer({"samples_us": samples})


def command(request: EngineRequest, cores: list[int]) -> list[str]:
    """The command line of an engine's process."""
    return [sys.executable, "-m", "lightning_baqe.benchmarks.engines", json.dumps([asdict(request), cores])]


if __name__ == "__main__":
    parsed, own_cores = json.loads(sys.argv[1])
    serve(EngineRequest(**parsed), own_cores)
