"""The operators in plain tensor operations, in a form that Inductor fuses well without private interfaces.

Operators compile to this form if our own lowering is not used. The forward is one elementwise expression. The backward
sums in two stages: first within chunks whose size divides the tensor exactly, then over the chunks. On a CPU, Inductor
fuses an elementwise loop into a reduction only if it comes first and has the same loops. Two details make the backward
one pass over the tensor there:

- The input gradient is written, in the shape of the input, before the sums.
- `where(x[:, :1] > 0, g, g)` changes no value, but makes each row of the input gradient depend on the first element of
  the row. So its loops over rows and columns are not merged, and match those of the sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ortho_fx.bases import Basis
from ortho_fx.operators import parts
from ortho_fx.operators.values import Value

_OPERATIONS = SimpleNamespace(
    constant=lambda number, dtype: number,
    to_dtype=lambda tensor, dtype: tensor.to(dtype),
    add=torch.add,
    sub=torch.sub,
    mul=torch.mul,
    truediv=torch.div,
    gt=torch.gt,
    # Tensors choose between two numbers in float32.
    where=lambda condition, value, other, dtype: torch.where(condition, value, other).to(dtype),
    relu=torch.relu,
    erf=torch.erf,
    exp=torch.exp,
    sigmoid=torch.sigmoid,
    round=torch.round,
    cos=torch.cos,
    sin=torch.sin,
)


# Up to so many rows are selected by comparisons with the row number.
_FEW_ROWS = 16


class _Parameter:
    """A prepared parameter: its numbers, each in a shape that broadcasts to the input."""

    def __init__(self, tensor: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> None:
        self._tensor, self._dtype, self._shape = tensor.to(dtype), dtype, shape

    def __len__(self) -> int:
        return self._tensor.shape[0]

    def __getitem__(self, k: int) -> Value:
        return _value(self._tensor[k].reshape(self._shape))


def _value(tensor: Tensor) -> Value:
    return Value(tensor, tensor.dtype, _OPERATIONS)


def forward(basis: Basis, x: Tensor, *prepared: Tensor, channel_dim: int) -> Tensor:
    """y(x), with the parameters from `Basis.prepare`."""
    dtype, groups = parts.compute_dtype(x.dtype), parts.groups_of(prepared)
    if groups is None:
        y = basis.evaluate(_value(x.to(dtype)), *(_Parameter(p, dtype, ()) for p in prepared)).value
        return parts.rounded(y, x.dtype)
    order = parts.memory_order(x)
    split = parts.split(x.to(dtype), order, groups, channel_dim)
    y = basis.evaluate(_value(split), *(_Parameter(p, dtype, (-1, 1)) for p in prepared)).value
    return parts.join(parts.rounded(y, x.dtype), x, order)


def backward(
    basis: Basis, grad: Tensor, x: Tensor, *prepared: Tensor, finish: Callable[[Tensor], Tensor] = lambda grad_x: grad_x
) -> tuple[Tensor, Tensor]:
    """The gradient of x, after `finish`, and the terms summed over each group.

    `grad` and `x` are from `parts.split`, the parameters from `Basis.prepare`.
    """
    dtype, grouped = parts.compute_dtype(x.dtype), prepared[0].dim() > 1
    (before, groups, behind), terms = x.shape, parts.count_terms(basis, prepared)
    chunk = parts.chunk(x.device.type, before, groups, behind, terms) if isinstance(behind, int) else None
    shape: tuple[int, ...]
    summed: tuple[int, ...]
    within: tuple[int, ...]
    if chunk is None:
        shape, summed, within = x.shape, (0, 2), (-1, 1)
    elif grouped:
        rows, across = chunk
        shape, summed, within = (before // rows, rows, groups, behind // across, across), (1, 4), (1, 1, -1, 1, 1)
    else:
        rows, across = chunk
        shape, summed, within = (before // rows * (behind // across), rows * across), (1,), ()
    values = (_Parameter(p, dtype, within if grouped else ()) for p in prepared)
    pieces = x.to(dtype).reshape(shape)
    gradient, each = basis.derivatives(_value(grad.to(dtype).reshape(shape)), _value(pieces), *values)
    slope = gradient().value
    if chunk is not None and not grouped:
        slope = torch.where(pieces[:, :1] > 0, slope, slope)
    grad_x = finish(slope.reshape(x.shape).to(x.dtype))
    sums = [term().value.sum(summed) for term in each]
    if chunk is None:
        return grad_x, _rows(sums)
    if grouped:
        # All these sums are one kernel. Making rows of the many partial sums first would take longer.
        return grad_x, _rows([partial.sum((0, 2)) for partial in sums])
    return grad_x, _rows(sums).sum(1, keepdim=True)


def _rows(sums: Sequence[Tensor]) -> Tensor:
    """The sums of each term as rows of one tensor, made in the kernel that reads it; a stack would copy each row."""
    if len(sums) > _FEW_ROWS:
        return torch.stack(list(sums))
    number = torch.arange(len(sums), device=sums[0].device).unsqueeze(1)
    rows = sums[0].expand(len(sums), -1)
    for k, row in enumerate(sums[1:], start=1):
        rows = torch.where(number == k, row, rows)
    return rows


def decompositions(
    basis: Basis,
    forward: Callable[..., Tensor],
    backward: Callable[..., tuple[Tensor, Tensor]],
    prepare: Callable[..., tuple[Tensor, ...]],
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Both operators of a basis, from a forward and a backward of prepared parameters, such as the two above.

    `prepare` is `Basis.prepare_for_kernels`, or does the same.
    """

    def whole_forward(
        x: Tensor, *parameters: Tensor, channel_dim: int, prepared: Sequence[Tensor] | None = None
    ) -> Tensor:
        prepared = prepared or prepare(parts.compute_dtype(x.dtype), *parameters)
        return forward(x, *prepared[: len(parameters)], channel_dim=channel_dim)

    def whole_backward(
        grad: Tensor, x: Tensor, *parameters: Tensor, channel_dim: int, prepared: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, ...]:
        order, groups = parts.memory_order(x), parts.groups_of(parameters)
        split = [parts.split(tensor, order, groups, channel_dim) for tensor in (grad, x)]
        prepared = prepared or prepare(parts.compute_dtype(x.dtype), *parameters)
        grad_x, sums = backward(
            *split, *prepared[: len(parameters)], finish=lambda grad_x: parts.join(grad_x, x, order)
        )
        return grad_x, *parts.collect(basis, sums, parameters, prepared)

    return whole_forward, whole_backward
