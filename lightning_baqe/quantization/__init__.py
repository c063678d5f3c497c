"""Float model to fake-quantized model with learnable scales: bit-configs, quantizers, conversion, calibration."""
