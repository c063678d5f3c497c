"""Searches that answer any point at once, from measurements: surrogate benchmarks for samplers."""

from lightning_baqe.landscapes.measured import Landscape

__all__ = ["Landscape"]
