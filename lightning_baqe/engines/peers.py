"""The other engines, each with the settings that its documentation recommends for latency on a CPU."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from lightning_baqe.engines.requests import INPUT, EngineRequest, Prepared, calibration_images, probe_images
from lightning_baqe.engines.saturation import check_convolution, check_onnxruntime
from lightning_baqe.measurement.clock import PROFILED_RUNS, WARM_UP, timed


def openvino(request: EngineRequest, integer: bool) -> Prepared:
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

    def profile(x: np.ndarray, seconds: float) -> list[dict[str, Any]]:
        # A model's counters cannot be set back: each burst has a model of its own.
        return _openvino_rows(ov.Core().compile_model(model, "CPU", {**options, "PERF_COUNT": True}), x, seconds)

    def open_model(path: str) -> Callable[[np.ndarray], np.ndarray]:
        opened = ov.Core().compile_model(ov.convert_model(path), "CPU", options).create_infer_request()
        return lambda x: np.asarray(opened.infer([x])[0])

    def exactness() -> list[dict[str, Any]]:
        return [check_convolution(open_model)]

    return Prepared(run, profile=profile, exactness=exactness if integer else None)


def _openvino_rows(compiled: Any, image: np.ndarray, seconds: float) -> list[dict[str, Any]]:
    """The mean time of each node of a model that was compiled with PERF_COUNT, without warming up."""
    fused = {}
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        names = info["originalLayersNames"].astype(str) if "originalLayersNames" in info else ""
        fused[node.get_friendly_name()] = [name for name in names.split(",") if name]
    inference = compiled.create_infer_request()

    def counters() -> dict[str, Any]:
        executed = (node for node in inference.get_profiling_info() if node.status == node.Status.EXECUTED)
        return {node.node_name: node for node in executed}

    for _ in range(WARM_UP):
        inference.infer([image])
    before = counters()
    runs = len(timed(lambda: inference.infer([image]), seconds, most=PROFILED_RUNS))
    rows = []
    for name, node in counters().items():
        # They give the mean of all runs so far, in whole microseconds.
        total_us = [
            n.real_time.total_seconds() * 1e6 * count for n, count in ((node, WARM_UP + runs), (before[name], WARM_UP))
        ]
        rows.append(
            {
                "name": name,
                "names": [name, *fused.get(name, [])],
                "op": node.node_type,
                "implementation": node.exec_type,
                "us": max(0.0, total_us[0] - total_us[1]) / runs,
            }
        )
    return rows


def onnxruntime(request: EngineRequest, integer: bool, exact: bool = False) -> Prepared:
    """ONNX Runtime; integers by its static QDQ quantization, unsigned activations, signed weights by channel."""
    path = request.onnx
    if integer:
        path = str(Path(request.onnx).with_suffix(f".{request.engine}.{request.threads}.onnx"))
        quantize_onnx(request.onnx, path, (image[None] for image in calibration_images(request.size)))
    session = onnxruntime_session(path, request.threads, exact)

    def run(x: np.ndarray) -> np.ndarray:
        return np.asarray(session.run(None, {INPUT: x})[0])

    def profile(x: np.ndarray, seconds: float) -> list[dict[str, Any]]:
        # The file is written when profiling ends, and it ends once: each burst has a session of its own.
        profiled = onnxruntime_session(path, request.threads, exact, profile=f"{path}.profile")
        for _ in range(WARM_UP):
            profiled.run(None, {INPUT: x})
        timed(lambda: profiled.run(None, {INPUT: x}), seconds, most=PROFILED_RUNS)
        return onnxruntime_rows(json.loads(Path(profiled.end_profiling()).read_text()))

    def open_model(file: str) -> Callable[[np.ndarray], np.ndarray]:
        opened = onnxruntime_session(file, request.threads, exact)
        return lambda x: np.asarray(opened.run(None, {INPUT: x})[0])

    def exactness() -> list[dict[str, Any]]:
        convolution = check_convolution(open_model)
        if exact:
            return [convolution]
        images = probe_images(request.size)
        own = check_onnxruntime(path, images, lambda file, right: onnxruntime_session(file, request.threads, right))
        return [convolution, *own]

    return Prepared(run, profile=profile, exactness=exactness if integer else None)


def onnxruntime_session(path: str, threads: int, exact: bool, profile: str | None = None) -> Any:
    """A session on the CPU with all optimizations.

    Args:
        exact: no saturating int16 sums on CPUs without VNNI.
        profile: how the name of the profile's file starts; None for no profile.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3  # errors
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    if exact:
        options.add_session_config_entry("session.x64quantprecision", "1")
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, profile
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def onnxruntime_rows(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The mean time of each node over the runs of a profile, without warming up, in the order of execution."""
    taken_us: dict[tuple[str, str], list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            key = (event["name"].removesuffix("_kernel_time"), event["args"]["op_name"])
            taken_us.setdefault(key, []).append(event["dur"])
    return [
        {"name": name, "names": [name], "op": op, "us": statistics.mean(taken[WARM_UP:])}
        for (name, op), taken in taken_us.items()
    ]


def quantize_onnx(model: str, path: str, images: Iterable[np.ndarray], method: str = "MinMax") -> None:
    """ONNX Runtime's static quantization to 8 bit, QDQ, weights by channel, after its own preprocessing.

    Args:
        model: the float network.
        path: where the integer one is written.
        images: ``(1, 3, size, size)`` each.
        method: how ranges are found, of ``CalibrationMethod``.
    """
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.images = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.images, None)
            return None if image is None else {INPUT: image}

    prepared = f"{path}.prepared.onnx"
    quant_pre_process(model, prepared)
    quantize_static(
        prepared, path, Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, calibrate_method=CalibrationMethod[method],
    )  # fmt: skip


def inductor(request: EngineRequest, integer: bool) -> Prepared:
    """PyTorch inductor, frozen, autotuned, called through its C++ wrapper, channels last.

    Integers by post-training quantization of the exported program for x86 (PT2E), with its defaults.
    """
    import torch
    from torch._inductor import config

    from lightning_baqe.engines.zoo import load_network

    torch.set_num_threads(request.threads)
    config.freezing = config.cpp_wrapper = True
    module = load_network(request).to(memory_format=torch.channels_last)
    images = torch.from_numpy(calibration_images(request.size)).to(memory_format=torch.channels_last)
    with torch.no_grad():
        if integer:
            module = _quantize_exported(module, images)
        compiled = torch.compile(module, mode="max-autotune", fullgraph=True)

    def run(x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            logits: np.ndarray = compiled(torch.from_numpy(x)).numpy()
        return logits

    return Prepared(run, channels_last=True)


def _quantize_exported(module: Any, images: Any) -> Any:
    import torch
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    # Strict: else the calls of a module that is used twice are one partition, which the quantizer refuses.
    exported = torch.export.export(module, (images[:1],), strict=True).module()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    observed = prepare_pt2e(exported, quantizer)
    for image in images:
        observed(image[None].contiguous(memory_format=torch.channels_last))
    return convert_pt2e(observed)
