"""How often engines' 8-bit arithmetic is wrong: CPUs without VNNI add pairs of products in 16 bits, which saturate.

Two checks. One convolution with full-range data against the exact integers: 64 channels, 1x1, uniformly random unsigned
activations and signed weights. And the benchmark's own quantized network in ONNX Runtime's default mode against its
exact mode, where a value counts as wrong if it, or anything that it was computed from, saturated.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

CHANNELS, SIZE, IMAGES = 64, 16, 4
SHIFT = 14  # sums of 64 products reach 2^21; the results are bytes
ZERO_POINT = 128


def single_convolution(path: Path, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Write a quantized convolution, as QDQ nodes, with random full-range weights and unit scales.

    Returns:
        float32 images ``(n, channels, size, size)`` of the integers 0 to 255, and the exact results, integers alike.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (IMAGES, CHANNELS, SIZE, SIZE))
    weights = rng.integers(-127, 128, (CHANNELS, CHANNELS))
    sums = np.einsum("oc,nchw->nohw", weights, images)
    # Ties go to the even integer, as in every engine.
    exact = np.clip(np.rint(sums / 2**SHIFT) + ZERO_POINT, 0, 255)
    constants = {
        "one": np.float32(1),
        "ones": np.ones(CHANNELS, np.float32),
        "zero": np.uint8(0),
        "zeros": np.zeros(CHANNELS, np.int8),
        "step": np.float32(2**SHIFT),
        "middle": np.uint8(ZERO_POINT),
        "w": weights.astype(np.int8)[:, :, None, None],
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "one", "zero"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "ones", "zeros"], ["wd"], axis=0),
        helper.make_node("Conv", ["xd", "wd"], ["c"]),
        helper.make_node("QuantizeLinear", ["c", "step", "middle"], ["cq"]),
        helper.make_node("DequantizeLinear", ["cq", "step", "middle"], ["y"]),
    ]
    shape = [1, CHANNELS, SIZE, SIZE]
    graph = helper.make_graph(
        nodes,
        "convolution",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), str(path))
    return images.astype(np.float32), (exact - ZERO_POINT) * 2**SHIFT


def difference(check: str, results: np.ndarray, exact: np.ndarray) -> dict[str, Any]:
    """How many elements differ, as
    ``{"check", "elements", "differing": how many, "largest": difference over the largest exact value}``.
    """
    wrong = np.abs(results.astype(np.float64) - exact)
    scale = float(np.abs(exact).max()) or 1.0
    return {
        "check": check,
        "elements": int(exact.size),
        "differing": int(np.count_nonzero(wrong)),
        "largest": float(wrong.max()) / scale,
    }


def check_convolution(open_model: Callable[[str], Callable[[np.ndarray], np.ndarray]]) -> dict[str, Any]:
    """Run :func:`single_convolution` in an engine, which opens a file as a function of one image ``(1, ...)``."""
    with tempfile.TemporaryDirectory(prefix="lightning_baqe-") as folder:
        path = Path(folder) / "convolution.onnx"
        images, exact = single_convolution(path)
        run = open_model(str(path))
        results = np.concatenate([np.array(run(image[None])) for image in images])
    return difference("one convolution, full-range data, against the exact integers", results, exact)


def check_onnxruntime(path: str, images: np.ndarray, open_session: Callable[[str, bool], Any]) -> list[dict[str, Any]]:
    """Compare ONNX Runtime's default mode with its exact mode on a quantized network: logits, all quantized values.

    ``images`` are float32 ``(n, 3, size, size)``; ``open_session`` takes a file and whether arithmetic is exact.
    """
    import onnx
    from onnx import TensorProto, helper

    model = onnx.load(path)
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            model.graph.output.append(helper.make_tensor_value_info(node.output[0], TensorProto.UINT8, None))
    shown = f"{path}.all.onnx"
    onnx.save(model, shown)
    name = model.graph.input[0].name
    flat: list[list[np.ndarray]] = []
    for exact in (False, True):
        session = open_session(shown, exact)
        per_image = [session.run(None, {name: image[None]}) for image in images]
        flat.append([np.concatenate([out[0].ravel() for out in per_image])])
        flat[-1].append(np.concatenate([value.ravel() for out in per_image for value in out[1:]]))
    return [
        difference(f"this network, {what}, against exact mode", default, exact)
        for what, default, exact in zip(("logits", "all quantized values"), *flat, strict=True)
    ]
