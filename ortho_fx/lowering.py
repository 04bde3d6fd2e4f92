"""How Inductor lowers the operators: the formulas of the bases, run on values of the kernel that it generates.

Imported when the first operator is traced under Dynamo, never by `import ortho_fx`. From then on a trace for Inductor,
and for no other backend, turns each operator into a twin in the namespace `ortho_fx_inductor`, which stays in the graph
until it is lowered here:

- The forward is one pointwise node, which fuses with whatever is around it. AOTAutograd's partitioner is told that it
  may be recomputed, as it may any pointwise operator: the backward pass keeps the input alone.
- The backward sees its tensors as [before, groups, behind] in the order of memory. The input gradient is one pointwise
  node; each term of the parameters' gradients is a reduction of chunks whose size divides the tensor exactly, so all of
  them fuse into one kernel that reads the input and the incoming gradient once; one small reduction adds the chunks up.

What is used of `torch._inductor` and of the partitioner is private to PyTorch and used in this file alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._functorch import partitioners
from torch._inductor import config, decomposition, ir
from torch._inductor.lowering import register_lowering
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import ops
from torch.fx.experimental.symbolic_shapes import guard_or_false

from ortho_fx import operators
from ortho_fx.bases import BASES, Basis

NAMESPACE = "ortho_fx_inductor"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


class _Value:
    """A number in a kernel, with the operations of a tensor that formulas use."""

    def __init__(self, value: Any, dtype: torch.dtype) -> None:
        self.value, self.dtype = value, dtype

    def _raw(self, other: _Value | float) -> Any:
        return other.value if isinstance(other, _Value) else ops.constant(other, self.dtype)

    def _of(self, value: Any) -> _Value:
        return _Value(value, self.dtype)

    def __add__(self, other: _Value | float) -> _Value:
        return self._of(ops.add(self.value, self._raw(other)))

    def __radd__(self, other: float) -> _Value:
        return self + other

    def __sub__(self, other: _Value | float) -> _Value:
        return self._of(ops.sub(self.value, self._raw(other)))

    def __mul__(self, other: _Value | float) -> _Value:
        return self._of(ops.mul(self.value, self._raw(other)))

    def __rmul__(self, other: float) -> _Value:
        return self * other

    def __gt__(self, other: _Value | float) -> _Value:
        return self._of(ops.gt(self.value, self._raw(other)))

    def where(self, value: _Value | float, other: _Value | float) -> _Value:
        """Where this condition holds `value`, elsewhere `other`."""
        return self._of(ops.where(self.value, self._raw(value), self._raw(other)))

    def relu(self) -> _Value:
        return self._of(ops.relu(self.value))

    def maximum(self, other: _Value | float) -> _Value:
        return self._of(ops.maximum(self.value, self._raw(other)))

    def minimum(self, other: _Value | float) -> _Value:
        return self._of(ops.minimum(self.value, self._raw(other)))

    def cos(self) -> _Value:
        if self.dtype == torch.float64:
            return self._of(ops.cos(self.value))
        _, square = self._turns
        return _horner(square, _COSINE)

    def sin(self) -> _Value:
        if self.dtype == torch.float64:
            return self._of(ops.sin(self.value))
        turns, square = self._turns
        return turns * _horner(square, _SINE)

    @functools.cached_property
    def _turns(self) -> tuple[_Value, _Value]:
        """This angle in turns, reduced to [-1/2, 1/2], and its square; common to the sine and the cosine."""
        turns = self * (0.5 / math.pi)
        reduced = turns - self._of(ops.round(turns.value))
        return reduced, reduced * reduced


# sin(2 pi t) / t and cos(2 pi t) as polynomials in t^2 for |t| <= 1/2, with the smallest largest error: 1e-7 and 1e-8.
_SINE = (6.283182819, -41.3414214, 81.59618385, -76.58010027, 41.2053937, -12.27126045)
_COSINE = (0.9999999892, -19.73920453, 64.93911899, -85.45016557, 60.1678318, -25.96831341, 6.529610395)


def _horner(x: _Value, coefficients: Sequence[float]) -> _Value:
    y = x * coefficients[-1] + coefficients[-2]
    for coefficient in reversed(coefficients[:-2]):
        y = y * x + coefficient
    return y


class _Parameter:
    """A parameter of the expansion at hand: its numbers as values of the kernel."""

    def __init__(self, tensor: ir.TensorBox, dtype: torch.dtype, group: sympy.Expr | None) -> None:
        self._load, self._dtype = tensor.make_loader(), dtype
        self._size = int(tensor.get_size()[0])
        self._group = [] if group is None else [group]

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, k: int) -> _Value:
        value = self._load([sympy.Integer(k), *self._group])
        return _Value(ops.to_dtype(value, self._dtype), self._dtype)


def _load(tensor: ir.TensorBox, index: Sequence[sympy.Expr], dtype: torch.dtype) -> _Value:
    return _Value(ops.to_dtype(tensor.make_loader()(index), dtype), dtype)


def _lowered_forward(basis: Basis) -> Callable[..., ir.TensorBox]:
    count = len(basis.parameters)

    def lower(x: ir.TensorBox, *rest: Any) -> ir.TensorBox:
        parameters, channel_dim = rest[:count], rest[count] if len(rest) > count else operators.CHANNEL_DIM
        dtype, size = operators.compute_dtype(x.get_dtype()), x.get_size()
        for parameter in parameters:
            parameter.realize()
        groups = parameters[0].get_size()[1] if len(parameters[0].get_size()) > 1 else None

        def inner(index: Sequence[sympy.Expr]) -> Any:
            group = None
            if groups is not None:
                group = index[channel_dim] // (size[channel_dim] // groups)
            values = [_Parameter(parameter, dtype, group) for parameter in parameters]
            y = basis.evaluate(_load(x, index, dtype), *values)
            if x.get_dtype() == torch.float16:
                largest = torch.finfo(torch.float16).max
                y = y.minimum(largest).maximum(-largest)
            return ops.to_dtype(y.value, x.get_dtype())

        return ir.Pointwise.create(device=x.get_device(), dtype=x.get_dtype(), inner_fn=inner, ranges=size)

    return lower


def _divisor(number: sympy.Expr, largest: float) -> int:
    """The largest divisor of a size, or of the known factor of a symbolic one, that is not above `largest`."""
    known = int(sympy.sympify(number).as_coeff_Mul()[0])
    divisors = (d for small in range(1, math.isqrt(known) + 1) if known % small == 0 for d in (small, known // small))
    return max((d for d in divisors if d <= largest), default=1)


def _lowered_backward(basis: Basis) -> Callable[..., tuple[ir.TensorBox, ir.TensorBox]]:
    def lower(grad: ir.TensorBox, x: ir.TensorBox, *parameters: ir.TensorBox) -> tuple[ir.TensorBox, ir.TensorBox]:
        device, out_dtype = x.get_device_or_error(), x.get_dtype()
        dtype = operators.compute_dtype(out_dtype)
        before, groups, behind = map(sympy.sympify, x.get_size())
        for parameter in parameters:
            parameter.realize()
        for tensor in (grad, x):
            tensor.mark_reuse(2)
        count = _count_terms(basis, parameters)
        grouped = len(parameters[0].get_size()) > 1

        def derivatives(index: Sequence[sympy.Expr]) -> tuple[Any, list[Any]]:
            values = [_Parameter(parameter, dtype, index[1] if grouped else None) for parameter in parameters]
            return basis.derivatives(_load(grad, index, dtype), _load(x, index, dtype), *values)

        def grad_x(index: Sequence[sympy.Expr]) -> Any:
            return ops.to_dtype(derivatives(index)[0]().value, out_dtype)

        rows, across = _chunk(device, before, groups, behind, count)
        chunks, parts = before // rows, behind // across
        outer, inner = [chunks, groups, parts], [rows, across]

        def place(index: Sequence[sympy.Expr], within: Sequence[sympy.Expr]) -> list[sympy.Expr]:
            chunk, group, part = index
            row, column = within
            return [chunk * rows + row, group, part * across + column]

        reduction = functools.partial(_sum, device, dtype, ReductionHint.INNER if across != 1 else ReductionHint.OUTER)

        # The input gradient first, so that the scheduler fuses the reductions into it.
        nest = ir.Pointwise.create(
            device=device,
            dtype=out_dtype,
            inner_fn=lambda index: grad_x(place(index[:3], index[3:])),
            ranges=[*outer, *inner],
        )
        strides = [rows * groups * behind, behind, across, groups * behind, sympy.Integer(1)]
        result = _as_written(nest, strides)

        def partial(k: int) -> ir.TensorBox:
            def term(index: Sequence[sympy.Expr], within: Sequence[sympy.Expr]) -> Any:
                return derivatives(place(index[1:], within))[1][k]().value

            box = reduction(term, [sympy.Integer(1), *outer], inner)
            _as_written(box)
            return box

        joined = ir.TensorBox(ir.ConcatKernel.create([partial(k) for k in range(count)], 0))
        load = joined.make_loader()
        sums = reduction(
            lambda index, within: load([index[0], within[0], index[1], within[1]]),
            [sympy.Integer(count), groups],
            [chunks, parts],
        )
        sums.realize()
        layout = ir.FixedLayout(device, out_dtype, [before, groups, behind])
        return ir.TensorBox(ir.ReinterpretView(data=result, layout=layout)), sums

    return lower


def _sum(
    device: torch.device,
    dtype: torch.dtype,
    hint: ReductionHint,
    inner_fn: Callable[..., Any],
    ranges: list[sympy.Expr],
    reduced: list[sympy.Expr],
) -> ir.TensorBox:
    if sympy.prod(reduced) == 1:
        zeros = [sympy.Integer(0) for _ in reduced]
        return ir.Pointwise.create(
            device=device, dtype=dtype, inner_fn=lambda index: inner_fn(index, zeros), ranges=ranges
        )
    # Not Reduction.create, which would split it again, into chunks that need not divide the tensor.
    return ir.TensorBox.create(
        ir.Reduction(
            device=device,
            dtype=dtype,
            inner_fn=inner_fn,
            ranges=ranges,
            reduction_ranges=reduced,
            reduction_type="sum",
            src_dtype=dtype,
            reduction_hint=hint,
        )
    )


class _AsWritten(ir.ComputedBuffer):
    """A buffer whose loops stay as they are: neither merged nor reordered.

    The CPU backend fuses a pointwise node with a reduction where their loops are the same, one by one.
    """

    def simplify_and_reorder(self, *_: Any, **__: Any) -> Any:
        sizes, body, _ = self.get_default_sizes_body()
        return sizes, body


def _as_written(box: ir.TensorBox, strides: Sequence[sympy.Expr] | None = None) -> ir.StorageBox:
    """Makes a buffer of what the box computes, its loops as they are and, where given, its elements so far apart."""
    box.realize()
    storage: Any = box.data
    buffer = storage.data
    if buffer.get_device().type == "cpu":
        buffer.__class__ = _AsWritten
    if strides is not None:
        buffer.layout = ir.FixedLayout(buffer.get_device(), buffer.get_dtype(), buffer.get_size(), strides)
    return storage


def _chunk(
    device: torch.device, before: sympy.Expr, groups: sympy.Expr, behind: sympy.Expr, terms: int
) -> tuple[sympy.Expr, sympy.Expr]:
    """How many rows and columns of [before, groups, behind] a partial sum adds up: divisors of these sizes.

    On a CPU 4096 elements at most, above which its sums go through memory, and of a column of channels 256. On a GPU as
    many as keep partial sums few and processors busy, in a loop with an accumulator for each term; more terms than its
    registers hold are summed up one by one, in chunks too short for a loop.
    """
    if device.type == "cpu":
        largest = 256 if behind == 1 and groups != 1 else 4096
    else:
        largest = 128 if terms > 40 else 16384
    across = sympy.Integer(_divisor(behind, largest)) if behind.is_number else behind
    if across != behind:
        return sympy.Integer(1), across
    rows = sympy.Integer(_divisor(before, largest / int(across)) if across.is_number else 1)
    # Where no chunk of a symbolic size divides it, partial sums would be as many as elements.
    return (before, across) if rows == across == 1 else (rows, across)


def _count_terms(basis: Basis, parameters: Sequence[Any]) -> int:
    """As many as there are learnable numbers."""
    learned = (p for p, described in zip(parameters, basis.parameters, strict=True) if described.learnable)
    return sum(int(parameter.get_size()[0]) for parameter in learned)


def _register(basis: Basis) -> None:
    name = f"{basis.name}_backward"
    tensors = ", ".join(f"Tensor {parameter.name}" for parameter in basis.parameters)
    _LIBRARY.define(f"{basis.name}(Tensor x, {tensors}, int channel_dim) -> Tensor")
    _LIBRARY.define(f"{name}(Tensor grad, Tensor x, {tensors}) -> (Tensor, Tensor)")
    forward = getattr(getattr(torch.ops, NAMESPACE), basis.name)
    backward = getattr(getattr(torch.ops, NAMESPACE), name)

    def prepared(x: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return basis.prepare(operators.compute_dtype(x.dtype), *parameters)

    def decomposed_forward(x: Tensor, *parameters: Tensor, channel_dim: int) -> Tensor:
        return forward(x, *prepared(x, parameters), channel_dim)

    def forward_kernel(x: Tensor, *rest: Any) -> Tensor:
        return operators.forward_of_prepared(basis, x, *rest[:-1], channel_dim=rest[-1])

    def forward_shapes(x: Tensor, *_: Any) -> Tensor:
        return torch.empty_like(x)

    def kernel(grad: Tensor, x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        return operators.backward_of_parts(basis, grad, x, *parameters)

    def shapes(grad: Tensor, x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        learned = (p for p, described in zip(parameters, basis.parameters, strict=True) if described.learnable)
        size = (sum(p.shape[0] for p in learned), x.shape[1])
        sums = x.new_empty(size, dtype=operators.compute_dtype(x.dtype))
        return torch.empty_like(x, memory_format=torch.contiguous_format), sums

    def decomposed(grad: Tensor, x: Tensor, *parameters: Tensor, channel_dim: int) -> Any:
        order, groups = operators.memory_order(x), operators.groups_of(parameters)
        if guard_or_false(x.numel() == 0):
            return NotImplemented
        parts = [operators.split(tensor, order, groups, channel_dim) for tensor in (grad, x)]
        grad_x, sums = backward(*parts, *prepared(x, parameters))
        return operators.join(grad_x, x, order), *operators.collect(basis, sums, *parameters)

    for twin, run, fake in ((basis.name, forward_kernel, forward_shapes), (name, kernel, shapes)):
        _LIBRARY.impl(twin, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{twin}", fake, lib=_LIBRARY)
    operators.LOWERED.update({basis.name: decomposed_forward, name: decomposed})
    register_lowering(forward.default, type_promotion_kind=None)(_lowered_forward(basis))
    register_lowering(backward.default, type_promotion_kind=None)(_lowered_backward(basis))
    partitioners.pointwise_ops().extend((forward, backward))


for _basis in BASES.values():
    _register(_basis)
if config.cpp.max_horizontal_fusion_size == 16:
    # PyTorch's default cuts the backward of Hermite 16 in two; a CPU's registers hold no more sums than these. What a
    # user has chosen stays.
    config.cpp.max_horizontal_fusion_size = 18

# An entry that decomposes nothing, for a trace to be known as one for Inductor. A copy of the table that was made
# before would lack it.
MARK = torch.ops.ortho_fx_inductor.hermite.default
decomposition.decompositions[MARK] = lambda *_: NotImplemented
decomposition.fast_random_decomps.cache_clear()
