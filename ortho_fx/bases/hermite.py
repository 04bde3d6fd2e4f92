"""Hermite expansions, y(x) = sum_{k=0..n} a_k P_k(x) with P_k = He_k / k! (probabilists' Hermite polynomials).

P_k = (x P_{k-1} - P_{k-2}) / k and P_k' = P_{k-1}: the value, the derivative and the gradient of every coefficient
come out of one recurrence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ortho_fx.bases.basis import Basis, Parameter, Reduce


def polynomials(x: Tensor, count: int) -> list[Tensor]:
    """P_1(x), ..., P_count(x), each of the shape of `x`; P_0 = 1 is left to the caller."""
    values = [x]
    for k in range(2, count + 1):
        previous = values[-2] if k > 2 else 1.0
        values.append((x * values[-1] - previous) * (1.0 / k))
    return values[:count]


class Hermite(Basis):
    def evaluate(self, x: Tensor, *parameters: Tensor) -> Tensor:
        (coefficients,) = parameters
        degree = coefficients.shape[0] - 1
        y = coefficients[0] + coefficients[1] * x
        for k, p in enumerate(polynomials(x, degree)[1:], start=2):
            y = y + coefficients[k] * p
        return y

    def gradients(self, grad: Tensor, x: Tensor, reduce: Reduce, *parameters: Tensor) -> Sequence[Tensor]:
        (coefficients,) = parameters
        degree = coefficients.shape[0] - 1
        values = polynomials(x, degree)
        slope = coefficients[1].expand_as(x)
        for k in range(2, degree + 1):
            slope = slope + coefficients[k] * values[k - 2]
        grad_x = grad * slope
        return grad_x, torch.stack([reduce(grad), *(reduce(grad * p) for p in values)])


HERMITE = Hermite(
    name="hermite",
    title="Hermite",
    parameters=(Parameter("coefficients", offset=1),),
    degrees=range(1, 33),
    default_degree=3,
)
