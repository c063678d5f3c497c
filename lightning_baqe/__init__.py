"""Search bit-widths and compiler schedules together, train, lower to integers, compile, measure.

The public names are imported when first used, so that the parts that need only torch do not load TVM.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_baqe.integer.graph import IntegerGraph
    from lightning_baqe.integer.lowering import lower
    from lightning_baqe.quantization.calibration import calibrate
    from lightning_baqe.quantization.config import BitConfig, LayerBits
    from lightning_baqe.quantization.convert import QuantizedModel, quantize

__version__ = "0.1.0"

_HOME = {
    "Artifact": "lightning_baqe.deploy.artifact",
    "BitConfig": "lightning_baqe.quantization.config",
    "Front": "lightning_baqe.runs.front",
    "IntegerGraph": "lightning_baqe.integer.graph",
    "LayerBits": "lightning_baqe.quantization.config",
    "Measurement": "lightning_baqe.measurement.measure",
    "QuantizedModel": "lightning_baqe.quantization.convert",
    "build": "lightning_baqe.deploy.build",
    "calibrate": "lightning_baqe.quantization.calibration",
    "lower": "lightning_baqe.integer.lowering",
    "measure": "lightning_baqe.measurement.measure",
    "quantize": "lightning_baqe.quantization.convert",
    "verify": "lightning_baqe.deploy.verify",
}

__all__ = ["BitConfig", "IntegerGraph", "LayerBits", "QuantizedModel", "calibrate", "lower", "quantize"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
