"""Piecewise powers, y(x) = c + sum_{k=1..n} r_k (x - t)^k for x > t, and c + sum_{k=1..n} l_k (x - t)^k for x <= t.

The function is continuous, with one knot t. All numbers learn. At degree 2 these are points of the family, with t = 0:
- ReLU^2: r = (0, 1), l = (0, 0).
- LeakyReLU(s)^2: r = (0, 1), l = (0, s^2).
- ASQU, x^2 for x > 0 and b x^2 elsewhere: r = (0, 1), l = (0, b).
- xIELU for x > 0: r = (b, a). Its other side, a (exp(x) - 1 - x) + b x, is no polynomial: a fit comes close to it.
ReLU and LeakyReLU are points of it at any degree.

At the knot itself the derivatives are those to its left. The frozen form drops the knot where both sides agree.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.polynomial import Polynomial

from ortho_fx.bases.basis import Basis
from ortho_fx.bases.folded import Folded
from ortho_fx.bases.formula import Parameter, Term, Value, after, masked, multiply_add
from ortho_fx.bases.numeric import sampled
from ortho_fx.bases.stable import stable
from ortho_fx.numerics.least_squares import ROUNDING, Problem, Separable, cost_of
from ortho_fx.numerics.moments import Array, Bounds, Moments, Values, clamped

# A fit tries these knots, in units of the weight's deviation, and improves the best.
_KNOTS = (0.0, -2.0, -1.5, -1.0, -0.5, 0.5, 1.0, 1.5, 2.0)
_STEPS = 60


class _Side:
    """The powers of the distance to the knot on one side, and 0 on the other."""

    def __init__(self, distance: Value, coefficients: Value) -> None:
        self._powers, self._coefficients = [distance], coefficients

    def __getitem__(self, k: int) -> Value:
        """The k-th power, from 1 on."""
        while len(self._powers) < k:
            self._powers.append(self._powers[-1] * self._powers[0])
        return self._powers[k - 1]

    def value(self, constant: Value) -> Value:
        """By Horner's rule."""
        coefficients, distance = self._coefficients, self._powers[0]
        y = coefficients[len(coefficients) - 1]
        for k in range(len(coefficients) - 2, -1, -1):
            y = multiply_add(y, distance, coefficients[k])
        return multiply_add(y, distance, constant)

    def bend(self) -> Value:
        """The slope, less its first coefficient."""
        coefficients = self._coefficients
        slope = 0.0
        for k in range(1, len(coefficients)):
            slope = multiply_add(coefficients[k] * float(k + 1), self[k], slope)
        return slope


class PiecewisePower(Basis):
    colour = "#994455"
    closed_form = True
    reach = 8.0
    piecewise = True
    fits_in_units = True

    def evaluate(self, x: Value, *parameters: Value) -> Value:
        constant, knot, right, left = parameters
        distance = x - knot[0]
        positive = distance.relu()
        return _Side(positive, right).value(_Side(distance - positive, left).value(constant[0]))

    def derivatives(self, grad: Value, x: Value, *parameters: Value) -> tuple[Term, list[Term]]:
        _, knot, right, left = parameters
        distance = x - knot[0]
        positive = distance.relu()
        sides = _Side(positive, right), _Side(distance - positive, left)

        @functools.cache
        def grad_x() -> Value:
            jump = masked(after(x, knot[0]), right[0] - left[0])
            return grad * (sides[0].bend() + sides[1].bend() + left[0] + jump)

        return grad_x, [
            lambda: grad,
            lambda: grad_x() * -1.0,
            *(lambda side=side, k=k: grad * side[k] for side in sides for k in range(1, len(right) + 1)),
        ]

    def moments(self, values: Values, bounds: Bounds | None = None) -> Moments:
        knot, degree = float(values["knot"][0]), len(values["right"])
        return clamped(lambda x: sampled(self, values, x), bounds or (-12.0, 12.0), degree, (knot,))

    def start(self, degree: int, bounds: Bounds | None = None, tied: bool = False) -> dict[str, Array]:
        """A line for x > 0 that bends down, and a flatter one for x <= 0, scaled and shifted to gains of 1."""
        right, left = np.zeros(degree), np.zeros(degree)
        right[:2], left[:2] = (1.0, -0.1)[:degree], (0.4, 0.05)[:degree]
        values = {"constant": np.zeros(1), "knot": np.zeros(1), "right": right, "left": left}
        return stable(self, values, bounds)

    def affine(self, values: Values, scale: float, shift: float) -> dict[str, Array]:
        scaled = {name: scale * values[name] for name in ("constant", "right", "left")}
        scaled["constant"] = scaled["constant"] + shift
        return {**values, **scaled}

    def straightened(self, values: Values, share: float, slope: float) -> dict[str, Array]:
        """Exact: x = t + (x - t) on both sides."""
        scaled, line = self.affine(values, share, 0.0), (1 - share) * slope
        scaled["constant"] += line * values["knot"]
        for side in ("right", "left"):
            scaled[side][0] += line
        return scaled

    def rescale(self, values: Values, mean: float, std: float) -> dict[str, Array]:
        """Exact: it moves the knot, and scales the k-th coefficients by std^(1 - k)."""
        scales = std ** -np.arange(float(len(values["right"])))
        return {
            "constant": std * values["constant"],
            "knot": mean + std * values["knot"],
            "right": scales * values["right"],
            "left": scales * values["left"],
        }

    def fit(self, problem: Problem, degree: int, tied: bool = False) -> dict[str, Array]:
        """Linear for a fixed knot; the knot takes Gauss-Newton steps and a direct search."""
        z, orders = problem.z, np.arange(1.0, degree + 1)

        def sides(knot: Array) -> tuple[Array, Array]:
            distance = z - knot[0]
            return np.maximum(distance, 0.0)[:, None], np.minimum(distance, 0.0)[:, None]

        def columns(knot: Array) -> Array:
            right, left = sides(knot)
            values = np.concatenate([np.ones((len(z), 1)), right**orders, left**orders], axis=1)
            masks = (right > 0).astype(float), (right <= 0).astype(float)
            parts = [orders * side ** (orders - 1) * mask for side, mask in zip((right, left), masks, strict=True)]
            slopes = np.concatenate([np.zeros((len(z), 1)), *parts], axis=1)
            return problem.weighted(values, slopes * problem.inside[:, None])

        def jacobian(knot: Array, linear: Array) -> Array:
            right, left = sides(knot)
            slope = np.where(
                right > 0,
                right ** (orders - 1) @ (orders * linear[1 : degree + 1])[:, None],
                left ** (orders - 1) @ (orders * linear[degree + 1 :])[:, None],
            )
            # The slope jumps at the knot and has no derivative there.
            return problem.weighted(-slope, np.zeros_like(slope))

        separable = Separable(columns, jacobian, problem.target, np.full(1 + 2 * degree, ROUNDING))
        scanned = sorted((separable.at(np.array([knot])) for knot in _KNOTS), key=cost_of)
        best = scanned[0]
        if best.residual @ best.residual > ROUNDING**2 * (problem.target @ problem.target) / 100:
            best = min((solution.improved(_STEPS).searched(_STEPS) for solution in scanned[:3]), key=cost_of)
        constant, right, left = np.split(best.linear, [1, degree + 1])
        return {"constant": constant, "knot": best.nonlinear, "right": right, "left": left}

    def fold(self, values: Values, interval: Bounds | None, dtype: torch.dtype) -> Folded | None:
        """A polynomial if both sides are the same, or the interval is on one side."""
        constant, knot, right, left = (values[name] for name in ("constant", "knot", "right", "left"))
        low, high = (-np.inf, np.inf) if interval is None else interval
        is_left, same = knot >= high, (right == left).all(axis=0)
        if not (same | is_left | (knot <= low)).all():
            return None
        columns = []
        for g, side in enumerate(np.where(is_left, left, right).T):
            polynomial = Polynomial([constant[0, g], *side])(Polynomial([-knot[0, g], 1.0])).coef
            columns.append(np.concatenate([polynomial, np.zeros(len(side) + 1 - len(polynomial))]))
        return "polynomial", {"monomial_coefficients": np.stack(columns, axis=1)}

    def remedies(self, clamp: float | None) -> tuple[str, ...]:
        return ("clamp=4",) if clamp is None else ()


PIECEWISE_POWER = PiecewisePower(
    name="piecewise_power",
    title="PiecewisePower",
    parameters=(
        Parameter("constant", scalar=True),
        Parameter("knot", scalar=True),
        Parameter("right"),
        Parameter("left"),
    ),
    degrees=range(1, 9),
    default_degree=2,
)
