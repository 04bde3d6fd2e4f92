"""Benchmarks: time, memory and kernels of activations and training steps, compared with GELU."""

from ortho_fx.bench.config import DEFAULT_EXPANSIONS, BenchConfig
from ortho_fx.bench.measure import bench
from ortho_fx.bench.report import Report

__all__ = ["DEFAULT_EXPANSIONS", "BenchConfig", "Report", "bench"]
