"""Registers two operators for each basis, `<basis>` and `<basis>_backward`: kernels, shapes, autograd and `vmap`.

Derivatives of every order and kind are exact, also in the transforms of `torch.func`. If a backward is differentiated
again, the differentiable formula replaces the backward operator. In forward mode a tangent of x is multiplied with the
operator of y', where y' is of the same basis (`Basis.slope`); elsewhere the formula replaces the forward operator.
`torch.vmap` makes each member of the batch a group of channels in one call.

The autograd kernel is our own, because that of `torch.library.register_autograd` does not nest in `torch.func.grad`
(pytorch issue 168393) and has no forward mode. It is used only on a release without the private names that ours needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ortho_fx import torch_private
from ortho_fx.bases import BASES, Basis
from ortho_fx.operands import check_operands
from ortho_fx.operators import parts, support
from ortho_fx.operators.eager import backward_kernel, forward_kernel
from ortho_fx.operators.formulas import backward_formula, differentiated_gradients, forward_formula

NAMESPACE = "ortho_fx"
CHANNEL_DIM = 1
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def operator(basis: Basis) -> Callable[..., Tensor]:
    """The forward operator of a basis; call it as `operator(x, *parameters, channel_dim)`."""
    return _overload(basis.name)


def _overload(name: str) -> Any:
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def is_defined(name: str) -> bool:
    """Whether an operator of this name exists."""
    return hasattr(getattr(torch.ops, NAMESPACE), name)


def schemas(basis: Basis) -> tuple[str, str]:
    """The schemas (arguments and results) of a basis' forward and backward operators.

    Both can take the result of `Basis.prepare`, for a graph that saves it in the forward for the backward.
    """
    tensors = ", ".join(["Tensor x", *(f"Tensor {parameter.name}" for parameter in basis.parameters)])
    results = ", ".join(["Tensor"] * (1 + len(basis.learnable)))
    rest = f"int channel_dim={CHANNEL_DIM}, Tensor[]? prepared=None"
    return f"({tensors}, {rest}) -> Tensor", f"(Tensor grad, {tensors}, {rest}) -> ({results})"


def register(basis: Basis) -> None:
    """Defines both operators of a basis."""
    tensor_count = 1 + len(basis.parameters)
    kinds: Sequence[tuple[str, int, Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = (
        (
            basis.name,
            tensor_count,
            _unprepared(forward_kernel(basis)),
            _unprepared(forward_formula(basis)),
            _forward_shapes(basis),
        ),
        (
            f"{basis.name}_backward",
            tensor_count + 1,
            _unprepared(backward_kernel(basis)),
            _unprepared(backward_formula(basis)),
            _backward_shapes(basis),
        ),
    )
    for (name, count, kernel, formula, shapes), schema in zip(kinds, schemas(basis), strict=True):
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, by_position(kernel, count), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", shapes, lib=_LIBRARY)
        # The decomposition. Eager mode and autograd use the CompositeExplicit kernel, so only a trace below autograd
        # uses this one. It is registered after the shapes, because PyTorch refuses shapes after it.
        _LIBRARY.impl(name, by_position(_decomposition(basis, name, formula), count), "CompositeImplicitAutograd")
        if fake_tensors := torch_private.available(torch_private.FAKE_TENSORS):
            fake_tensors.meta_table[_overload(name)] = shapes
        rule = _batching_rule(_overload(name), len(basis.parameters))
        torch.library.register_vmap(f"{NAMESPACE}::{name}", rule, lib=_LIBRARY)
    formulas = (
        by_position(_unprepared(forward_formula(basis, differentiated=True)), tensor_count),
        by_position(_unprepared(backward_formula(basis)), tensor_count + 1),
    )
    if private := torch_private.available(torch_private.AUTOGRAD):
        _LIBRARY.impl(basis.name, _autograd_kernel(private, basis, *formulas), "Autograd", with_keyset=True)
    else:
        _register_public_autograd(basis, *formulas)


def _unprepared(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel that ignores prepared parameters, because it prepares them itself."""

    def run(*tensors: Tensor, channel_dim: int, prepared: Sequence[Tensor] | None = None) -> Any:
        return kernel(*tensors, channel_dim=channel_dim)

    return run


def _decomposition(basis: Basis, name: str, formula: Callable[..., Any]) -> Callable[..., Any]:
    """The decomposition of an operator in a trace below autograd: the form for Inductor, or else the formula."""

    def decompose(*tensors: Tensor, **arguments: Any) -> Any:
        support.meet_inductor(basis, tensors[0].device.type)
        return (support.decomposition(basis, name) or formula)(*tensors, **arguments)

    return decompose


def by_position(kernel: Callable[..., Any], tensor_count: int) -> Callable[..., Any]:
    """Adapts a kernel for the dispatcher, which omits trailing arguments that have their default value."""

    def call(*arguments: Any) -> Any:
        tensors, (channel_dim, *prepared) = arguments[:tensor_count], arguments[tensor_count:] or (CHANNEL_DIM,)
        more = {"prepared": prepared[0]} if prepared else {}
        return kernel(*tensors, channel_dim=channel_dim, **more)

    return call


# Where a real tensor meets one on the meta device, these run in the place of kernels: their output has no values.
def _forward_shapes(basis: Basis) -> Callable[..., Tensor]:
    names = [parameter.name for parameter in basis.parameters]

    def shapes(x: Tensor, *rest: Any) -> Tensor:
        check_operands(f"{NAMESPACE}.{basis.name}", x, dict(zip(names, rest, strict=False)))
        support.meet_inductor(basis, x.device.type)
        return torch.empty_like(x)

    return shapes


def _backward_shapes(basis: Basis) -> Callable[..., tuple[Tensor, ...]]:
    names = [parameter.name for parameter in basis.parameters]

    def shapes(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        operands = {"grad": grad, **dict(zip(names, rest, strict=False))}
        check_operands(f"{NAMESPACE}.{basis.name}_backward", x, operands)
        learned = (p for p, described in zip(rest, basis.parameters, strict=False) if described.learnable)
        return torch.empty_like(x), *(torch.empty_like(p, memory_format=torch.contiguous_format) for p in learned)

    return shapes


def _gradients(
    basis: Basis, backward: Callable[..., tuple[Tensor, ...]], needed: Sequence[bool], grad: Tensor, *arguments: Any
) -> tuple[Tensor | None, ...]:
    """The gradients of x and of every parameter; None for a parameter that is not learnable or not needed."""
    count, found = 1 + len(basis.parameters), None
    # Grad mode is on exactly if the caller asked for a graph of the backward (create_graph=True).
    if torch.is_grad_enabled():
        only_x = not any(needed[1:])
        found = differentiated_gradients(basis, grad, *arguments[:count], channel_dim=arguments[count], only_x=only_x)
        if found is None:
            found = backward(grad, *arguments)
    else:
        found = _overload(f"{basis.name}_backward")(grad, *arguments)
    grad_x, *rest = found
    learned = iter(rest)
    return grad_x, *(next(learned, None) if parameter.learnable else None for parameter in basis.parameters)


def _autograd_kernel(
    private: Any, basis: Basis, forward: Callable[..., Tensor], backward: Callable[..., tuple[Tensor, ...]]
) -> Callable[..., Tensor]:
    overload, tensor_count = _overload(basis.name), 1 + len(basis.parameters)

    def slope_is_operator(dtype: torch.dtype) -> bool:
        # The operator would round y' to half precision before it is multiplied.
        return basis.has_slope and parts.compute_dtype(dtype) == dtype

    # A single-level function, as functorch uses internally: since PyTorch 2.14 an ordinary `Function` checks at every
    # call whether transforms are active.
    class Expansion(private._SingleLevelFunction):
        @staticmethod
        def forward(
            ctx: Any, output: list[Tensor], prepared: Sequence[Tensor], has_tangent: bool, *arguments: Any
        ) -> Tensor:
            ctx.save_for_backward(*arguments[:tensor_count], *prepared)
            ctx.channel_dim = arguments[tensor_count] if len(arguments) > tensor_count else CHANNEL_DIM
            if has_tangent:  # it keeps x also where hooks of saved tensors would let go of it
                ctx.save_for_forward(*arguments[:tensor_count])
            return output[0]

        @staticmethod
        def jvp(ctx: Any, output: None, prepared: None, has_tangent: None, tangent: Tensor, *others: None) -> Tensor:
            # PyTorch calls this without forward mode, so tangents of the outer transforms would be lost.
            with private._set_fwd_grad_enabled(True):
                x, *parameters = (forward_ad.unpack_dual(saved, level=0).primal for saved in ctx.saved_tensors)
                slope = basis.slope(*(parameter.to(x.dtype) for parameter in parameters))
                return tangent * overload(x, *slope, ctx.channel_dim)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            saved = ctx.saved_tensors  # only once: under checkpointing each access recomputes them
            prepared = (list(saved[tensor_count:]),) if len(saved) > tensor_count else ()
            needed = ctx.needs_input_grad[3 : 3 + tensor_count]
            gradients = _gradients(basis, backward, needed, grad, *saved[:tensor_count], ctx.channel_dim, *prepared)
            return None, None, None, *gradients, None

    def kernel(keys: Any, *arguments: Any) -> Tensor:
        tensors = arguments[:tensor_count]
        has_tangent, *others = _have_tangents(private, tensors)
        if any(others) or (has_tangent and not slope_is_operator(tensors[0].dtype)):
            return forward(*arguments)
        learns = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        # Not in Expansion.forward: it runs without grad mode, so the outer transforms would miss the call.
        arguments = (*arguments, CHANNEL_DIM)[: tensor_count + 1]
        with private._AutoDispatchBelowAutograd():
            prepared = support.kept_for_backward(basis, *tensors) if learns else ()
            given = (list(prepared),) if prepared else ()
            output = overload.redispatch(keys & private._after_autograd_keyset, *arguments, *given)
        if not (learns or has_tangent):
            return output
        with private.enable_single_level_autograd_function():
            return Expansion.apply([output], prepared, has_tangent, *arguments)

    return kernel


def _have_tangents(private: Any, tensors: Sequence[Tensor]) -> Sequence[bool]:
    """Which tensors have tangents: inside `torch.func.jvp`, or at an open level of dual numbers."""
    transform, level = private.peek_interpreter_stack(), None
    if transform is not None:
        if transform.key() != private.TransformType.Jvp:
            return [False] * len(tensors)
        # A compiled `jvp` opens its level in C++, where `unpack_dual` finds it only by its number.
        level = 0
    return [forward_ad.unpack_dual(tensor, level=level).tangent is not None for tensor in tensors]


def _register_public_autograd(
    basis: Basis, forward: Callable[..., Tensor], backward: Callable[..., tuple[Tensor, ...]]
) -> None:
    tensor_count = 1 + len(basis.parameters)

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:tensor_count])
        ctx.channel_dim, *ctx.further = inputs[tensor_count:] or (CHANNEL_DIM,)

    def differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (
            *_gradients(basis, backward, ctx.needs_input_grad, grad, *ctx.saved_tensors, ctx.channel_dim),
            None,
            *(None for _ in ctx.further),
        )

    torch.library.register_autograd(f"{NAMESPACE}::{basis.name}", differentiate, setup_context=save, lib=_LIBRARY)


def _batching_rule(overload: Any, parameter_count: int) -> Callable[..., tuple[Any, Any]]:
    """The rule by which `torch.vmap` runs an operator once for a batch.

    Each member of the batch becomes one group, or as many groups as it has itself.
    """
    gives_gradients = len(overload._schema.returns) > 1
    value_count = 1 + gives_gradients
    tensor_count = value_count + parameter_count

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
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
    """The tensor with the batch dimension at `at`; it is added by expansion if the tensor has none."""
    if dim is not None:
        return tensor.movedim(dim, at)
    return tensor.unsqueeze(at).expand(*tensor.shape[:at], size, *tensor.shape[at:])


for _basis in BASES.values():
    register(_basis)
