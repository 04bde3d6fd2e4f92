"""The operators `torch.ops.ortho_fx.<basis>(x, *parameters, channel_dim)`: one node in a graph, with its own backward.

Each basis gets two operators, `<basis>` and `<basis>_backward`, that save the input and the parameters and nothing
else. In eager mode they run in blocks that stay in the cache, without intermediate results of the tensor's size. A
graph of them has two ways on. Inductor lowers them by `ortho_fx.lowering`, which a trace imports when it meets the
first of them. For whatever else traces below autograd (`torch.export`'s `run_decompositions`, other backends) their
formulas are registered on the operators as their decompositions.

Parameters of shape (size,) make one expansion for the whole tensor. Those of shape (size, groups) make one for each
group of neighbouring channels: the input's dimension `channel_dim` is split into groups, and gradients are summed over
everything else.

Arithmetic runs in float32 for half-precision inputs and in the input's dtype otherwise; the output has the input's
dtype, and in float16 stays at its largest number where it would be infinite. Under autocast an operator follows its
input, as `F.gelu` does.

Derivatives of every order and kind are exact, `torch.func`'s transforms included. When a backward is itself to be
differentiated, the differentiable formula stands in for the backward operator; in forward mode the formula stands in
for the forward one. `torch.vmap` makes each member of the batch a group of channels of one call. The autograd kernel
is our own: that of `torch.library.register_autograd` neither nests in `torch.func.grad` (pytorch issue 168393) nor
knows the forward mode.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._decomp import meta_table
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
        while at > 0 and _is_short(math.prod(sizes[at:])):
            at -= 1
    else:
        at = order.index(channel_dim % x.dim())
    behind = math.prod(sizes[at:]) // groups
    return x.permute(order).reshape(math.prod(sizes[:at]), groups, behind)


def _is_short(row: int | torch.SymInt) -> bool:
    """Whether a row is known to be too short for a loop of its own."""
    if isinstance(row, int):
        return row < _ROW
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(row < _ROW)


def join(parts: Tensor, like: Tensor, order: Sequence[int]) -> Tensor:
    """What `split` took apart: the tensor in the shape and the order of memory of `like`."""
    places = [order.index(dim) for dim in range(like.dim())]
    return parts.reshape([like.shape[dim] for dim in order]).permute(places)


def groups_of(parameters: Sequence[Tensor]) -> int | None:
    """The number of groups that parameters are for; None where they are for the whole tensor."""
    return parameters[0].shape[1] if parameters[0].dim() > 1 else None


def _rounded(y: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float16:
        largest = torch.finfo(dtype).max
        y = y.clamp(-largest, largest)
    return y.to(dtype)


def collect(basis: Basis, sums: Tensor, *parameters: Tensor) -> list[Tensor]:
    """The gradients of the learnable parameters, in their dtypes, from the terms summed over each group."""
    sums = sums.reshape(sums.shape[0], *parameters[0].shape[1:])
    gradients = basis.collect(sums, *(parameter.to(sums.dtype) for parameter in parameters))
    learned = [p for p, described in zip(parameters, basis.parameters, strict=True) if described.learnable]
    if {p.dtype for p in learned} == {learned[0].dtype} != {sums.dtype}:
        # One cast, not one for each.
        gradients = torch.cat(list(gradients)).to(learned[0].dtype).split([p.shape[0] for p in learned])
    return [gradient.to(parameter.dtype) for gradient, parameter in zip(gradients, learned, strict=True)]


def _forward_formula(basis: Basis) -> Callable[..., Tensor]:
    """The forward operator in differentiable tensor operations."""

    def forward(x: Tensor, *parameters: Tensor, channel_dim: int) -> Tensor:
        dtype, order = compute_dtype(x.dtype), memory_order(x)
        values = [p.to(dtype) for p in basis.prepare(dtype, *parameters)]
        groups = groups_of(parameters)
        if groups is None:
            return _rounded(basis.evaluate(x.to(dtype), *values), x.dtype)
        parts = split(x.to(dtype), order, groups, channel_dim)
        return join(_rounded(basis.evaluate(parts, *(p.unsqueeze(-1) for p in values)), x.dtype), x, order)

    return forward


def backward_of_parts(basis: Basis, grad: Tensor, x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of x, and the terms summed over each group.

    Tensors are as `split` returns them, and parameters as `Basis.prepare` does.
    """
    dtype = compute_dtype(x.dtype)
    values = [p.to(dtype) if p.dim() == 1 else p.to(dtype).unsqueeze(-1) for p in parameters]
    grad_x, terms = basis.derivatives(grad.to(dtype), x.to(dtype), *values)
    return grad_x().to(x.dtype), torch.stack([term().sum((0, 2)) for term in terms])


def _backward_formula(basis: Basis) -> Callable[..., tuple[Tensor, ...]]:
    """The backward operator in differentiable tensor operations."""

    def backward(grad: Tensor, x: Tensor, *parameters: Tensor, channel_dim: int) -> tuple[Tensor, ...]:
        order, groups = memory_order(x), groups_of(parameters)
        parts = [split(tensor, order, groups, channel_dim) for tensor in (grad, x)]
        grad_x, sums = backward_of_parts(basis, *parts, *basis.prepare(compute_dtype(x.dtype), *parameters))
        return join(grad_x, x, order), *collect(basis, sums, *parameters)

    return backward


# Elements that a row of a tensor which is one group has at least.
_ROW = 256
# Elements of a block for each thread: a few blocks of them fit into a core's second-level cache.
_BLOCK = 131072


def _blocks(x: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of shape [before, groups, behind] in pieces along the first dimension, or flat ones."""
    size = _BLOCK * torch.get_num_threads() if x.device.type == "cpu" else x.numel()
    rows = max(1, size * x.shape[0] // max(1, x.numel()))
    return zip(*(tensor.split(rows) for tensor in (x, *others)), strict=True)


def _flat(parts: Tensor, groups: int | None) -> Tensor:
    return parts.reshape(-1) if groups is None else parts


def _numbers(prepared: Sequence[Tensor], dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
    """Parameters as formulas take them, number by number: without dimensions, or of shape [groups, 1]."""
    return [(p if p.dim() == 1 else p.unsqueeze(-1)).to(dtype).unbind() for p in prepared]


def forward_of_prepared(basis: Basis, x: Tensor, *prepared: Tensor, channel_dim: int) -> Tensor:
    """y(x) in blocks, for parameters as `Basis.prepare` returns them."""
    groups, output = groups_of(prepared), torch.empty_like(x)
    dtype, order = compute_dtype(x.dtype), memory_order(output)
    values = _numbers(prepared, dtype)
    parts, target = (_flat(split(tensor, order, groups, channel_dim), groups) for tensor in (x, output))
    for block, place in _blocks(parts, target):
        place.copy_(_rounded(basis.evaluate(block.to(dtype), *values), x.dtype))
    return output


def _forward_kernel(basis: Basis) -> Callable[..., Tensor]:
    def forward(x: Tensor, *parameters: Tensor, channel_dim: int) -> Tensor:
        prepared = basis.prepare(compute_dtype(x.dtype), *parameters)
        return forward_of_prepared(basis, x, *prepared, channel_dim=channel_dim)

    return forward


def _backward_kernel(basis: Basis) -> Callable[..., tuple[Tensor, ...]]:
    def backward(grad: Tensor, x: Tensor, *parameters: Tensor, channel_dim: int) -> tuple[Tensor, ...]:
        dtype, groups = compute_dtype(x.dtype), groups_of(parameters)
        output = torch.empty_like(x)
        order, values = memory_order(output), _numbers(basis.prepare(dtype, *parameters), dtype)
        others = (0,) if groups is None else (0, 2)
        grad, parts, target = (_flat(split(tensor, order, groups, channel_dim), groups) for tensor in (grad, x, output))
        sums = []
        for block_grad, block, place in _blocks(grad, parts, target):
            grad_x, terms = basis.derivatives(block_grad.to(dtype), block.to(dtype), *values)
            place.copy_(grad_x())
            sums.append(torch.stack([term().sum(others) for term in terms]))
        return output, *collect(basis, torch.stack(sums).sum(0), *parameters)

    return backward


def schemas(basis: Basis) -> tuple[str, str]:
    """The arguments and results of a basis' forward and backward operators."""
    tensors = ", ".join(["Tensor x", *(f"Tensor {parameter.name}" for parameter in basis.parameters)])
    results = ", ".join(["Tensor"] * (1 + len(basis.learnable)))
    at = f"int channel_dim={CHANNEL_DIM}"
    return f"({tensors}, {at}) -> Tensor", f"(Tensor grad, {tensors}, {at}) -> ({results})"


def _register(basis: Basis) -> None:
    tensor_count = 1 + len(basis.parameters)
    kinds: Sequence[tuple[str, int, Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = (
        (basis.name, tensor_count, _forward_kernel(basis), _forward_formula(basis), _forward_shapes),
        (
            f"{basis.name}_backward",
            tensor_count + 1,
            _backward_kernel(basis),
            _backward_formula(basis),
            _backward_shapes(basis),
        ),
    )
    for (name, count, kernel, formula, shapes), schema in zip(kinds, schemas(basis), strict=True):
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        # Autograd takes CompositeExplicit kernels as backend kernels and keeps the kernel registered below; the
        # CompositeImplicit entry, which only tracing below autograd reads, is the decomposition.
        _LIBRARY.impl(name, by_position(kernel, count), "CompositeExplicitAutograd")
        overload = _overload(name)
        overload.py_impl(torch._C.DispatchKey.CompositeImplicitAutograd)(
            by_position(_decomposition(name, formula), count)
        )
        # Fake tensors would run the decomposition, were there no entry in the table of shapes.
        torch.library.register_fake(f"{NAMESPACE}::{name}", shapes, lib=_LIBRARY)
        meta_table[overload] = shapes
        rule = _batching_rule(overload, len(basis.parameters))
        torch.library.register_vmap(f"{NAMESPACE}::{name}", rule, lib=_LIBRARY)
    formulas = (by_position(formula, count) for _, count, _, formula, _ in kinds)
    _LIBRARY.impl(basis.name, _autograd_kernel(basis, *formulas), "Autograd", with_keyset=True)


# What stands for each operator in a graph for Inductor, by the operator's name, or NotImplemented where the formula has
# to: `ortho_fx.lowering` fills it.
LOWERED: dict[str, Callable[..., Any]] = {}


def _decomposition(name: str, formula: Callable[..., Any]) -> Callable[..., Any]:
    """How a trace goes on below autograd: as Inductor lowers it, or in plain tensor operations."""

    def decompose(*tensors: Tensor, channel_dim: int) -> Any:
        lowered = LOWERED[name](*tensors, channel_dim=channel_dim) if _is_for_inductor() else NotImplemented
        return formula(*tensors, channel_dim=channel_dim) if lowered is NotImplemented else lowered

    return decompose


def _is_for_inductor() -> bool:
    lowering = sys.modules.get("ortho_fx.lowering")
    if lowering is None:
        return False
    from torch.fx.experimental.proxy_tensor import get_proxy_mode  # takes SymPy with it, and no import of ours should

    tracing = get_proxy_mode()
    # Inductor's table of decompositions, and no other, has what `ortho_fx.lowering` has put there.
    return tracing is not None and lowering.MARK in getattr(tracing, "decomposition_table", ())


def by_position(kernel: Callable[..., Any], tensor_count: int) -> Callable[..., Any]:
    """The kernel for a dispatcher, which does not pass the arguments that have their defaults."""
    return lambda *arguments: kernel(
        *arguments[:tensor_count], channel_dim=arguments[-1] if len(arguments) > tensor_count else CHANNEL_DIM
    )


def _forward_shapes(x: Tensor, *_: Any) -> Tensor:
    _meet_inductor()
    return torch.empty_like(x)


def _backward_shapes(basis: Basis) -> Callable[..., tuple[Tensor, ...]]:
    def shapes(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        learned = (p for p, described in zip(rest, basis.parameters, strict=False) if described.learnable)
        return torch.empty_like(x), *(torch.empty_like(p, memory_format=torch.contiguous_format) for p in learned)

    return shapes


def _meet_inductor() -> None:
    """Registers the lowerings when a first graph is traced under Dynamo: Inductor may be what the graph is for.

    Not at import, which would take Inductor's own import with it, a second and more.
    """
    if "torch._dynamo" in sys.modules and "ortho_fx.lowering" not in sys.modules:
        with torch.utils._python_dispatch._disable_current_modes():
            importlib.import_module("ortho_fx.lowering")


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
    here = Path(__file__)
    files = [here, here.with_name("lowering.py"), *sorted((here.parent / "bases").glob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


for _basis in BASES.values():
    _register(_basis)

# AOTAutograd's cache on disk is keyed by the operators' names, not by what they decompose to: without a tag, another
# version of these formulas would be answered with code compiled from the old ones.
torch.compiler.config.cache_key_tag += f"ortho_fx-{_formulas_digest()}"
