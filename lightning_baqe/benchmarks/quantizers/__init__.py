"""Benchmarks of training with quantizers."""
