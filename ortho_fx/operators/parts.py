"""The shape and dtype in which operators compute: tensors are [before, groups, behind] in the order of memory.

An expansion for the whole tensor is one group. With one expansion per channel, the dimension of the channels is split
into groups of neighbours. `before` holds the dimensions before it in memory; `behind` holds the channels of a group and
the dimensions after them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ortho_fx import torch_private
from ortho_fx.bases import Basis

# The smallest number of elements in a row, for a tensor that is one group.
_ROW = 256


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which an operator computes, for inputs of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def memory_order(x: Tensor) -> list[int]:
    """The dimensions of a tensor, ordered from the largest stride to the smallest."""
    return sorted(range(x.dim()), key=lambda dim: (-x.stride()[dim], dim))


def split(x: Tensor, order: list[int], groups: int | None, channel_dim: int) -> Tensor:
    """The tensor as [before, groups, behind], with its dimensions in this order; a view if the memory allows it.

    An expansion for the whole tensor is one group. Then `behind` joins as few of the last dimensions as make a loop of
    useful length.
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
    """Whether a condition on sizes is known to hold, without a new guard on symbolic sizes."""
    if isinstance(condition, bool):
        return condition
    shapes = torch_private.available(torch_private.SHAPES)
    return shapes is not None and shapes.guard_or_false(condition)


def join(parts: Tensor, like: Tensor, order: Sequence[int]) -> Tensor:
    """The inverse of `split`: the tensor in the shape and memory order of `like`."""
    places = [order.index(dim) for dim in range(like.dim())]
    return parts.reshape([like.shape[dim] for dim in order]).permute(places)


def groups_of(parameters: Sequence[Tensor]) -> int | None:
    """The number of groups of these parameters; None for one expansion for the whole tensor."""
    return parameters[0].shape[1] if parameters[0].dim() > 1 else None


def rounded(y: Tensor, dtype: torch.dtype) -> Tensor:
    """The result in the dtype of the input; in float16 it is clamped to the largest finite number."""
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
        # One cast for all gradients.
        gradients = torch.cat(list(gradients)).to(learned[0].dtype).split([p.shape[0] for p in learned])
    return [gradient.to(parameter.dtype) for gradient, parameter in zip(gradients, learned, strict=True)]


def count_terms(basis: Basis, parameters: Sequence[Any]) -> int:
    """The number of gradient terms, one for each learnable number."""
    learned = (p for p, described in zip(parameters, basis.parameters, strict=True) if described.learnable)
    return sum(int(parameter.shape[0]) for parameter in learned)


def largest_chunks(device_type: str, grouped: bool, behind: Any, terms: int, numel: Any) -> list[int]:
    """The largest number of elements in a partial sum, for tensors of `numel` elements, which may be symbolic.

    The last number is for tensors that have no divisor below the first which makes a loop (see `makes_a_loop`).

    On a CPU it is 4096, above which sums go through memory, or 256 for a column of channels. On a GPU it is 16384: then
    partial sums are few and all processors are busy, in a loop with accumulators for each term. If the accumulators do
    not fit into the registers of large blocks, there are at least so many partial sums that Inductor halves the blocks.

    Sums that are too short for a loop need no accumulators, but they are no way out: adding up across the threads takes
    about ten instructions for each term and element, and a register that does not fit takes half an instruction.
    """
    column = grouped and behind == 1
    if device_type == "cpu":
        return [256 if column else 4096]
    crowded = not column and loop_registers(terms, column) > _REGISTERS_OF_LARGE_BLOCKS
    if crowded and is_known(numel < _LONGEST_CHUNK * _MANY_SUMS):
        return [int(numel) // _MANY_SUMS, _LONGEST_CHUNK]
    return [_LONGEST_CHUNK]


_LONGEST_CHUNK = 16384
# Inductor makes no loop of a sum of at most so many elements.
_LONGEST_WITHOUT_LOOP = 1024
# With at least so many sums, a block of Inductor's has 256 threads instead of 512. A block of an H100 has 65,536
# registers, and a thread at most 255.
_MANY_SUMS = 513
_REGISTERS_OF_LARGE_BLOCKS = 128
MOST_REGISTERS = 255


def makes_a_loop(size: int) -> bool:
    """Whether a GPU's kernel takes a sum of this size in a loop."""
    return size > _LONGEST_WITHOUT_LOOP


def loop_registers(terms: int, column: bool) -> int:
    """An estimate of the registers of a GPU's thread in a loop with this number of sums.

    A thread has four elements at a time (blocks of 1024 elements for 256 threads). For each it holds an accumulator for
    each term, half as many intermediate results (powers, comparisons), and about eight more values. If channels lie
    side by side, its elements have different parameters, which the loop holds too: as many as terms.

    In parentheses, what the compiler needs (Triton 3.9 for an H100, float32): Fourier 5 128 (128), tropical rational 6
    200 (185), Hermite 32 230 (167), tropical rational 9 272 (spills); side by side: Fourier 7 252 (247), tropical
    rational 5 272 (spills), Hermite 32 362 (spills).
    """
    return 4 * (8 + terms + terms // 2 + (terms if column else 0))


def largest_divisor(number: int, largest: float) -> int:
    """The largest divisor of a number that is at most `largest`."""
    divisors = (
        d for small in range(1, math.isqrt(number) + 1) if number % small == 0 for d in (small, number // small)
    )
    return max((d for d in divisors if d <= largest), default=1)


def chunk(device_type: str, before: Any, groups: Any, behind: int, terms: int) -> tuple[int, int]:
    """How many rows (of `before`) and columns (of `behind`) a partial sum covers: divisors of these sizes.

    If the number of rows is symbolic, a partial sum covers one row.
    """
    limits = largest_chunks(device_type, groups != 1, behind, terms, before * groups * behind)
    for largest in limits:
        across = largest_divisor(behind, largest)
        rows = largest_divisor(before, largest / across) if across == behind and isinstance(before, int) else 1
        if makes_a_loop(rows * across):
            break
    return rows, across
