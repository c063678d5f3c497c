"""Inference engines side by side: each prepares one network in a process of its own and runs bursts when asked.

| engine | |
| --- | --- |
| ``ours-wXaY`` | this package, X-bit weights and Y-bit activations, 2 to 8 |
| ``ours-mixed`` | this package, bits of a file; else first and last layer W8A8, between them W4A4, W8A8 in turn |
| ``ours-fp32`` | this package, float |
| ``openvino-int8``, ``openvino-fp32`` | OpenVINO, quantized by NNCF |
| ``onnxruntime-int8``, ``onnxruntime-int8-exact``, ``onnxruntime-fp32`` | ONNX Runtime; exact: never saturating |
| ``inductor-int8``, ``inductor-fp32`` | PyTorch inductor, quantized by torchao |
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from lightning_baqe.engines import peers
from lightning_baqe.engines.requests import EngineRequest, Prepared, calibration_images, probe_images
from lightning_baqe.engines.saturation import difference
from lightning_baqe.errors import ConfigError
from lightning_baqe.measurement.clock import WARM_UP, timed

PACKAGES = {"openvino": ("openvino", "nncf"), "onnxruntime": ("onnxruntime", "onnx"), "inductor-int8": ("torchao",)}
PEERS: dict[str, Callable[[EngineRequest], Prepared]] = {
    "openvino-int8": lambda request: peers.openvino(request, True),
    "onnxruntime-int8": lambda request: peers.onnxruntime(request, True),
    "onnxruntime-int8-exact": lambda request: peers.onnxruntime(request, True, exact=True),
    "inductor-int8": lambda request: peers.inductor(request, True),
    "openvino-fp32": lambda request: peers.openvino(request, False),
    "onnxruntime-fp32": lambda request: peers.onnxruntime(request, False),
    "inductor-fp32": lambda request: peers.inductor(request, False),
}
OURS = ("ours-w8a8", "ours-w4a8", "ours-mixed", "ours-fp32")
ENGINES = (*OURS, *PEERS)
_UNIFORM = re.compile(r"ours-w([2-8])a([2-8])")


def engine_name(text: str) -> str:
    """The name itself, if there is such an engine; else ConfigError."""
    if text in ENGINES or _UNIFORM.fullmatch(text):
        return text
    raise ConfigError(f"engine {text!r} is none of {', '.join(ENGINES)}, nor ours-wXaY with X and Y from 2 to 8")


def missing_packages(engine: str) -> list[str]:
    """Packages that an engine, or all engines of a peer, need and that are not installed."""
    needed = PACKAGES.get(engine, PACKAGES.get(engine.split("-")[0], ()))
    return [name for name in needed if importlib.util.find_spec(name) is None]


def bit_config(engine: str, module: Any, file: str | None = None) -> Any:
    """The bits that one of our engines, ``ours-...``, gives a network.

    ``file`` is the bit-config of ``ours-mixed`` as JSON; None for first and last layer W8A8, between them W4A4 and W8A8
    in turn.
    """
    from lightning_baqe.quantization.config import BitConfig, LayerBits

    if engine == "ours-fp32":
        return BitConfig.uniform(module, weight=32, activation=32)
    if uniform := _UNIFORM.fullmatch(engine):
        return BitConfig.uniform(module, weight=int(uniform[1]), activation=int(uniform[2]))
    if file is not None:
        return BitConfig.from_json(Path(file))
    layers = list(BitConfig.uniform(module))
    low = set(layers[1:-1:2])
    return BitConfig({layer: LayerBits(4, 4) if layer in low else LayerBits(8, 8) for layer in layers})


def ours(request: EngineRequest) -> Prepared:
    """Quantized, lowered and built by this package with the best knobs in the user's records; BuildError where the
    compiled network differs from its integer graph.
    """
    import torch

    import lightning_baqe as baqe
    from lightning_baqe.engines.zoo import load_network
    from lightning_baqe.errors import BuildError
    from lightning_baqe.kernels.x86.conv_spec import ConvSpec
    from lightning_baqe.measurement.profile import KernelProfile

    network = load_network(request)
    images = torch.from_numpy(calibration_images(request.size))
    bits = bit_config(request.engine, network, request.bits)
    quantized = baqe.quantize(network, bits, example_input=images)
    is_integer = not request.engine.endswith("fp32")
    if is_integer:
        baqe.calibrate(quantized, [images])
    graph = baqe.lower(quantized, example_input=images[:1])
    artifact = baqe.build(graph, threads=request.threads)
    if is_integer and not torch.equal(artifact.run(images[:1]), graph.run(images[:1])):
        raise BuildError("the compiled network differs from its integer graph")
    work: dict[tuple[str, int], int] = {}
    for call in artifact.plan.calls:
        if isinstance(call.spec, ConvSpec):
            arithmetic = (call.spec.dot, call.spec.chain)
            work[arithmetic] = work.get(arithmetic, 0) + call.spec.macs
    main = max(work, key=work.__getitem__)
    work[main] += graph.macs - sum(work.values())  # depthwise convolutions
    info = {
        "macs": graph.macs,
        "size_bytes": graph.size_bytes,
        "work": [{"dot": dot, "chain": chain, "macs": macs} for (dot, chain), macs in work.items()],
    }
    layers = {node.name: node.layer for node in graph if hasattr(node, "layer")}
    kernels = cache(lambda: KernelProfile(artifact.plan, graph.input_shape))

    def profile(image: np.ndarray, seconds: float) -> list[dict[str, Any]]:
        rows = kernels().profile(image, seconds)
        return [{**row, "names": [layers.get(name, name) for name in row["names"]]} for row in rows]

    def exactness() -> list[dict[str, Any]]:
        probes = torch.from_numpy(probe_images(request.size))
        logits, exact = artifact.run(probes).numpy(), graph.run(probes).numpy()
        return [difference("this network, logits, against the integer graph", logits, exact)]

    return Prepared(artifact.run_array, info, profile=profile, exactness=exactness if is_integer else None)


def prepare(request: EngineRequest) -> Prepared:
    """Prepare any engine."""
    name = engine_name(request.engine)
    return PEERS[name](request) if name in PEERS else ours(request)


def agreement(logits: np.ndarray, reference: np.ndarray) -> float:
    """Cosine between two networks' logits, ``(n, classes)``, each without its mean over the images.

    What all images have in common, such as the last bias, would hide a broken network.
    """
    a, b = (values.astype(np.float64) - values.mean(axis=0, dtype=np.float64) for values in (logits, reference))
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def serve(request: EngineRequest, cores: list[int]) -> None:
    """Prepare, then answer requests, a JSON object a line.

    | request | answer |
    | --- | --- |
    | | once, when the engine is ready: ``{"info", "logits"}`` of the probe images |
    | ``{"burst_s": t}`` | ``{"samples_us"}``: latencies of runs for so long |
    | ``{"profile_s": t}`` | ``{"kernels"}``: see :class:`Prepared`; none from an engine that has no profile |
    | ``{"exact": true}`` | ``{"exactness"}``: see :class:`Prepared`; none from an engine that has no such check |
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what engines print is not an answer
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    engine = prepare(request)
    images = probe_images(request.size)
    if engine.channels_last:
        images = np.ascontiguousarray(images.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    image = images[:1]

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    logits = [engine.run(images[at : at + 1])[0].tolist() for at in range(len(images))]
    answer({"info": engine.info, "logits": logits})
    for line in sys.stdin:
        asked = json.loads(line)
        if "burst_s" in asked:
            for _ in range(WARM_UP):
                engine.run(image)
            answer({"samples_us": timed(partial(engine.run, image), asked["burst_s"])})
        elif "exact" in asked:
            answer({"exactness": engine.exactness() if engine.exactness is not None else []})
        else:
            answer({"kernels": engine.profile(image, asked["profile_s"]) if engine.profile is not None else []})


def command(request: EngineRequest, cores: list[int]) -> list[str]:
    """The command line of an engine's process."""
    return [sys.executable, "-m", "lightning_baqe.engines.engine_process", json.dumps([asdict(request), cores])]


if __name__ == "__main__":
    parsed, own_cores = json.loads(sys.argv[1])
    serve(EngineRequest(**parsed), own_cores)
