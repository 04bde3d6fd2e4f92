"""Nested tensors as inputs: an elementwise function acts on their values."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ortho_fx.activations.channels import ComputesParts, likely_dims
from ortho_fx.errors import OperandError


def expand_parts(expansion: ComputesParts, x: Tensor, operands: Mapping[str, Tensor]) -> Tensor:
    """y(x) of a nested tensor of either layout, as one of the same layout and raggedness.

    Raises:
        OperandError: the channels lie in no regular dimension.
    """
    dim = 1 if expansion.channels is None else _channel_dim(expansion, x)
    if x.layout == torch.jagged:
        # The values have every other dimension of the same length; the ragged one is that of all lengths together.
        ragged = next(dim for dim in range(1, x.dim()) if not isinstance(x.shape[dim], int))
        structure = {"offsets": x.offsets(), "lengths": x.lengths()}  # type: ignore[attr-defined]
        return torch.nested.nested_tensor_from_jagged(
            expansion.expand(x.values(), operands, dim), jagged_dim=ragged, **structure
        )
    parts = [expansion.expand(part, operands, dim) for part in x.unbind()]
    return torch.nested.as_nested_tensor(parts, layout=torch.strided)


def _channel_dim(expansion: ComputesParts, x: Tensor) -> int:
    """The dimension, counted from the last, that holds the channels of each part."""
    for dim in likely_dims(expansion, x.dim()):
        if -x.dim() <= dim < x.dim() and dim % x.dim() and _size(x, dim) == expansion.channels:
            return dim % x.dim() - x.dim()
    raise OperandError(
        f"{expansion.called}: no regular dimension of its nested input has {expansion.channels} channels"
    )


def _size(x: Tensor, dim: int) -> int | None:
    try:
        size = x.size(dim)
    except RuntimeError:  # a dimension of varying length
        return None
    return size if isinstance(size, int) else None
