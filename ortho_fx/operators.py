"""The operators `torch.ops.ortho_fx.<basis>(x, *parameters, channel_dim)`: one node in a graph, with its own backward.

Each basis gets two operators, `<basis>` and `<basis>_backward`, that save the input and the parameters and nothing
else. Their formulas are also their decompositions, registered on the operator itself: whatever traces below autograd
(AOTAutograd, `torch.export`'s `run_decompositions`) sees plain tensor operations, so Inductor fuses an expansion with
its neighbours under every backend, and no import of Inductor is needed for it.

Parameters of shape (size,) make one expansion for the whole tensor. Those of shape (size, groups) make one for each
group of neighbouring channels: the input's dimension `channel_dim` is split into groups, and gradients are summed over
everything else.

Arithmetic runs in float32 for half-precision inputs and in the input's dtype otherwise; the output has the input's
dtype, and in float16 stays at its largest number where it would be infinite.

Derivatives of every order and kind are exact, `torch.func`'s transforms included. When a backward is itself to be
differentiated, the differentiable formula stands in for the backward operator; in forward mode the formula stands in
for the forward one. `torch.vmap` makes each member of the batch a group of channels of one call. The autograd kernel
is our own: that of `torch.library.register_autograd` neither nests in `torch.func.grad` (pytorch issue 168393) nor
knows the forward mode.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from ortho_fx.bases import BASES, Basis

NAMESPACE = "ortho_fx"
CHANNEL_DIM = 1
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def expand(basis: Basis, x: Tensor, *parameters: Tensor, channel_dim: int = CHANNEL_DIM) -> Tensor:
    """y(x) by the basis' operator."""
    return operator(basis)(x, *parameters, channel_dim)


def operator(basis: Basis) -> Callable[..., Tensor]:
    """The forward operator of a basis, called as `operator(x, *parameters)`."""
    return _overload(basis.name)


def _overload(name: str) -> torch._ops.OpOverload:
    return getattr(getattr(torch.ops, NAMESPACE), name).default


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
    name, backward_name = basis.name, f"{basis.name}_backward"
    _LIBRARY.define(f"{name}({arguments}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.define(f"{backward_name}(Tensor grad, {arguments}) -> ({results})", tags=(torch.Tag.pt2_compliant_tag,))

    def by_position(formula: Callable[..., Any], tensor_count: int) -> Callable[..., Any]:
        # A kernel is not passed the arguments that have their defaults.
        return lambda *arguments: formula(
            *arguments[:tensor_count], channel_dim=arguments[-1] if len(arguments) > tensor_count else CHANNEL_DIM
        )

    forward = by_position(_forward_of(basis), len(tensors))
    backward = by_position(_backward_of(basis), 1 + len(tensors))
    for operator_name, formula in ((name, forward), (backward_name, backward)):
        # Autograd takes CompositeExplicit kernels as backend kernels and keeps the kernel registered below; the
        # CompositeImplicit entry, which only tracing below autograd reads, is the decomposition.
        _LIBRARY.impl(operator_name, formula, "CompositeExplicitAutograd")
        overload = _overload(operator_name)
        overload.py_impl(torch._C.DispatchKey.CompositeImplicitAutograd)(formula)
        rule = _batching_rule(overload, len(basis.parameters))
        torch.library.register_vmap(f"{NAMESPACE}::{operator_name}", rule, lib=_LIBRARY)
    _LIBRARY.impl(name, _autograd_kernel(basis, forward, backward), "Autograd", with_keyset=True)


def _autograd_kernel(
    basis: Basis, forward: Callable[..., Tensor], backward: Callable[..., tuple[Tensor, ...]]
) -> Callable[..., Tensor]:
    overload, backward_overload = _overload(basis.name), _overload(f"{basis.name}_backward")
    tensor_count = 1 + len(basis.parameters)

    class Expansion(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, output: list[Tensor], *arguments: Any) -> Tensor:
            ctx.save_for_backward(*arguments[:tensor_count])
            ctx.channel_dim = arguments[tensor_count:]
            return output[0]

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            # Grad mode is on exactly when the caller asked for a graph of the backward (create_graph=True).
            formula = backward if torch.is_grad_enabled() else backward_overload
            grad_x, *rest = formula(grad, *ctx.saved_tensors, *ctx.channel_dim)
            learned = iter(rest)
            grads = [next(learned) if parameter.learnable else None for parameter in basis.parameters]
            return None, grad_x, *grads, *(None for _ in ctx.channel_dim)

    def kernel(keys: torch._C.DispatchKeySet, *arguments: Any) -> Tensor:
        if _is_forward_mode():
            return forward(*arguments)
        # Not in Expansion.forward, which runs without grad mode: the transforms around this one would miss the call.
        with torch._C._AutoDispatchBelowAutograd():
            output = overload.redispatch(keys & torch._C._after_autograd_keyset, *arguments)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            with enable_single_level_autograd_function():
                return super(torch.autograd.Function, Expansion).apply([output], *arguments)
        return output

    return kernel


def _is_forward_mode() -> bool:
    """Whether tangents may be on their way: inside `torch.func.jvp`, or an open level of dual numbers."""
    transform = _functorch.peek_interpreter_stack()
    if transform is None:
        return forward_ad._current_level >= 0
    return transform.key() == _functorch.TransformType.Jvp


def _batching_rule(overload: torch._ops.OpOverload, parameter_count: int) -> Callable[..., tuple[Any, Any]]:
    """How `torch.vmap` runs an operator once for a batch: each member becomes a group, or as many as it has itself."""
    tensor_count = sum(argument.name != "channel_dim" for argument in overload._schema.arguments)
    value_count = tensor_count - parameter_count
    gives_gradients = len(overload._schema.returns) > 1

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        tensors, dims = arguments[:tensor_count], in_dims[:tensor_count]
        pairs = list(zip(tensors, dims, strict=True))
        values = [_with_batch(tensor, dim, 0, info.batch_size) for tensor, dim in pairs[:value_count]]
        channel_dim = arguments[tensor_count] if len(arguments) > tensor_count else CHANNEL_DIM
        if channel_dim >= 0:
            channel_dim -= values[0].dim() - 1
        if not gives_gradients and all(dim is None for dim in dims[value_count:]):
            return overload(*values, *tensors[value_count:], channel_dim), 0

        parameters = [_with_batch(tensor, dim, 1, info.batch_size) for tensor, dim in pairs[value_count:]]
        grouped, dim = parameters[0].dim() == 3, 0
        if grouped:
            dim = values[0].dim() - 1 + channel_dim
            values = [value.movedim(0, dim).flatten(dim, dim + 1) for value in values]
            parameters = [parameter.flatten(1) for parameter in parameters]

        def members(result: Tensor, at: int) -> Tensor:
            return result.unflatten(at, (info.batch_size, -1)) if grouped else result

        results = overload(*values, *parameters, dim)
        if not gives_gradients:
            return members(results, dim), dim
        out_dims = (dim, *(1 for _ in results[1:]))
        return tuple(members(result, at) for result, at in zip(results, out_dims, strict=True)), out_dims

    return rule


def _with_batch(tensor: Tensor, dim: int | None, at: int, size: int) -> Tensor:
    """The tensor with the dimension of the batch at `at`, which it may lack."""
    if dim is not None:
        return tensor.movedim(dim, at)
    return tensor.unsqueeze(at).expand(*tensor.shape[:at], size, *tensor.shape[at:])


def _formulas_digest() -> str:
    files = [Path(__file__), *sorted((Path(__file__).parent / "bases").glob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


for _basis in BASES.values():
    _register(_basis)

# AOTAutograd's cache on disk is keyed by the operators' names, not by what they decompose to: without a tag, another
# version of these formulas would be answered with code compiled from the old ones.
torch.compiler.config.cache_key_tag += f"ortho_fx-{_formulas_digest()}"
