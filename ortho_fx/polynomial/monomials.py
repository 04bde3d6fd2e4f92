"""Dense polynomials in several variables: tensors of coefficients, and a product that needs no dictionary.

The monomials of n variables are in graded order: by degree, then lexicographically with powers of the first variable
first (1, x0, x1, x0^2, x0 x1, x1^2 ...). With t_m the sum of the last m exponents, the place of a monomial is
    rank = sum_{m=1..n} C(t_m + m - 1, m).
The t of a product is the sum of the t of its factors, so n look-ups give the place of each term of a product. The
monomials up to a degree are the first of those up to any higher degree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ortho_fx.errors import OrthoFxError

Integers = NDArray[np.int64]


def tail_sums(exponents: Integers) -> Integers:
    """t_1 .. t_n of each row of exponents (terms, n)."""
    return np.cumsum(exponents[:, ::-1], axis=1)


def ranks(tails: Integers) -> Integers:
    """The places, of shape (terms,), of the monomials with these t_1 .. t_n."""
    places = np.zeros(len(tails), dtype=np.int64)
    for m in range(1, tails.shape[1] + 1):
        highest = int(tails[:, m - 1].max(initial=0))
        table = np.array([math.comb(t + m - 1, m) for t in range(highest + 1)], dtype=np.int64)
        places += table[tails[:, m - 1]]
    return places


@dataclass
class Monomials:
    """The monomials of some variables, in graded order, listed up to the largest degree that was asked for.

    Args:
        variables: n, one or more.
        most: the largest allowed number of coefficients in one tensor.
    """

    variables: int
    most: int

    def __post_init__(self) -> None:
        self._exponents: Integers = np.zeros((1, self.variables), dtype=np.int64)
        self._degree = 0

    def count(self, degree: int) -> int:
        """C(n + degree, degree)."""
        return math.comb(self.variables + degree, degree)

    def exponents(self, degree: int) -> Integers:
        """The exponents (terms, n) of the monomials up to a degree."""
        while self._degree < degree:
            last = self._exponents[self.count(self._degree - 1) if self._degree else 0 :]
            # x_k times the monomials of one degree less that hold no variable before x_k; they are the last of them.
            parts = []
            for k in range(self.variables):
                part = last[len(last) - math.comb(self.variables - k + self._degree - 1, self._degree) :].copy()
                part[:, k] += 1
                parts.append(part)
            self._exponents = np.concatenate([self._exponents, *parts])
            self._degree += 1
        return self._exponents[: self.count(degree)]

    def check(self, degree: int, values: int) -> None:
        """Raises an `OrthoFxError` if this many polynomials of a degree have too many coefficients."""
        if (size := self.count(degree) * values) > self.most:
            raise OrthoFxError(
                f"{values} polynomials of degree {degree} in {self.variables} inputs have {self.count(degree)} terms "
                f"and {size} coefficients; the limit is {self.most}"
            )


@dataclass(frozen=True)
class Dense:
    """An array of polynomials up to one degree: `coefficients` has the shape (terms, *shape), in float64."""

    monomials: Monomials
    degree: int
    coefficients: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.coefficients.shape[1:]

    def with_coefficients(self, coefficients: Tensor) -> Dense:
        return Dense(self.monomials, self.degree, coefficients)

    def raised(self, degree: int) -> Dense:
        """The same polynomials, padded with zero coefficients up to a higher degree."""
        self.monomials.check(degree, self.shape.numel())
        more = self.monomials.count(degree) - len(self.coefficients)
        zeros = self.coefficients.new_zeros(more, *self.shape)
        return Dense(self.monomials, degree, torch.cat([self.coefficients, zeros]))

    def plus_constant(self, constant: Any) -> Dense:
        """The sum with a number, or with a tensor that broadcasts to the shape."""
        constant = torch.as_tensor(constant, dtype=torch.float64)
        shape = torch.broadcast_shapes(self.shape, constant.shape)
        aligned = self.coefficients.reshape(-1, *(1,) * (len(shape) - len(self.shape)), *self.shape)
        total = aligned.expand(-1, *shape).clone()
        total[0] += constant
        return self.with_coefficients(total)

    def __add__(self, other: Dense) -> Dense:
        degree = max(self.degree, other.degree)
        return Dense(self.monomials, degree, self.raised(degree).coefficients + other.raised(degree).coefficients)

    def __neg__(self) -> Dense:
        return self.with_coefficients(-self.coefficients)

    def __mul__(self, other: Dense) -> Dense:
        """The elementwise product."""
        few, many = sorted((self, other), key=lambda factor: factor.degree)
        degree = few.degree + many.degree
        shape = torch.broadcast_shapes(few.shape, many.shape)
        self.monomials.check(degree, shape.numel())
        product = self.coefficients.new_zeros(self.monomials.count(degree), *shape)
        tails = tail_sums(self.monomials.exponents(many.degree))
        for tail, coefficient in zip(tails, few.coefficients, strict=False):
            if coefficient.any():
                # The products with one term have distinct places, in the order of the other factor's terms.
                product.index_add_(0, torch.from_numpy(ranks(tails + tail)), many.coefficients * coefficient)
        return Dense(self.monomials, degree, product)
