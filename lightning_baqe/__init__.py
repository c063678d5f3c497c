"""Search bit-widths and compiler schedules together, train, lower to integers, compile, measure.

The public names are imported when first used, so that the parts that need only torch do not load TVM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_baqe.lazy import on_first_use

if TYPE_CHECKING:
    from lightning_baqe.integer.graph import IntegerGraph
    from lightning_baqe.integer.lowering import lower
    from lightning_baqe.quantization.calibration import calibrate
    from lightning_baqe.quantization.config import BitConfig, LayerBits
    from lightning_baqe.quantization.convert import QuantizedModel, quantize

__version__ = "0.1.0"

_HOME = {
    "Artifact": "deploy.artifact",
    "BitConfig": "quantization.config",
    "Front": "runs.front",
    "IntegerGraph": "integer.graph",
    "LayerBits": "quantization.config",
    "Measurement": "measurement.device",
    "QuantizedModel": "quantization.convert",
    "build": "measurement.build",
    "calibrate": "quantization.calibration",
    "lower": "integer.lowering",
    "measure": "measurement.measure",
    "quantize": "quantization.convert",
    "verify": "deploy.verify",
}

__getattr__, __dir__ = on_first_use(__name__, _HOME)

__all__ = ["BitConfig", "IntegerGraph", "LayerBits", "QuantizedModel", "calibrate", "lower", "quantize"]
