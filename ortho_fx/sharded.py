"""Parameters of which each process holds a part."""

from __future__ import annotations

from torch import Tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of one that FSDP shards; without its gradient's history."""
    full_tensor = getattr(tensor, "full_tensor", None)  # of a DTensor
    return (tensor if full_tensor is None else full_tensor()).detach()
