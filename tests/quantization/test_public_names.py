from __future__ import annotations

import subprocess
import sys

import pytest

import lightning_baqe


def test_torch_parts_load_no_tvm() -> None:
    code = (
        "import sys, lightning_baqe as baqe; assert 'torch' not in sys.modules; "
        "baqe.quantize, baqe.calibrate, baqe.lower, baqe.BitConfig, baqe.LayerBits; assert 'tvm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = lightning_baqe.quantise
    assert "build" in dir(lightning_baqe)
