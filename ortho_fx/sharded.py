"""Sharded parameters, of which each process holds a part."""

from __future__ import annotations

from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)


def is_distributed(tensor: Tensor) -> bool:
    """Whether it is a DTensor; told without importing what that takes."""
    return type(tensor) not in _PLAIN and hasattr(tensor, "device_mesh")


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether each process holds a part of it."""
    return tensor is not None and is_distributed(tensor) and any(p.is_shard() for p in tensor.placements)  # type: ignore[attr-defined]


def clamped(x: Tensor, bounds: Tensor | None) -> Tensor:
    """A plain tensor within bounds that every process has whole, if there are any."""
    if bounds is None:
        return x
    if is_distributed(bounds):
        bounds = bounds.to_local()  # type: ignore[attr-defined]
    return x.clamp(bounds[0], bounds[1])


def is_same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are views of the same numbers."""
    if is_distributed(one) or is_distributed(other):
        if not (is_distributed(one) and is_distributed(other)):
            return False
        one, other = one.to_local(), other.to_local()  # type: ignore[attr-defined]
    if one.is_meta or other.is_meta:
        return False  # no numbers
    return one.is_set_to(other)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, gathered if FSDP shards it, detached from autograd."""
    full_tensor = getattr(tensor, "full_tensor", None)  # of a DTensor
    return (tensor if full_tensor is None else full_tensor()).detach()


def copy_whole_(target: Tensor, source: Tensor) -> None:
    """Copies a whole tensor into one that may be distributed, of which each process takes its part."""
    source = source.to(target.device, target.dtype)
    if is_distributed(target):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(target, DTensor)
        source = distribute_tensor(source, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(source)
