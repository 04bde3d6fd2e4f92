"""Safe rationals, y(x) = (sum_{k=0..n} a_k x^k) / (1 + (sum_{k=0..n//2} b_k x^k)^2), with everything learnable.

The denominator is at least 1, so there is no pole for any coefficients. It is smooth, so derivatives of every order
exist; the usual 1 + |Q(x)| has kinks at the zeros of Q. At degree n = 5 the degrees are 5 / 4, and the function grows
like |x| at most, unless the last b is zero. At an even degree it is bounded.

The constant b_0 makes the family closed: any affine map of y, and of x, is exact.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from numpy.polynomial import Polynomial

from ortho_fx.bases.basis import Basis
from ortho_fx.bases.folded import Folded
from ortho_fx.bases.formula import Parameter, Term, Value, multiply_add
from ortho_fx.bases.stable import stable
from ortho_fx.numerics.least_squares import ROUNDING, Problem, Separable, cost_of
from ortho_fx.numerics.moments import Array, Bounds, Values

# A fit starts from denominators that bend at these shares of the range, and takes so many steps from each and the best.
_SCALES = (0.7, 1.2, 2.0, 3.5)
_SCANNED_STEPS, _STEPS = 10, 80


def _horner(x: Value, coefficients: Value) -> Value:
    """The polynomial with these coefficients."""
    y = coefficients[len(coefficients) - 1]
    for k in range(len(coefficients) - 2, -1, -1):
        y = multiply_add(y, x, coefficients[k])
    return y


def _slope(x: Value, coefficients: Value) -> Value:
    """The derivative of the polynomial."""
    degree = len(coefficients) - 1
    y = coefficients[degree] * float(degree)
    for k in range(degree - 1, 0, -1):
        y = multiply_add(y, x, coefficients[k] * float(k))
    return y


class SafeRational(Basis):
    colour = "#CC79A7"
    reach = 8.0
    fits_in_units = True

    def evaluate(self, x: Value, *parameters: Value) -> Value:
        a, b = parameters
        root = _horner(x, b)
        return _horner(x, a) / multiply_add(root, root, x * 0.0 + 1.0)

    def derivatives(self, grad: Value, x: Value, *parameters: Value) -> tuple[Term, list[Term]]:
        a, b = parameters

        @functools.cache
        def root() -> Value:
            return _horner(x, b)

        @functools.cache
        def inverse() -> Value:
            """1 / Q, with Q = 1 + root^2."""
            return 1.0 / (root() * root() + 1.0)

        @functools.cache
        def value() -> Value:
            return _horner(x, a) * inverse()

        @functools.cache
        def raised(k: int) -> Value:
            """grad x^k / Q."""
            return grad * inverse() if k == 0 else raised(k - 1) * x

        @functools.cache
        def lowered(k: int) -> Value:
            """grad x^k dy / d(root)."""
            return raised(0) * (value() * root() * -2.0) if k == 0 else lowered(k - 1) * x

        def grad_x() -> Value:
            return raised(0) * _slope(x, a) + lowered(0) * _slope(x, b)

        return grad_x, [
            *(lambda k=k: raised(k) for k in range(len(a))),
            *(lambda k=k: lowered(k) for k in range(len(b))),
        ]

    def start(self, degree: int, bounds: Bounds | None = None, tied: bool = False) -> dict[str, Array]:
        """x (1 - x / 5) / (1 + (x / 2.5)^(2 m)), with m = n // 2, scaled and shifted to gains of 1."""
        values = {"numerator": np.zeros(degree + 1), "denominator": np.zeros(degree // 2 + 1)}
        values["numerator"][1:3] = 1.0, -0.2
        values["denominator"][-1] = 2.5 ** -(degree // 2)
        return stable(self, values, bounds)

    def affine(self, values: Values, scale: float, shift: float) -> dict[str, Array]:
        """Exact: the square of the denominator's polynomial has at most the numerator's degree."""
        root = Polynomial(values["denominator"])
        whole = _padded(1 + root * root, len(values["numerator"]))
        return {**values, "numerator": scale * values["numerator"] + shift * whole}

    def straightened(self, values: Values, share: float, slope: float) -> dict[str, Array]:
        """Exact at an odd degree. At an even one the function is bounded; then it is y(share x) / share."""
        scaled = self.affine(values, share, 0.0)
        root = Polynomial(values["denominator"])
        line = Polynomial([0.0, (1 - share) * slope]) * (1 + root * root)
        size = len(values["numerator"])
        if len(line.coef) > size:
            return self.rescale(values, 0.0, 1 / share)
        return {**scaled, "numerator": scaled["numerator"] + _padded(line, size)}

    def rescale(self, values: Values, mean: float, std: float) -> dict[str, Array]:
        """Exact: both polynomials are expanded around another centre."""
        inner = Polynomial([-mean / std, 1 / std])
        return {
            "numerator": std * _padded(Polynomial(values["numerator"])(inner), len(values["numerator"])),
            "denominator": _padded(Polynomial(values["denominator"])(inner), len(values["denominator"])),
        }

    def fit(self, problem: Problem, degree: int, tied: bool = False) -> dict[str, Array]:
        """Linear in the numerator; the denominator takes Gauss-Newton steps from several starts."""
        heavy = problem.weight > 1e-6 * problem.weight.max()
        reach = float(np.abs(problem.z[heavy]).max()) or 1.0
        t, half = problem.z / reach, degree // 2
        powers, lower = np.vander(t, degree + 1, increasing=True), np.arange(degree + 1) / reach
        # Derivatives with respect to z of the powers of t = z / reach.
        rising = np.concatenate([np.zeros((len(t), 1)), powers[:, :-1]], axis=1) * lower
        inside = problem.inside[:, None]

        def roots(b: Array) -> tuple[Array, Array, Array]:
            root, its_slope = powers[:, : half + 1] @ b, rising[:, : half + 1] @ b
            return root[:, None], its_slope[:, None], 1 / (1 + root[:, None] ** 2)

        def columns(b: Array) -> Array:
            root, its_slope, inverse = roots(b)
            slopes = rising * inverse - powers * (2 * root * its_slope * inverse**2)
            return problem.weighted(powers * inverse, slopes * inside)

        def jacobian(b: Array, a: Array) -> Array:
            root, its_slope, inverse = roots(b)
            top, its_rise = (powers @ a)[:, None], (rising @ a)[:, None]
            factor = -2 * top * root * inverse**2
            its_factor = -2 * (its_rise * root + top * its_slope) * inverse**2
            its_factor += 8 * top * root**2 * its_slope * inverse**3
            some, their_slopes = powers[:, : half + 1], rising[:, : half + 1]
            return problem.weighted(some * factor, (their_slopes * factor + some * its_factor) * inside)

        separable = Separable(columns, jacobian, problem.target, np.full(degree + 1, ROUNDING))
        starts = []
        for scale in _SCALES:
            highest, line = np.zeros(half + 1), np.zeros(half + 1)
            highest[-1], line[:2] = scale**half, (0.5, scale)
            starts += [highest, highest + line]
        scanned = sorted((separable.at(start).improved(_SCANNED_STEPS) for start in starts), key=cost_of)
        best = min((solution.improved(_STEPS) for solution in scanned[:2]), key=cost_of)
        scales = reach ** -np.arange(degree + 1.0)
        return {"numerator": best.linear * scales, "denominator": best.nonlinear * scales[: half + 1]}

    def fold(self, values: Values, interval: Bounds | None, dtype: torch.dtype) -> Folded | None:
        """A polynomial if the denominators are constant."""
        if values["denominator"][1:].any():
            return None
        return "polynomial", {"monomial_coefficients": values["numerator"] / (1 + values["denominator"][0] ** 2)}


def _padded(polynomial: Any, size: int) -> Array:
    """The coefficients of a polynomial, from the constant on."""
    coefficients = polynomial.coef
    return np.concatenate([coefficients, np.zeros(size - len(coefficients))])


SAFE_RATIONAL = SafeRational(
    name="safe_rational",
    title="SafeRational",
    parameters=(Parameter("numerator", offset=1), Parameter("denominator", offset=1, halved=True)),
    degrees=range(2, 17),
    default_degree=5,
)
