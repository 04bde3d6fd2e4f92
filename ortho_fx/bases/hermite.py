"""Hermite expansions, y(x) = sum_{k=0..n} a_k P_k(x) with P_k = He_k / k! (probabilists' Hermite polynomials).

P_k = (x P_{k-1} - P_{k-2}) / k and P_k' = P_{k-1}, so one recurrence gives the value, the derivative and the gradient
of every coefficient.

The frozen form is the same polynomial in powers of x by Horner's rule, with one multiply-add per degree, if that rounds
about as little as the recurrence. Otherwise it is Clenshaw's recurrence, with two multiply-adds per degree and the
factorials in its coefficients. Leading coefficients that are zero are dropped.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.polynomial import HermiteE
from torch import Tensor

from ortho_fx.bases.basis import Basis
from ortho_fx.bases.folded import STEP, Folded
from ortho_fx.bases.formula import Parameter, Term, Together, TorchorthoState, Value, multiply_add, renamed
from ortho_fx.bases.numeric import sampled
from ortho_fx.bases.stable import stable
from ortho_fx.errors import OrthoFxError
from ortho_fx.numerics.least_squares import ROUNDING, Problem, damped
from ortho_fx.numerics.moments import Array, Bounds, Moments, Values, clamped

# Horner's rule replaces the recurrence if its rounding error is at most this multiple of the recurrence's error.
_HORNER_ERROR = 4.0
# Up to this degree `together` adds up powers; they cancel more at higher degrees.
MOST_POWERS = 8


# The coefficients of the monomials of a sum of a_k He_k / k!, from the a_k, by their number. At these degrees Horner's
# rule rounds less than the recurrence.
_MONOMIALS: dict[int, Callable[..., tuple[Any, ...]]] = {
    3: lambda a0, a1, a2: (a0 - a2 * 0.5, a1, a2 * 0.5),
    4: lambda a0, a1, a2, a3: (a0 - a2 * 0.5, a1 - a3 * 0.5, a2 * 0.5, a3 * (1 / 6)),
}


class Polynomials:
    """P_1, P_2, ... at x, each computed at its first use; the caller handles P_0 = 1."""

    def __init__(self, x: Value) -> None:
        self._values = [x]

    def __getitem__(self, order: int) -> Value:
        values = self._values
        while len(values) < order:
            k = len(values) + 1
            values.append(_next(k, values[0], values[-1], values[-2] if k > 2 else 1.0))
        return values[order - 1]


def _next(k: int, x: Value, last: Value, before: Value) -> Value:
    """P_k from P_{k-1} and P_{k-2}."""
    if not isinstance(x, Tensor):
        return (x * last - before) * (1.0 / k)
    # The same formula in fewer passes over memory.
    summand = before * (-1.0 / k) if isinstance(before, Tensor) else x.new_full((), -before / k)
    return torch.addcmul(summand, x, last, value=1.0 / k)


def powers(x: Tensor, degree: int) -> Tensor:
    """1, x, ..., x^degree along a first dimension, in a number of operations that grows as log(degree)."""
    rows, factor = torch.stack([torch.ones_like(x), x]), x
    while len(rows) <= degree:
        factor = factor * factor
        rows = torch.cat([rows, rows * factor])
    return rows[: degree + 1]


def polynomial_together(x: Tensor, monomials: Array, coefficients: Tensor) -> Together:
    """A sum of polynomials. Column k of `monomials` has the coefficients of the powers in polynomial k."""
    degree, table = len(coefficients) - 1, torch.as_tensor(monomials, dtype=x.dtype, device=x.device)
    rows = powers(x, degree)
    weights = (table @ coefficients.flatten(1)).view_as(coefficients)
    orders = torch.arange(1.0, degree + 1, dtype=x.dtype, device=x.device).reshape(-1, *(1 for _ in x.shape))
    return Together(
        lambda: (weights * rows).sum(0),
        lambda: (weights[1:] * orders * rows[:-1]).sum(0),
        lambda: (table.T @ rows.flatten(1)).view_as(rows),
    )


def torchortho_parameters(state: Mapping[str, Tensor], tied: bool = False) -> dict[str, Tensor]:
    """Converts HermiteActivation: y(x) = sum of coefficients_k He_k(x) / k! from k = 0, which is our formula.

    `coeffs` and `grid` (the coefficients and powers of the monomials of each He_k / k!) and `normalization_term` are
    constants. An activation made with clamp=True replaces x by L tanh(x / 2), with L = `clamp.lim_val`.

    Raises:
        OrthoFxError: the state has such a clamp; none of our expansions equals that.
    """
    if "clamp.lim_val" in state:
        limit = state["clamp.lim_val"].item()
        raise OrthoFxError(
            f"clamp.lim_val: no expansion equals one of {limit:.4g} tanh(x / 2), so this state cannot be converted"
        )
    return renamed(state, {"coefficients": "coefficients"})


class Hermite(Basis):
    colour = "#0072B2"
    torchortho = TorchorthoState(
        "HermiteActivation",
        "coeffs",
        torchortho_parameters,
        frozenset({"coefficients", "coeffs", "grid", "normalization_term", "act_init"}),
    )
    closed_form = True

    def evaluate(self, x: Value, *parameters: Value) -> Value:
        (coefficients,) = parameters
        if len(coefficients) in _MONOMIALS:
            # Horner's rule takes fewer steps, and is infinite with the right sign where the sum of terms would be NaN.
            *rest, y = _MONOMIALS[len(coefficients)](*(coefficients[k] for k in range(len(coefficients))))
            for monomial in reversed(rest):
                y = multiply_add(y, x, monomial)
            return y
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

    def slope(self, *parameters: Tensor) -> tuple[Tensor, ...]:
        """P_k' = P_{k-1}: the coefficients of one order more, and at degree 1 a last one of 0."""
        (coefficients,) = parameters
        return (coefficients[1:] if len(coefficients) > 2 else torch.cat([coefficients[1:], coefficients[1:] * 0]),)

    def together(self, x: Tensor, *parameters: Tensor) -> Together | None:
        (coefficients,) = parameters
        degree = len(coefficients) - 1
        if degree > MOST_POWERS:
            return None
        return polynomial_together(x, _monomials(degree), coefficients)

    def moments(self, values: Values, bounds: Bounds | None = None) -> Moments:
        a = np.asarray(values["coefficients"], dtype=np.float64)
        if bounds is None:
            return _moments(a)
        return clamped(lambda x: sampled(self, values, x), bounds, len(a))

    def start(self, degree: int, bounds: Bounds | None = None, tied: bool = False) -> dict[str, Array]:
        """Coefficients a_k = +-0.7^(k-1) (+-1 at degree 2), signs + + - -, scaled and shifted to gains of 1."""
        # Smaller coefficients at higher orders widen the basin from which a signal returns: at degree 3
        # `gains(...).basin` is 3.6, and 2.5 with equal coefficients. The slope is still below 1/2. At degree 2 there is
        # no difference.
        ratio = 0.7 if degree > 2 else 1.0
        order = np.arange(degree + 1)
        coefficients = np.array([1.0, 1.0, -1.0, -1.0])[order % 4] * ratio ** np.maximum(order - 1, 0)
        coefficients[0] = 0.0
        return stable(self, {"coefficients": coefficients}, bounds)

    def paper_start(self, degree: int, tied: bool = False) -> dict[str, Array]:
        constant, scale = factorial_weights(degree, 1)
        return {"coefficients": scale * np.array([constant, *np.ones(degree)])}

    def affine(self, values: Values, scale: float, shift: float) -> dict[str, Array]:
        coefficients = scale * values["coefficients"]
        coefficients[0] += shift
        return {"coefficients": coefficients}

    def straightened(self, values: Values, share: float, slope: float) -> dict[str, Array]:
        coefficients = share * values["coefficients"]
        coefficients[1] += (1 - share) * slope
        return {"coefficients": coefficients}

    def rescale(self, values: Values, mean: float, std: float) -> dict[str, Array]:
        """Exact: the change of variable follows from the generating function exp(x t - t^2 / 2).

        P_n(u x + v) = sum_k u^k h_{n-k} P_k(x), where m h_m = v h_{m-1} + (u^2 - 1) h_{m-2} and h_0 = 1.
        """
        a = np.asarray(values["coefficients"], dtype=np.float64)
        u, v = 1 / std, -mean / std
        h = np.zeros(len(a))
        h[0] = 1.0
        for m in range(1, len(a)):
            h[m] = (v * h[m - 1] + (u**2 - 1) * (h[m - 2] if m > 1 else 0.0)) / m
        return {"coefficients": np.array([std * u**k * (a[k:] @ h[: len(a) - k]) for k in range(len(a))])}

    def fit(self, problem: Problem, degree: int, tied: bool = False) -> dict[str, Array]:
        """Linear least squares; under the density of N(0, 1) it is the projection a_k = E[g(X) He_k(X)].

        Polynomials are fitted in x itself, without rescaling: their rounding errors are known only there.
        """
        return fit_series(problem, degree)

    def fold(self, values: Values, interval: Bounds | None, dtype: torch.dtype) -> Folded:
        return _fold(values["coefficients"], interval, dtype)

    def series(self, values: Values) -> Any:
        a = values["coefficients"]
        return HermiteE(a / np.array([float(math.factorial(k)) for k in range(len(a))]))

    def remedies(self, clamp: float | None) -> tuple[str, ...]:
        # Only polynomials grow faster than their input.
        return ("clamp=4",) if clamp is None else ()


def factorial_weights(degree: int, power: int) -> tuple[float, float]:
    """sqrt(1 - 1 / n!^power), and 1 / sqrt(sum_{k<n} 1 / k!^power)."""
    total = math.fsum(1.0 / math.factorial(k) ** power for k in range(degree))
    return math.sqrt(1.0 - 1.0 / math.factorial(degree) ** power), 1.0 / math.sqrt(total)


def _moments(a: Array) -> Moments:
    # In the orthonormal basis He_k / sqrt(k!) the coefficients are c_k = a_k / sqrt(k!). By partial integration
    # E[(X^2 - 1) g^2] = E[(g^2)''] = 2 E[g'^2] + 2 E[g g''].
    root = np.exp([-0.5 * math.lgamma(k + 1) for k in range(len(a))])
    c = a * root
    first = c[1:] * np.sqrt(np.arange(1, len(a)))
    second = first[1:] * np.sqrt(np.arange(1, len(a) - 1))
    derivative_square = float(first @ first)
    return Moments(
        mean=float(c[0]),
        square=float(c @ c),
        derivative_square=derivative_square,
        mean_growth=float(second[0]) if len(second) else 0.0,
        square_growth=2.0 * (derivative_square + float(c[: len(second)] @ second)),
    )


def fit_series(problem: Problem, degree: int) -> dict[str, Array]:
    z = problem.z
    columns = [np.ones_like(z), z]
    for k in range(2, degree + 1):
        columns.append((z * columns[-1] - columns[-2]) / k)
    basis = np.stack(columns[: degree + 1], axis=1)
    if problem.standard:
        factorials = np.array([math.factorial(k) for k in range(degree + 1)], dtype=float)
        return {"coefficients": factorials * (basis.T @ (problem.weight * problem.value))}
    slopes = np.concatenate([np.zeros((len(z), 1)), basis[:, :-1]], axis=1) * problem.inside[:, None]
    matrix = problem.weighted(basis, slopes)
    length = np.linalg.norm(matrix, axis=0)
    return {"coefficients": damped(matrix / length, problem.target, np.full(degree + 1, ROUNDING)) / length}


def _fold(a: Array, interval: Bounds | None, dtype: torch.dtype) -> Folded:
    degree = max(int(np.flatnonzero(a.any(axis=1)).max(initial=1)), 1)
    a = a[: degree + 1]
    monomials = _monomials(degree)
    c = monomials @ a
    x = probed(interval)
    # c has errors from its summation in float64 and from storage in the dtype, which loses numbers that are too small.
    limits = torch.finfo(dtype)
    stored = np.where(np.abs(c) < limits.tiny, 0.0, torch.from_numpy(c).to(dtype).double().numpy())
    off = (np.abs(monomials) @ np.abs(a) * np.finfo(np.float64).eps + np.abs(c - stored)) / (limits.eps / 2)
    if (horner_error(c, x) + _sum_of_powers(off, x) <= _HORNER_ERROR * recurrence_error(a, x)).all():
        return "polynomial", {"monomial_coefficients": c}
    weights = [1.0 / (math.factorial(k) * STEP**k) for k in range(degree + 1)]
    return "recurrence", {"hermite_coefficients": a * np.array(weights)[:, None]}


def probed(interval: Bounds | None) -> Array:
    """The points at which the rounding of two forms is compared."""
    if interval is None:
        sizes = np.logspace(-3, 3, 241)
        return np.concatenate([-sizes, [0.0], sizes])
    return np.linspace(*interval, 401)


@functools.cache
def _monomials(degree: int) -> Array:
    """The coefficients of x^j in He_k / k!, in row j and column k: (-1)^m / (m! j! 2^m) with m = (k - j) / 2."""
    table = np.zeros((degree + 1, degree + 1))
    for k in range(degree + 1):
        for m in range(k // 2 + 1):
            table[k - 2 * m, k] = (-1) ** m / (math.factorial(m) * math.factorial(k - 2 * m) * 2**m)
    return table


def _sum_of_powers(sizes: Array, x: Array) -> Array:
    """sum_j sizes_j |x|^j, of shape (points, groups)."""
    return np.abs(x)[:, None] ** np.arange(len(sizes)) @ sizes


def horner_error(c: Array, x: Array) -> Array:
    """The first-order bound on the error of Horner's rule, in units of eps / 2, of shape (points, groups)."""
    error = np.zeros((len(x), c.shape[1]))
    partial = np.broadcast_to(c[-1], error.shape)
    for j in range(len(c) - 2, -1, -1):
        product = x[:, None] * partial
        partial = product + c[j]
        # Adding zero is exact.
        error += (np.abs(product) + np.where(c[j] == 0, 0.0, np.abs(partial))) * np.abs(x)[:, None] ** j
    return error


def recurrence_error(a: Array, x: Array) -> Array:
    """The same bound for the three-term recurrence with P_k = He_k / k!."""
    x = x[:, None]
    p = [np.ones_like(x), x]
    for k in range(2, len(a)):
        p.append((x * p[-1] - p[-2]) / k)
    error = np.zeros((len(x), a.shape[1]))
    total = np.zeros_like(error)
    for k in range(len(a)):
        term = a[k] * p[k]
        total += term
        error += np.abs(term) + np.abs(total)
    # A rounding error in P_k changes the result by Clenshaw's sum b_k = a_k + x b_{k+1} / (k + 1) - b_{k+2} / (k + 2).
    after, later = np.zeros_like(error), np.zeros_like(error)
    for k in range(len(a) - 1, 1, -1):
        after, later = a[k] + x * after / (k + 1) - later / (k + 2), after
        error += np.abs(after) * (np.abs(x * p[k - 1]) / k + 2 * np.abs(p[k]))
    return error


HERMITE = Hermite(
    name="hermite",
    title="Hermite",
    parameters=(Parameter("coefficients", offset=1),),
    degrees=range(1, 33),
    default_degree=3,
)
