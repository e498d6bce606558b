"""Benchmarks: every figure is a ratio against a named rival or a physical limit of the same run."""
