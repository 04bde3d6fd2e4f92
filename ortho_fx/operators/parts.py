"""How operators see their tensors: as [before, groups, behind] in the order of memory, and in which dtype.

An expansion for the whole tensor is one group. With one expansion a channel the dimension of the channels is split into
groups of neighbours, `before` holds what lies before it in memory, and `behind` the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ortho_fx import torch_private
from ortho_fx.bases import Basis

# Elements that a row of a tensor which is one group has at least.
_ROW = 256


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What an operator computes in, for inputs of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def memory_order(x: Tensor) -> list[int]:
    """The dimensions of a tensor, those with the largest strides first."""
    return sorted(range(x.dim()), key=lambda dim: (-x.stride()[dim], dim))


def split(x: Tensor, order: list[int], groups: int | None, channel_dim: int) -> Tensor:
    """The tensor as [before, groups, behind], its dimensions in this order: a view where it lies so in memory.

    An expansion for the whole tensor is one group; as few of its last dimensions as make `behind` worth a loop are
    joined into it.
    """
    sizes = [x.shape[dim] for dim in order]
    if groups is None:
        at, groups = max(0, len(sizes) - 1), 1
        while at > 0 and is_known(math.prod(sizes[at:]) < _ROW):
            at -= 1
    else:
        at = order.index(channel_dim % x.dim())
    behind = math.prod(sizes[at:]) // groups
    return x.permute(order).reshape(math.prod(sizes[:at]), groups, behind)


def is_known(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on sizes is known to hold, without a guard on those that are symbolic."""
    if isinstance(condition, bool):
        return condition
    shapes = torch_private.available(torch_private.SHAPES)
    return shapes is not None and shapes.guard_or_false(condition)


def join(parts: Tensor, like: Tensor, order: Sequence[int]) -> Tensor:
    """What `split` took apart: the tensor in the shape and the order of memory of `like`."""
    places = [order.index(dim) for dim in range(like.dim())]
    return parts.reshape([like.shape[dim] for dim in order]).permute(places)


def groups_of(parameters: Sequence[Tensor]) -> int | None:
    """The number of groups that parameters are for; None where they are for the whole tensor."""
    return parameters[0].shape[1] if parameters[0].dim() > 1 else None


def rounded(y: Tensor, dtype: torch.dtype) -> Tensor:
    """The result in the dtype of the input; float16 stays at its largest number where it would be infinite."""
    if dtype == torch.float16:
        largest = torch.finfo(dtype).max
        y = y.clamp(-largest, largest)
    return y.to(dtype)


def collect(basis: Basis, sums: Tensor, parameters: Sequence[Tensor], prepared: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of the learnable parameters, in their dtypes, from the terms summed over each group."""
    sums = sums.reshape(sums.shape[0], *parameters[0].shape[1:])
    gradients = basis.collect_prepared(sums, [parameter.to(sums.dtype) for parameter in parameters], prepared)
    learned = [p for p, described in zip(parameters, basis.parameters, strict=True) if described.learnable]
    if {p.dtype for p in learned} == {learned[0].dtype} != {sums.dtype}:
        # One cast, not one for each.
        gradients = torch.cat(list(gradients)).to(learned[0].dtype).split([p.shape[0] for p in learned])
    return [gradient.to(parameter.dtype) for gradient, parameter in zip(gradients, learned, strict=True)]


def count_terms(basis: Basis, parameters: Sequence[Any]) -> int:
    """As many as there are learnable numbers."""
    learned = (p for p, described in zip(parameters, basis.parameters, strict=True) if described.learnable)
    return sum(int(parameter.shape[0]) for parameter in learned)


def largest_chunk(device_type: str, grouped: bool, behind: Any, terms: int) -> int:
    """How many elements a partial sum adds up at most.

    On a CPU 4096, above which its sums go through memory, and of a column of channels 256. On a GPU as many as keep
    partial sums few and processors busy, in a loop with an accumulator for each term; more terms than its registers
    hold are summed up one by one, in chunks too short for a loop.
    """
    if device_type == "cpu":
        return 256 if behind == 1 and grouped else 4096
    return 128 if terms > 40 else 16384


def largest_divisor(number: int, largest: float) -> int:
    """The largest divisor of a number that is not above `largest`."""
    divisors = (
        d for small in range(1, math.isqrt(number) + 1) if number % small == 0 for d in (small, number // small)
    )
    return max((d for d in divisors if d <= largest), default=1)


def chunk(device_type: str, before: Any, groups: Any, behind: int, terms: int) -> tuple[int, int]:
    """How many rows and columns of [before, groups, behind] a partial sum adds up: divisors of these sizes.

    Of a symbolic number of rows one each.
    """
    largest = largest_chunk(device_type, groups != 1, behind, terms)
    across = largest_divisor(behind, largest)
    rows = largest_divisor(before, largest / across) if across == behind and isinstance(before, int) else 1
    return rows, across
