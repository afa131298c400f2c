"""Measurements at the published sizes, with random weights: ``python -m benchmarks --help``."""
