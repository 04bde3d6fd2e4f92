"""The operators `torch.ops.ortho_fx.<basis>(x, *parameters, channel_dim)`: one node in a graph, with its own backward.

Each basis gets two operators, `<basis>` and `<basis>_backward`, that save the input and the parameters and nothing
else. Their formulas are also their decompositions, registered on the operator itself: whatever traces below autograd
(AOTAutograd, `torch.export`'s `run_decompositions`) sees plain tensor operations, so Inductor fuses an expansion with
its neighbours under every backend, and no import of Inductor is needed for it.

Parameters of shape (size,) make one expansion for the whole tensor. Those of shape (size, groups) make one for each
group of neighbouring channels: the input's dimension `channel_dim` is split into groups, and gradients are summed over
everything else.

Arithmetic runs in float32 for half-precision inputs and in the input's dtype otherwise; the output has the input's
dtype, and in float16 stays at its largest number where it would be infinite. When a backward is itself to be
differentiated, the differentiable formula stands in for the backward operator, so derivatives of every order are
exact.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ortho_fx.bases import BASES, Basis

NAMESPACE = "ortho_fx"
CHANNEL_DIM = 1
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def expand(basis: Basis, x: Tensor, *parameters: Tensor, channel_dim: int = CHANNEL_DIM) -> Tensor:
    """y(x) by the basis' operator, or by its formula inside a `torch.func` transform, where the operator cannot go.

    PyTorch's operators with a Python backward do not compose with `torch.func.grad` (pytorch issue 168393).
    """
    if _inside_functional_transform():
        return _forward_of(basis)(x, *parameters, channel_dim=channel_dim)
    return operator(basis)(x, *parameters, channel_dim)


def operator(basis: Basis) -> Callable[..., Tensor]:
    """The forward operator of a basis, called as `operator(x, *parameters)`."""
    return getattr(getattr(torch.ops, NAMESPACE), basis.name).default


def _inside_functional_transform() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


# Dynamo enters the transforms for real while it traces and guards on them, so the answer is a constant of the trace.
# The mark is what `torch.compiler.assume_constant_result` sets, without its import of all of Dynamo.
_inside_functional_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _split(x: Tensor, parameters: Sequence[Tensor], channel_dim: int) -> tuple[int, Tensor, list[Tensor]]:
    """The dimension of the groups, the input with its channels split into them, and the parameters to broadcast."""
    dim = channel_dim % x.dim()
    groups = parameters[0].shape[1]
    x = x.unflatten(dim, (groups, x.shape[dim] // groups))
    behind = [1] * (x.dim() - dim - 1)
    return dim, x, [p.reshape(p.shape[0], groups, *behind) for p in parameters]


def _forward_of(basis: Basis) -> Callable[..., Tensor]:
    def forward(x: Tensor, *parameters: Tensor, channel_dim: int) -> Tensor:
        dtype = _compute_dtype(x)
        z, values = x.to(dtype), [p.to(dtype) for p in parameters]
        if values[0].dim() == 1:
            y = basis.evaluate(z, *values)
        else:
            dim, z, values = _split(z, values, channel_dim)
            y = basis.evaluate(z, *values).flatten(dim, dim + 1)
        if x.dtype == torch.float16:
            largest = torch.finfo(torch.float16).max
            y = y.clamp(-largest, largest)
        return y.to(x.dtype)

    return forward


def _backward_of(basis: Basis) -> Callable[..., tuple[Tensor, ...]]:
    learnable = [parameter.learnable for parameter in basis.parameters]

    def backward(grad: Tensor, x: Tensor, *parameters: Tensor, channel_dim: int) -> tuple[Tensor, ...]:
        dtype = _compute_dtype(x)
        grad_y, z, values = grad.to(dtype), x.to(dtype), [p.to(dtype) for p in parameters]
        if values[0].dim() == 1:
            results = basis.gradients(grad_y, z, torch.sum, *values)
        else:
            dim, z, values = _split(z, values, channel_dim)
            others = [d for d in range(z.dim()) if d != dim]
            grad_x, *rest = basis.gradients(
                grad_y.unflatten(dim, z.shape[dim : dim + 2]), z, lambda t: t.sum(others, keepdim=True), *values
            )
            results = grad_x.flatten(dim, dim + 1), *rest
        sources = [x, *(p for p, learns in zip(parameters, learnable, strict=True) if learns)]
        pairs = zip(results, sources, strict=True)
        return tuple(result.reshape(source.shape).to(source.dtype) for result, source in pairs)

    return backward


def _register(basis: Basis) -> None:
    tensors = ["Tensor x", *(f"Tensor {parameter.name}" for parameter in basis.parameters)]
    arguments = ", ".join([*tensors, f"int channel_dim={CHANNEL_DIM}"])
    results = ", ".join(["Tensor"] * (1 + len(basis.learnable)))

    def by_position(formula: Callable[..., Any], tensor_count: int) -> Callable[..., Any]:
        # A kernel is not passed the arguments that have their defaults.
        return lambda *arguments: formula(
            *arguments[:tensor_count], channel_dim=arguments[-1] if len(arguments) > tensor_count else CHANNEL_DIM
        )

    forward = by_position(_forward_of(basis), len(tensors))
    backward = by_position(_backward_of(basis), 1 + len(tensors))
    name, backward_name = basis.name, f"{basis.name}_backward"
    _LIBRARY.define(f"{name}({arguments}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.define(f"{backward_name}(Tensor grad, {arguments}) -> ({results})", tags=(torch.Tag.pt2_compliant_tag,))
    namespace = getattr(torch.ops, NAMESPACE)
    for operator_name, formula in ((name, forward), (backward_name, backward)):
        # Autograd takes CompositeExplicit kernels as backend kernels and keeps the backward registered below; the
        # CompositeImplicit entry, which only tracing below autograd reads, is the decomposition.
        _LIBRARY.impl(operator_name, formula, "CompositeExplicitAutograd")
        overload = getattr(namespace, operator_name).default
        overload.py_impl(torch._C.DispatchKey.CompositeImplicitAutograd)(formula)

    backward_operator = getattr(namespace, backward_name).default

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[: len(tensors)])
        ctx.channel_dim = inputs[-1]

    def differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Grad mode is on exactly when the caller asked for a graph of the backward (create_graph=True).
        formula = backward if torch.is_grad_enabled() else backward_operator
        grad_x, *rest = formula(grad, *ctx.saved_tensors, ctx.channel_dim)
        learned = iter(rest)
        return grad_x, *(next(learned) if parameter.learnable else None for parameter in basis.parameters), None

    torch.library.register_autograd(f"{NAMESPACE}::{name}", differentiate, setup_context=save, lib=_LIBRARY)


def _formulas_digest() -> str:
    files = [Path(__file__), *sorted((Path(__file__).parent / "bases").glob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


for _basis in BASES.values():
    _register(_basis)

# AOTAutograd's cache on disk is keyed by the operators' names, not by what they decompose to: without a tag, another
# version of these formulas would be answered with code compiled from the old ones.
torch.compiler.config.cache_key_tag += f"ortho_fx-{_formulas_digest()}"
