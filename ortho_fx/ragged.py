"""Nested tensors, of which some dimensions have no single length."""

from __future__ import annotations

import torch
from torch import Tensor


def size_of(x: Tensor, dim: int) -> int | None:
    """The length of a dimension; None where it varies."""
    try:
        size = x.size(dim)
    except RuntimeError:
        return None
    return size if isinstance(size, int) or not x.is_nested else None


def ragged_dim(x: Tensor) -> int:
    """The dimension of a jagged tensor whose length varies."""
    # Its values have every other dimension of the same length, and in the place of this one that of all lengths.
    values = x.values()
    return next(dim for dim in range(1, x.dim()) if x.shape[dim] != values.shape[dim - 1])


def numbers(x: Tensor) -> Tensor:
    """All numbers of a tensor in one dimension; of a nested one without the gaps that it may have."""
    return torch.cat([part.flatten() for part in x.unbind()]) if x.is_nested else x.flatten()
