"""The base of the checks of `compat.py check`: cases, the error `Wrong` of a case, and the error of tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Case = tuple[str, Callable[[], Any]]
SINGLE, DOUBLE = 1e-5, 1e-9


class Wrong(Exception):
    """A case saw a wrong result."""


def leaves(values: Any) -> list[Tensor]:
    return [values] if isinstance(values, Tensor) else [leaf for value in values for leaf in leaves(value)]


def off(actual: Any, expected: Any, allowed: float) -> float:
    """The largest relative error of tensors in nested tuples.

    Raises:
        Wrong: it is larger than allowed.
    """
    largest = 0.0
    for ours, exact in zip(leaves(actual), leaves(expected), strict=True):
        if ours.shape != exact.shape:
            raise Wrong(f"the shape is {tuple(ours.shape)}, not {tuple(exact.shape)}")
        error = float((ours.double() - exact).norm() / exact.norm().clamp(min=1e-30))
        if not error < allowed:
            raise Wrong(f"off by {error:.1e}, more than {allowed:.0e}")
        largest = max(largest, error)
    return float(f"{largest:.1e}")


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
