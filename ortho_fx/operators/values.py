"""The operands of formulas while code is generated: numbers of a kernel, or tensors of a graph.

`Value` has the tensor operations that formulas use. Each calls a function of `operations`, which holds the operations
of Inductor's kernels, or PyTorch's own for tensors. Sine and cosine in float32 are polynomials after one common
reduction of the angle, which is several times cheaper than the C library's functions.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from ortho_fx.bases.formula import TURNS


class Value:
    """A number with the tensor operations that formulas use."""

    def __init__(self, value: Any, dtype: torch.dtype, operations: Any) -> None:
        self.value, self.dtype, self._operations = value, dtype, operations

    def _raw(self, other: Value | float) -> Any:
        return other.value if isinstance(other, Value) else self._operations.constant(other, self.dtype)

    def _of(self, value: Any) -> Value:
        return Value(value, self.dtype, self._operations)

    def constant(self, number: float) -> Value:
        return self._of(self._raw(number))

    def __add__(self, other: Value | float) -> Value:
        return self._of(self._operations.add(self.value, self._raw(other)))

    def __radd__(self, other: float) -> Value:
        return self + other

    def __sub__(self, other: Value | float) -> Value:
        return self._of(self._operations.sub(self.value, self._raw(other)))

    def __rsub__(self, other: float) -> Value:
        return self._of(self._operations.sub(self._raw(other), self.value))

    def __neg__(self) -> Value:
        return self * -1.0

    def __mul__(self, other: Value | float) -> Value:
        return self._of(self._operations.mul(self.value, self._raw(other)))

    def __rmul__(self, other: float) -> Value:
        return self * other

    def multiply_add(self, factor: Value | float, summand: Value | float) -> Value:
        """factor * self + summand: rounded once where the operations are fused."""
        if not getattr(self._operations, "fused", False):
            return self * factor + summand
        return self._of(self._operations.fma(self.value, self._raw(factor), self._raw(summand)))

    def __truediv__(self, other: Value | float) -> Value:
        return self._of(self._operations.truediv(self.value, self._raw(other)))

    def __rtruediv__(self, other: float) -> Value:
        return self._of(self._operations.truediv(self._raw(other), self.value))

    def __gt__(self, other: Value | float) -> Value:
        return self._of(self._operations.gt(self.value, self._raw(other)))

    def __lt__(self, other: Value | float) -> Value:
        return self._of(self._operations.lt(self.value, self._raw(other)))

    def equals(self, other: Value | float) -> Value:
        return self._of(self._operations.eq(self.value, self._raw(other)))

    def where(self, value: Value | float, other: Value | float) -> Value:
        """`value` where this condition holds, and `other` elsewhere."""
        return self._of(self._operations.where(self.value, self._raw(value), self._raw(other), self.dtype))

    def as_number(self) -> Value:
        """1 where this condition holds, and 0 elsewhere."""
        return self._of(self._operations.to_dtype(self.value, self.dtype))

    def relu(self) -> Value:
        return self._of(self._operations.relu(self.value))

    def erf(self) -> Value:
        return self._of(self._operations.erf(self.value))

    def exp(self) -> Value:
        return self._of(self._operations.exp(self.value))

    def sigmoid(self) -> Value:
        return self._of(self._operations.sigmoid(self.value))

    def maximum(self, other: Value | float) -> Value:
        return self._of(self._operations.maximum(self.value, self._raw(other)))

    def minimum(self, other: Value | float) -> Value:
        return self._of(self._operations.minimum(self.value, self._raw(other)))

    def cos(self) -> Value:
        return self._in_turns.cos_of_turns() if self.counts_turns else self._of(self._operations.cos(self.value))

    def sin(self) -> Value:
        return self._in_turns.sin_of_turns() if self.counts_turns else self._of(self._operations.sin(self.value))

    @property
    def counts_turns(self) -> bool:
        """Whether sine and cosine are polynomials of an angle in turns, so that it had better be given in turns."""
        return self.dtype == torch.float32

    @functools.cached_property
    def _in_turns(self) -> Value:
        return self * TURNS

    def cos_of_turns(self) -> Value:
        """cos(2 pi t), for t in float32."""
        _, square = self._reduced
        return _horner(square, _COSINE)

    def sin_of_turns(self) -> Value:
        """sin(2 pi t), for t in float32."""
        reduced, square = self._reduced
        return reduced * _horner(square, _SINE)

    @functools.cached_property
    def _reduced(self) -> tuple[Value, Value]:
        """These turns without the whole ones, in [-1/2, 1/2], and their square; sine and cosine share both."""
        reduced = self - self._of(self._operations.round(self.value))
        return reduced, reduced * reduced


# sin(2 pi t) / t and cos(2 pi t) as minimax polynomials in t^2 for |t| <= 1/2; their largest errors are 1e-7 and 1e-8.
_SINE = (6.283182819, -41.3414214, 81.59618385, -76.58010027, 41.2053937, -12.27126045)
_COSINE = (0.9999999892, -19.73920453, 64.93911899, -85.45016557, 60.1678318, -25.96831341, 6.529610395)


def _horner(x: Value, coefficients: Sequence[float]) -> Value:
    y = x.multiply_add(coefficients[-1], coefficients[-2])
    for coefficient in reversed(coefficients[:-2]):
        y = y.multiply_add(x, coefficient)
    return y
