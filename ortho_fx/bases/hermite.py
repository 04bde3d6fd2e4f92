"""Hermite expansions, y(x) = sum_{k=0..n} a_k P_k(x) with P_k = He_k / k! (probabilists' Hermite polynomials).

P_k = (x P_{k-1} - P_{k-2}) / k and P_k' = P_{k-1}: the value, the derivative and the gradient of every coefficient
come out of one recurrence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ortho_fx.bases.basis import Basis, Parameter, Term, Value, multiply_add


class Polynomials:
    """P_1, P_2, ... at x, each computed when it is first asked for; P_0 = 1 is left to the caller."""

    def __init__(self, x: Value) -> None:
        self._values = [x]

    def __getitem__(self, order: int) -> Value:
        values = self._values
        while len(values) < order:
            k = len(values) + 1
            values.append(_next(k, values[0], values[-1], values[-2] if k > 2 else 1.0))
        return values[order - 1]


def _next(k: int, x: Value, last: Value, before: Value) -> Value:
    """P_k from the two before it."""
    if not isinstance(x, Tensor):
        return (x * last - before) * (1.0 / k)
    # The same in fewer passes over memory.
    summand = before * (-1.0 / k) if isinstance(before, Tensor) else x.new_full((), -before / k)
    return torch.addcmul(summand, x, last, value=1.0 / k)


class Hermite(Basis):
    def evaluate(self, x: Value, *parameters: Value) -> Value:
        (coefficients,) = parameters
        polynomials = Polynomials(x)
        y = multiply_add(coefficients[1], x, coefficients[0])
        for k in range(2, len(coefficients)):
            y = multiply_add(coefficients[k], polynomials[k], y)
        return y

    def derivatives(self, grad: Value, x: Value, *parameters: Value) -> tuple[Term, list[Term]]:
        (coefficients,) = parameters
        polynomials = Polynomials(x)

        def grad_x() -> Value:
            if len(coefficients) == 2:
                return grad * coefficients[1]
            slope = multiply_add(coefficients[2], x, coefficients[1])
            for k in range(3, len(coefficients)):
                slope = multiply_add(coefficients[k], polynomials[k - 1], slope)
            return grad * slope

        return grad_x, [lambda: grad, *(lambda k=k: grad * polynomials[k] for k in range(1, len(coefficients)))]

    def collect(self, sums: Tensor, parameters: Sequence[Tensor], prepared: Sequence[Tensor]) -> Sequence[Tensor]:
        return (sums,)


HERMITE = Hermite(
    name="hermite",
    title="Hermite",
    parameters=(Parameter("coefficients", offset=1),),
    degrees=range(1, 33),
    default_degree=3,
)
