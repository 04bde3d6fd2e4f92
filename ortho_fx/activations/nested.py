"""Nested tensors as inputs: an elementwise function acts on their values."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ortho_fx.activations.channels import ComputesParts, likely_dims
from ortho_fx.errors import OperandError
from ortho_fx.ragged import ragged_dim, size_of


def expand_parts(expansion: ComputesParts, x: Tensor, operands: Mapping[str, Tensor]) -> Tensor:
    """y(x) of a nested tensor of either layout, as one of the same layout and raggedness.

    Raises:
        OperandError: the channels lie in no regular dimension.
    """
    dim = 1 if expansion.channels is None else _channel_dim(expansion, x)
    if x.layout == torch.jagged:
        structure = {"offsets": x.offsets(), "lengths": x.lengths()}  # type: ignore[attr-defined]
        return torch.nested.nested_tensor_from_jagged(
            expansion.expand(x.values(), operands, dim), jagged_dim=ragged_dim(x), **structure
        )
    parts = [expansion.expand(part, operands, dim) for part in x.unbind()]
    return torch.nested.as_nested_tensor(parts, layout=torch.strided)


def _channel_dim(expansion: ComputesParts, x: Tensor) -> int:
    """The dimension, counted from the last, that holds the channels of each part."""
    for dim in likely_dims(expansion, x.dim()):
        if -x.dim() <= dim < x.dim() and dim % x.dim() and size_of(x, dim) == expansion.channels:
            return dim % x.dim() - x.dim()
    raise OperandError(
        f"{expansion.called}: no regular dimension of its nested input has {expansion.channels} channels"
    )
