"""Measurements of optimizer steps, states and memory; `python -m benchmarks --help`."""
