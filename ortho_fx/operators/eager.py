"""The operators in eager mode: computed in blocks that stay in the cache, without full-size intermediate results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ortho_fx.bases import Basis
from ortho_fx.operators import parts

# The elements of a block per thread: a few blocks of this size fit into a core's second-level cache.
_BLOCK = 131072


def _blocks(x: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Splits tensors, of shape [before, groups, behind] or flat, into blocks along the first dimension."""
    size = _BLOCK * torch.get_num_threads() if x.device.type == "cpu" else x.numel()
    rows = max(1, size * x.shape[0] // max(1, x.numel()))
    return zip(*(tensor.split(rows) for tensor in (x, *others)), strict=True)


def _flat(tensor: Tensor, groups: int | None) -> Tensor:
    return tensor.reshape(-1) if groups is None else tensor


def _numbers(prepared: Sequence[Tensor], dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
    """The single numbers of each parameter, as formulas take them: without dimensions, or of shape [groups, 1]."""
    return [(p if p.dim() == 1 else p.unsqueeze(-1)).to(dtype).unbind() for p in prepared]


def forward_of_prepared(basis: Basis, x: Tensor, *prepared: Tensor, channel_dim: int) -> Tensor:
    """y(x) in blocks, with the parameters from `Basis.prepare`."""
    groups, output = parts.groups_of(prepared), torch.empty_like(x)
    dtype, order = parts.compute_dtype(x.dtype), parts.memory_order(output)
    values = _numbers(prepared, dtype)
    source, target = (_flat(parts.split(tensor, order, groups, channel_dim), groups) for tensor in (x, output))
    for block, place in _blocks(source, target):
        place.copy_(parts.rounded(basis.evaluate(block.to(dtype), *values), x.dtype))
    return output


def forward_kernel(basis: Basis) -> Callable[..., Tensor]:
    """The forward operator of a basis."""

    def forward(x: Tensor, *parameters: Tensor, channel_dim: int) -> Tensor:
        prepared = basis.prepare(parts.compute_dtype(x.dtype), *parameters)
        return forward_of_prepared(basis, x, *prepared[: len(parameters)], channel_dim=channel_dim)

    return forward


def backward_kernel(basis: Basis) -> Callable[..., tuple[Tensor, ...]]:
    """The backward operator of a basis."""

    # A graph that holds forward and backward may call this in grad mode. Autograd differentiates the formula instead.
    @torch.no_grad()
    def backward(grad: Tensor, x: Tensor, *parameters: Tensor, channel_dim: int) -> tuple[Tensor, ...]:
        dtype, groups = parts.compute_dtype(x.dtype), parts.groups_of(parameters)
        output, prepared = torch.empty_like(x), basis.prepare(dtype, *parameters)
        order, values = parts.memory_order(output), _numbers(prepared[: len(parameters)], dtype)
        others = (0,) if groups is None else (0, 2)
        tensors = (_flat(parts.split(tensor, order, groups, channel_dim), groups) for tensor in (grad, x, output))
        sums = []
        for block_grad, block, place in _blocks(*tensors):
            grad_x, terms = basis.derivatives(block_grad.to(dtype), block.to(dtype), *values)
            place.copy_(grad_x())
            sums.append(torch.stack([term().sum(others) for term in terms]))
        return output, *parts.collect(basis, torch.stack(sums).sum(0), parameters, prepared)

    return backward
