"""Sharded parameters, of which each process holds a part."""

from __future__ import annotations

from torch import Tensor


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, gathered if FSDP shards it, detached from autograd."""
    full_tensor = getattr(tensor, "full_tensor", None)  # of a DTensor
    return (tensor if full_tensor is None else full_tensor()).detach()
