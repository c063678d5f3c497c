"""Search bit-widths and compiler schedules together, train, lower to integers, compile, measure.

The public names are imported when first used, so that the parts that need only torch do not load TVM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_baqe.lazy import on_first_use

if TYPE_CHECKING:
    from lightning_baqe.calibration.calibrate import calibrate
    from lightning_baqe.entrance.admission import check
    from lightning_baqe.entrance.quantize import quantize
    from lightning_baqe.integer.graph import IntegerGraph
    from lightning_baqe.integer.lowering import lower
    from lightning_baqe.quantization.config import BitConfig, LayerBits
    from lightning_baqe.quantization.convert import QuantizedModel

__version__ = "0.1.0"

_HOMES = {
    "allocation.curve": ("allocate_front",),
    "allocation.hessian": ("hessian_trace",),
    "allocation.program": ("allocate_bits",),
    "deploy.artifact": ("Artifact",),
    "deploy.verify": ("verify",),
    "entrance.admission": ("check",),
    "entrance.quantize": ("quantize",),
    "integer.graph": ("IntegerGraph",),
    "integer.lowering": ("lower",),
    "measurement.build": ("build",),
    "measurement.device": ("Measurement",),
    "measurement.measure": ("measure",),
    "calibration.calibrate": ("calibrate",),
    "quantization.config": ("BitConfig", "LayerBits"),
    "quantization.convert": ("QuantizedModel",),
    "quantization.gradient_scaling": ("gradient_scaling",),
    "runs.front": ("Front",),
}

__getattr__, __dir__ = on_first_use(__name__, _HOMES)

__all__ = ["BitConfig", "IntegerGraph", "LayerBits", "QuantizedModel", "calibrate", "check", "lower", "quantize"]
