"""What is left of a network of ImageNet that is quantized without training, ours beside the peers.

    python -m lightning_baqe.benchmarks.pretrained             # EfficientNet-Lite0; about 15 minutes on two cores
    python -m lightning_baqe.benchmarks.pretrained --seeds 0 1 2 --bits 4 --peers

Calibrated on crops of the photographs that scikit-image and scikit-learn ship, and compared with the float network on
other crops of them: how often both name the same class, and the cosine of their logits (without their mean). Ours is
the compiled model, every figure of it; that it equals the integer interpreter is checked on some crops. Peers at 8 bit,
each in several of its documented settings: the best of them counts.

What the corrections do was chosen on crops of other seeds than those that are compared here (1000 and up).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_baqe.benchmarks.photographs import crops
from lightning_baqe.benchmarks.setups import check_positive, console_of, parser_of, table_of
from lightning_baqe.calibration.calibrate import calibrate
from lightning_baqe.calibration.corrections import CORRECTIONS, Correction
from lightning_baqe.engines.requests import INPUT
from lightning_baqe.engines.zoo import export_onnx
from lightning_baqe.entrance.quantize import quantize
from lightning_baqe.hardware.identity import device_info
from lightning_baqe.integer.lowering import lower
from lightning_baqe.measurement.build import build
from lightning_baqe.quantization.config import BitConfig
from lightning_baqe.tasks import network
from lightning_baqe.tasks.weights import IMAGENET

MODEL, LIBRARY, SIZE = "tf_efficientnet_lite0", "timm", 224
COMPARED = 1000  # seeds of what is compared: this and up
EXACT = 4  # crops that the interpreter computes, too
Infer = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Agreement:
    """With the float network.

    Args:
        same: share of crops that both give the same class.
        cosine: of the logits without their mean, over all crops.
        seconds: that quantization took.
    """

    same: float
    cosine: float
    seconds: float


def compared(found: torch.Tensor, wanted: torch.Tensor, seconds: float) -> Agreement:
    """Logits ``(n, classes)`` against the float network's."""
    same = (found.argmax(1) == wanted.argmax(1)).double().mean()
    mine, theirs = (logits - logits.mean(1, keepdim=True) for logits in (found, wanted))
    return Agreement(float(same), float(nn.functional.cosine_similarity(mine, theirs).mean()), seconds)


def of_images(net: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Normalised as the network's weights want it."""
    about: Any = net.pretrained_cfg
    mean, std = (torch.tensor(about[key]).view(3, 1, 1) for key in ("mean", "std"))
    return (pixels / 255 - mean) / std


def ours(
    net: nn.Module, bits: int, correct: Correction, shown: torch.Tensor, x: torch.Tensor, wanted: torch.Tensor
) -> Agreement:
    """Quantized, corrected, compiled, run."""
    start = time.perf_counter()
    quantized = quantize(net, BitConfig.uniform(net, bits, 8), shown[:1]).eval()
    calibrate(quantized, shown.split(16), correct=correct)
    seconds = time.perf_counter() - start
    graph = lower(quantized, shown[:1])
    with closing(build(graph)) as artifact:
        logits = artifact.run(x)
    if not torch.equal(logits[:EXACT], graph.run(x[:EXACT])):
        raise AssertionError("the compiled model differs from the integer interpreter")
    return compared(logits, wanted, seconds)


def peers(net: nn.Module, shown: torch.Tensor, folder: Path) -> Iterator[tuple[str, str, Callable[[], Infer]]]:
    """``(peer, setting, what quantizes and returns inference)``."""
    import nncf
    import openvino as ov

    onnx = folder / "float.onnx"
    export_onnx(net, onnx, SIZE)
    images = [image[None].numpy() for image in shown]

    def openvino(**options: Any) -> Infer:
        model = ov.convert_model(str(onnx))
        model.reshape([1, 3, SIZE, SIZE])
        quantized = nncf.quantize(model, nncf.Dataset(images), subset_size=len(images), **options)
        request = ov.Core().compile_model(quantized, "CPU").create_infer_request()
        return lambda x: np.array(request.infer([x])[0])

    performance, mixed = nncf.QuantizationPreset.PERFORMANCE, nncf.QuantizationPreset.MIXED
    yield "NNCF on OpenVINO", "defaults", lambda: openvino(preset=performance)
    yield "NNCF on OpenVINO", "mixed", lambda: openvino(preset=mixed)
    yield "NNCF on OpenVINO", "mixed, bias correction", lambda: openvino(preset=mixed, fast_bias_correction=False)

    def onnxruntime(method: str) -> Infer:
        from lightning_baqe.engines.peers import onnxruntime_session, quantize_onnx

        path = str(folder / f"{method}.onnx")
        quantize_onnx(str(onnx), path, images, method)
        session = onnxruntime_session(path, 1, exact=True)
        return lambda x: np.asarray(session.run(None, {INPUT: x})[0])

    for method in ("MinMax", "Entropy", "Percentile"):
        yield "ONNX Runtime", method, partial(onnxruntime, method)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 6, 4], help="of the weights; activations have 8")
    parser.add_argument("--correct", nargs="+", default=list(CORRECTIONS), choices=list(CORRECTIONS))
    parser.add_argument("--reconstruct-s", type=float, default=0.0, help="seconds of block reconstruction after best")
    parser.add_argument("--shown", type=int, default=64, help="crops to calibrate on")
    parser.add_argument("--images", type=int, default=96, help="crops to compare on")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of both")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args(arguments)
    check_positive(parser, options, "shown", "images")
    console = console_of(140)
    console.print(f"{device_info()['cpu']}, {torch.get_num_threads()} threads")
    corrections = {name: CORRECTIONS[name] for name in options.correct}
    if options.reconstruct_s > 0:
        corrections["best, blocks"] = replace(CORRECTIONS["best"], reconstruct_s=options.reconstruct_s)
    net = network(MODEL, 1000, LIBRARY, weights=IMAGENET).eval()
    found: dict[tuple[str, str, str], list[Agreement]] = {}

    def keep(name: str, bits: str, setting: str, agreement: Agreement) -> None:
        found.setdefault((name, bits, setting), []).append(agreement)
        console.print(
            f"{name} {bits} {setting}: {agreement.same:.1%} the same, cosine {agreement.cosine:.4f}, "
            f"{agreement.seconds:.0f} s"
        )

    for seed in options.seeds:
        shown = of_images(net, crops(options.shown, SIZE, seed))
        x = of_images(net, crops(options.images, SIZE, COMPARED + seed))
        with torch.no_grad():
            wanted = torch.cat([net(part) for part in x.split(32)])
        for bits in options.bits:
            for name, correction in corrections.items():
                keep("ours", f"W{bits}A8", name, ours(net, bits, correction, shown, x, wanted))
        if options.peers:
            with tempfile.TemporaryDirectory() as folder:
                for name, setting, prepare in peers(net, shown, Path(folder)):
                    start = time.perf_counter()
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        infer = prepare()
                    seconds = time.perf_counter() - start
                    logits = torch.from_numpy(np.concatenate([infer(image[None].numpy()) for image in x]))
                    keep(name, "W8A8", setting, compared(logits, wanted, seconds))
    rows = [
        [name, bits, setting, *(_text([getattr(a, field) for a in all_seeds], form) for field, form in _FIELDS)]
        for (name, bits, setting), all_seeds in found.items()
    ]
    title = f"{MODEL} of ImageNet, {options.shown} crops shown, agreement with float on {options.images} others"
    console.print(table_of(title, ("", "bits", "setting", "same class", "cosine", "s"), ("", "bits", "setting"), rows))
    return 0


_FIELDS = (("same", ".1%"), ("cosine", ".4f"), ("seconds", ".0f"))


def _text(values: list[float], form: str) -> str:
    """The mean, and the extremes where there are several."""
    mean = format(float(np.mean(values)), form)
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}} to {max(values):{form}})"


if __name__ == "__main__":
    sys.exit(main())
