"""The operators in differentiable tensor operations: for derivatives of higher order, forward mode, and exports.

In eager mode each operation costs a few microseconds, and each derivative multiplies them. So formulas that autograd is
to differentiate there use `Basis.together`, where a basis has it, from PyTorch 2.13 on. Exports and compiled code keep
the terms apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ortho_fx import torch_private
from ortho_fx.bases import Basis
from ortho_fx.bases.formula import Together
from ortho_fx.operators import parts


def forward_formula(basis: Basis, differentiated: bool = False) -> Callable[..., Tensor]:
    """The forward operator of a basis; `differentiated` says whether autograd differentiates it."""

    def forward(x: Tensor, *parameters: Tensor, channel_dim: int) -> Tensor:
        dtype, order = parts.compute_dtype(x.dtype), parts.memory_order(x)
        values = [p.to(dtype) for p in basis.prepare(dtype, *parameters)[: len(parameters)]]
        groups = parts.groups_of(parameters)
        split = x.to(dtype)
        if groups is not None:
            split = parts.split(split, order, groups, channel_dim)
        together = _together(basis, split, values) if differentiated else None
        if together is not None:
            y = together.value()
        else:
            y = basis.evaluate(split, *(values if groups is None else (p.unsqueeze(-1) for p in values)))
        y = parts.rounded(y, x.dtype)
        return y if groups is None else parts.join(y, x, order)

    return forward


def _together(basis: Basis, x: Tensor, parameters: Sequence[Tensor]) -> Together | None:
    """The terms in one tensor, for x of any shape and one expansion, or of shape [before, groups, behind]."""
    # Before PyTorch 2.13 it is false where AOTAutograd traces, and code that Inductor 2.11 makes of this crashes.
    if torch.compiler.is_compiling() or torch_private.release() < (2, 13):
        return None
    after = (1, -1, 1) if parameters[0].dim() > 1 else tuple(1 for _ in x.shape)
    return basis.together(x, *(p.reshape(len(p), *after) for p in parameters))


def backward_of_parts(basis: Basis, grad: Tensor, x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of x, and the terms summed over each group.

    `grad` and `x` are from `parts.split`. The parameters are the tensors of `Basis.prepare` that formulas take.
    """
    dtype = parts.compute_dtype(x.dtype)
    values = [p.to(dtype) if p.dim() == 1 else p.to(dtype).unsqueeze(-1) for p in parameters]
    grad_x, terms = basis.derivatives(grad.to(dtype), x.to(dtype), *values)
    return grad_x().to(x.dtype), torch.stack([term().sum((0, 2)) for term in terms])


def differentiated_gradients(
    basis: Basis, grad: Tensor, x: Tensor, *parameters: Tensor, channel_dim: int, only_x: bool
) -> tuple[Tensor, ...] | None:
    """What the backward operator gives, or the gradient of x alone; None if the basis has no terms in one tensor."""
    order, groups, dtype = parts.memory_order(x), parts.groups_of(parameters), parts.compute_dtype(x.dtype)
    at, gradient = (parts.split(tensor, order, groups, channel_dim).to(dtype) for tensor in (x, grad))
    prepared = basis.prepare(dtype, *parameters)
    together = _together(basis, at, [p.to(dtype) for p in prepared[: len(parameters)]])
    if together is None:
        return None
    grad_x = parts.join((gradient * together.slope()).to(x.dtype), x, order)
    if only_x:
        return (grad_x,)
    sums = (gradient * together.terms()).sum((1, 3))
    return grad_x, *parts.collect(basis, sums, parameters, prepared)


def backward_formula(basis: Basis) -> Callable[..., tuple[Tensor, ...]]:
    """The backward operator of a basis."""

    def backward(grad: Tensor, x: Tensor, *parameters: Tensor, channel_dim: int) -> tuple[Tensor, ...]:
        order, groups = parts.memory_order(x), parts.groups_of(parameters)
        split = [parts.split(tensor, order, groups, channel_dim) for tensor in (grad, x)]
        prepared = basis.prepare(parts.compute_dtype(x.dtype), *parameters)
        grad_x, sums = backward_of_parts(basis, *split, *prepared[: len(parameters)])
        return parts.join(grad_x, x, order), *parts.collect(basis, sums, parameters, prepared)

    return backward
