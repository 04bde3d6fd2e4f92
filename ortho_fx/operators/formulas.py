"""The operators in differentiable tensor operations: for derivatives of higher order, forward mode, and exports."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ortho_fx.bases import Basis
from ortho_fx.operators import parts


def forward_formula(basis: Basis) -> Callable[..., Tensor]:
    """The forward operator of a basis."""

    def forward(x: Tensor, *parameters: Tensor, channel_dim: int) -> Tensor:
        dtype, order = parts.compute_dtype(x.dtype), parts.memory_order(x)
        values = [p.to(dtype) for p in basis.prepare(dtype, *parameters)[: len(parameters)]]
        groups = parts.groups_of(parameters)
        if groups is None:
            return parts.rounded(basis.evaluate(x.to(dtype), *values), x.dtype)
        split = parts.split(x.to(dtype), order, groups, channel_dim)
        y = basis.evaluate(split, *(p.unsqueeze(-1) for p in values))
        return parts.join(parts.rounded(y, x.dtype), x, order)

    return forward


def backward_of_parts(basis: Basis, grad: Tensor, x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of x, and the terms summed over each group.

    `grad` and `x` are from `parts.split`. The parameters are the tensors of `Basis.prepare` that formulas take.
    """
    dtype = parts.compute_dtype(x.dtype)
    values = [p.to(dtype) if p.dim() == 1 else p.to(dtype).unsqueeze(-1) for p in parameters]
    grad_x, terms = basis.derivatives(grad.to(dtype), x.to(dtype), *values)
    return grad_x().to(x.dtype), torch.stack([term().sum((0, 2)) for term in terms])


def backward_formula(basis: Basis) -> Callable[..., tuple[Tensor, ...]]:
    """The backward operator of a basis."""

    def backward(grad: Tensor, x: Tensor, *parameters: Tensor, channel_dim: int) -> tuple[Tensor, ...]:
        order, groups = parts.memory_order(x), parts.groups_of(parameters)
        split = [parts.split(tensor, order, groups, channel_dim) for tensor in (grad, x)]
        prepared = basis.prepare(parts.compute_dtype(x.dtype), *parameters)
        grad_x, sums = backward_of_parts(basis, *split, *prepared[: len(parameters)])
        return parts.join(grad_x, x, order), *parts.collect(basis, sums, parameters, prepared)

    return backward
