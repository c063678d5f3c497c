"""What a batch holds for the network: every kind that loaders give, and each refusal by what it says."""

from __future__ import annotations

from collections import UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from lightning_baqe import BitConfig, calibrate, quantize
from lightning_baqe.errors import CalibrationError, ConfigError
from lightning_baqe.quantization.batches import INPUTS, LABELS, describe, input_and_labels, network_input
from lightning_baqe.quantization.convert import QuantizedModel
from quantization.small_networks import images, settled

X, Y = torch.randn(4, 3, 8, 8), torch.arange(4)
Sample = namedtuple("Sample", ["label", "image"])
Unknown = namedtuple("Unknown", ["first", "second"])


@dataclass
class Record:
    targets: torch.Tensor
    pixel_values: torch.Tensor


PAIRS: list[Any] = [
    (X, Y), [X, Y], (X, Y, {"path": "a.png"}), (X.numpy(), Y.numpy()),
    {"label": Y, "image": X}, {"Image": X, "Target": Y, "id": 3}, UserDict(pixel_values=X, labels=Y),
    Sample(Y, X), Record(Y, X), {"x": X.numpy(), "y": Y.numpy(), "mask": X},
]  # fmt: skip


@pytest.mark.parametrize("batch", PAIRS, ids=describe)
def test_input_and_labels(batch: Any) -> None:
    x, y = input_and_labels(batch, "a loader")
    assert torch.equal(x, X)
    assert torch.equal(y, Y)
    assert torch.equal(network_input(batch, "a loader"), X)


@pytest.mark.parametrize("batch", [X, X.numpy(), (X,), [X], {"img": X}, ({"image": X}, Y)], ids=describe)
def test_input_alone(batch: Any) -> None:
    assert torch.equal(network_input(batch, "a loader"), X)
    if not (isinstance(batch, tuple) and len(batch) == 2):
        with pytest.raises(ConfigError, match=r"^a loader gives .*wanted are batches \(x, y\)"):
            input_and_labels(batch, "a loader", ConfigError)


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({"features": X, "y": Y}, r"a dict of \{'features': float32 \(4, 3, 8, 8\), 'y': int64 \(4,\)\}"),
        ({"image": X, "x": X}, "a dict of"),
        ({"image": "a.png"}, r"a dict of \{'image': a str\}"),
        (Unknown(X, Y), "a Unknown of"),
        (((X, X), Y), r"a tuple of \(a tuple of \(float32 \(4, 3, 8, 8\), float32 \(4, 3, 8, 8\)\), int64 \(4,\)\)"),
        ("a.png", "a str"),
        ((), r"a tuple of \(\)"),
        (None, "a NoneType"),
        (np.array([X, None], dtype=object), "object"),
        ([3] * 9, r"a list of \(a int, a int, a int, a int, 5 more\)"),
    ],
)
def test_what_has_no_certain_meaning_is_refused(batch: Any, said: str) -> None:
    with pytest.raises(CalibrationError, match=rf"^the loader gives {said}.*wanted is x, \(x, y\), or a dict with one"):
        network_input(batch, "the loader")


def test_no_name_is_both() -> None:
    assert not set(INPUTS) & set(LABELS)


def quantized() -> QuantizedModel:
    net = settled("residual")
    return quantize(net, BitConfig.uniform(net), images()[:1])


def scales(model: QuantizedModel) -> list[float]:
    return [quantizer.scale.item() for quantizer in model.quantizers().values()]


def test_calibrate_reads_all_kinds_alike() -> None:
    x = images()
    wanted = scales(calibrate(quantized(), [x]))
    for batches in (x, x.numpy(), x.double(), [x.numpy()], [{"image": x}], [Sample(torch.zeros(len(x)), x)], iter([x])):
        assert scales(calibrate(quantized(), batches)) == wanted


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        ({"image": X}, r"give \[batch\]"),
        ((X, Y), r"batch 2 of calibrate gives int64 \(4,\).*wanted is the network's input, \(n, 3, "),
        ([X[0]], r"batch 1 of calibrate gives float32 \(3, 8, 8\)"),
        ([X[:0]], r"batch 1 of calibrate is empty"),
        (
            [X[:, :2]],
            r"batch 1 of calibrate, float32 \(4, 2, 8, 8\), does not go through .* wanted is its input",
        ),
        ([X.to(torch.uint8)], "does not go through the network.*scaled as in training"),
        ([X, {"features": X}], r"batch 2 of calibrate gives a dict of \{'features'"),
        ([], "at least one batch"),
    ],
)
def test_calibrate_refuses_by_what_was_given(batches: Any, said: str) -> None:
    model = quantized()
    before = scales(model)
    with pytest.raises(CalibrationError, match=said):
        calibrate(model, batches)
    assert scales(model) == before
    assert all(quantizer.observer is None for quantizer in model.quantizers().values())
