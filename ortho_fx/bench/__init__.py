"""Times, memory and kernels of activations and training steps, beside GELU's."""

from ortho_fx.bench.config import BenchConfig
from ortho_fx.bench.measure import bench
from ortho_fx.bench.report import Report

__all__ = ["BenchConfig", "Report", "bench"]
