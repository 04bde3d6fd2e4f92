"""Chebyshev expansions, y(x) = sum_{k=0..n} a_k T_k(s (x - c)), with a fixed centre c and scale s.

T_k are the Chebyshev polynomials of the first kind. All are within [-1, 1] where |x - c| <= 1 / s, so the coefficients
of all orders have one size there. Beyond that they grow as fast as other polynomials. The start has c = 0 and
s = 1 / 4; calibration and fits move both with the inputs.

T_k' = k U_{k-1}, with U_k the polynomials of the second kind. Both follow from p_k = 2 t p_{k-1} - p_{k-2}.

The frozen form is the same polynomial in powers of x by Horner's rule, if that rounds about as little.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from numpy.polynomial import Chebyshev as Series
from numpy.polynomial import Polynomial
from torch import Tensor

from ortho_fx.bases.basis import Basis
from ortho_fx.bases.folded import Folded
from ortho_fx.bases.formula import Parameter, Term, Together, Value, multiply_add
from ortho_fx.bases.hermite import HERMITE, MOST_POWERS, horner_error, polynomial_together, probed
from ortho_fx.bases.numeric import sampled
from ortho_fx.bases.stable import stable
from ortho_fx.numerics.least_squares import ROUNDING, Problem, damped
from ortho_fx.numerics.moments import Array, Bounds, Moments, Values, clamped

# The reach of the start, in standard deviations.
_REACH = 4.0
# The orders with which an expansion starts; the coefficients of higher orders start at zero.
_STARTED = 8
# Horner's rule replaces the recurrence if its rounding error is at most this multiple of the recurrence's error.
_HORNER_ERROR = 4.0


class _Polynomials:
    """T_0, T_1, ... at t; or U_0, U_1, ... if the second one is 2 t."""

    def __init__(self, t: Value, second: Value) -> None:
        self._twice, self._values = 2.0 * t, [1.0, second]

    def __getitem__(self, k: int) -> Value:
        values = self._values
        while len(values) <= k:
            values.append(self._twice * values[-1] - values[-2])
        return values[k]


@functools.cache
def _monomials(degree: int) -> Array:
    """The coefficients of t^j in T_k, in row j and column k."""
    columns = [np.polynomial.chebyshev.cheb2poly([0.0] * k + [1.0]) for k in range(degree + 1)]
    return np.stack([np.pad(column, (0, degree + 1 - len(column))) for column in columns], axis=1)


@functools.cache
def _derivative(degree: int) -> Array:
    """The coefficients of T_j in T_k', in row j and column k; the last row is 0."""
    columns = [np.polynomial.chebyshev.chebder([0.0] * k + [1.0]) for k in range(degree + 1)]
    return np.stack([np.pad(column, (0, degree + 1 - len(column))) for column in columns], axis=1)


class Chebyshev(Basis):
    colour = "#56B4E9"
    closed_form = True
    reach = 8.0
    fits_in_units = True

    def evaluate(self, x: Value, *parameters: Value) -> Value:
        a, centre, scale = parameters
        t = (x - centre[0]) * scale[0]
        polynomials = _Polynomials(t, t)
        y = multiply_add(a[1], t, a[0])
        for k in range(2, len(a)):
            y = multiply_add(a[k], polynomials[k], y)
        return y

    def derivatives(self, grad: Value, x: Value, *parameters: Value) -> tuple[Term, list[Term]]:
        a, centre, scale = parameters
        t = (x - centre[0]) * scale[0]
        first, second = _Polynomials(t, t), _Polynomials(t, 2.0 * t)

        def grad_x() -> Value:
            slope = a[1]
            for k in range(2, len(a)):
                slope = multiply_add(a[k] * float(k), second[k - 1], slope)
            return grad * (slope * scale[0])

        return grad_x, [lambda: grad, *(lambda k=k: grad * first[k] for k in range(1, len(a)))]

    def slope(self, *parameters: Tensor) -> tuple[Tensor, ...]:
        """The coefficients of the derivative with respect to t, times s."""
        a, centre, scale = parameters
        table = torch.as_tensor(_derivative(len(a) - 1), dtype=a.dtype, device=a.device)
        return scale * (table @ a.reshape(len(a), -1)).view_as(a), centre, scale

    def together(self, x: Tensor, *parameters: Tensor) -> Together | None:
        a, centre, scale = parameters
        if len(a) - 1 > MOST_POWERS:
            return None
        value, slope, terms = polynomial_together((x - centre[0]) * scale[0], _monomials(len(a) - 1), a)
        return Together(value, lambda: slope() * scale[0], terms)

    def moments(self, values: Values, bounds: Bounds | None = None) -> Moments:
        return clamped(lambda x: sampled(self, values, x), bounds or (-12.0, 12.0), len(values["coefficients"]))

    def start(self, degree: int, bounds: Bounds | None = None, tied: bool = False) -> dict[str, Array]:
        """The polynomial of the Hermite start of the same degree, at most 8."""
        coefficients = np.zeros(degree + 1)
        series = HERMITE.series(HERMITE.start(min(degree, _STARTED)))
        series = series.convert(kind=Polynomial).convert(kind=Series, domain=[-_REACH, _REACH])
        coefficients[: len(series.coef)] = series.coef
        values = {"coefficients": coefficients, "centre": np.zeros(1), "scale": np.full(1, 1 / _REACH)}
        return stable(self, values, bounds)

    def affine(self, values: Values, scale: float, shift: float) -> dict[str, Array]:
        coefficients = scale * values["coefficients"]
        coefficients[0] += shift
        return {**values, "coefficients": coefficients}

    def straightened(self, values: Values, share: float, slope: float) -> dict[str, Array]:
        """Exact: x = c + T_1 / s."""
        coefficients, line = share * values["coefficients"], (1 - share) * slope
        coefficients[0] += line * values["centre"][0]
        coefficients[1] += line / values["scale"][0]
        return {**values, "coefficients": coefficients}

    def rescale(self, values: Values, mean: float, std: float) -> dict[str, Array]:
        """Exact: it changes centre and scale."""
        return {
            "coefficients": std * values["coefficients"],
            "centre": mean + std * values["centre"],
            "scale": values["scale"] / std,
        }

    def fit(self, problem: Problem, degree: int, tied: bool = False) -> dict[str, Array]:
        """Linear least squares, scaled to the nodes that have weight."""
        heavy = problem.z[problem.weight > 1e-6 * problem.weight.max()]
        centre, reach = float(heavy.max() + heavy.min()) / 2, float(np.ptp(heavy)) / 2 or 1.0
        t = (problem.z - centre) / reach
        values = np.asarray(np.polynomial.chebyshev.chebvander(t, degree), dtype=np.float64)
        slopes: Array = np.stack([Series.basis(k).deriv()(t) / reach for k in range(degree + 1)], axis=1)
        matrix = problem.weighted(values, slopes * problem.inside[:, None])
        length = np.linalg.norm(matrix, axis=0)
        length[length == 0] = 1.0
        coefficients = damped(matrix / length, problem.target, np.full(degree + 1, ROUNDING)) / length
        return {"coefficients": coefficients, "centre": np.array([centre]), "scale": np.array([1 / reach])}

    def fold(self, values: Values, interval: Bounds | None, dtype: torch.dtype) -> Folded | None:
        a, x = values["coefficients"], probed(interval)
        columns = [self._polynomial({name: value[:, g] for name, value in values.items()}) for g in range(a.shape[1])]
        c = np.stack(columns, axis=1)
        # Each step of the recurrence rounds, and the polynomials of higher orders carry the errors on.
        t = (x[:, None] - values["centre"]) * values["scale"]
        sizes = np.abs(np.polynomial.chebyshev.chebvander(t, len(a) - 1) * a.T).sum(axis=-1)
        stored = (c == 0) | (np.abs(c) >= torch.finfo(dtype).tiny)
        if stored.all() and (horner_error(c, x) <= _HORNER_ERROR * len(a) * sizes).all():
            return "polynomial", {"monomial_coefficients": c}
        return None

    def _polynomial(self, values: Values) -> Array:
        """The coefficients of the powers of x."""
        polynomial = self.series(values).coef
        return np.concatenate([polynomial, np.zeros(len(values["coefficients"]) - len(polynomial))])

    def series(self, values: Values) -> Any:
        centre, scale = values["centre"][0], values["scale"][0]
        return Series(values["coefficients"])(Polynomial([-centre * scale, scale]))

    def remedies(self, clamp: float | None) -> tuple[str, ...]:
        return ("clamp=4",) if clamp is None else ()


CHEBYSHEV = Chebyshev(
    name="chebyshev",
    title="Chebyshev",
    parameters=(
        Parameter("coefficients", offset=1),
        Parameter("centre", learnable=False, scalar=True),
        Parameter("scale", learnable=False, scalar=True),
    ),
    degrees=range(1, 33),
    default_degree=3,
)
