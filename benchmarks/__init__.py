"""Measurements against peers: ``python -m benchmarks run`` and ``python -m benchmarks compare``."""
