"""A stock activation plus a Hermite series: y(x) = w g(s x + t) + sum_{k=0..n} a_k He_k(x) / k!.

g is GELU, SiLU or ReLU^2: one basis for each. Only the coefficients learn. With w = s = 1 and t = 0 and zero
coefficients, y is g itself: with init "exact" an expansion starts there, and learns the difference. w, s and t are
fixed numbers, which make the family closed: affine maps of y and of x are exact, so gains and calibration are too.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import replace
from typing import ClassVar

import numpy as np
from torch import Tensor

from ortho_fx.bases.basis import Basis
from ortho_fx.bases.formula import Parameter, Term, Together, Value, multiply_add
from ortho_fx.bases.hermite import HERMITE, fit_series
from ortho_fx.bases.numeric import sampled
from ortho_fx.bases.stable import stable
from ortho_fx.numerics.least_squares import Problem
from ortho_fx.numerics.moments import Array, Bounds, Moments, Values, clamped


class StockSeries(Basis):
    closed_form = True
    # Beyond these arguments g is x, 0 or x^2 to the last digit of float64. Between two of them it bends little.
    transition: ClassVar[Array]
    # The slope that the start adds to g.
    added_slope: ClassVar[float] = 0.0

    @property
    def _weight(self) -> str:
        """The name of w. It has the name of g, so that a state never loads as one of another g."""
        return self.parameters[1].name

    def _alone(self, degree: int) -> dict[str, Array]:
        """The parameters of g itself."""
        coefficients = np.zeros(degree + 1)
        return {"coefficients": coefficients, self._weight: np.ones(1), "scale": np.ones(1), "shift": np.zeros(1)}

    @abstractmethod
    def stock(self, x: Value) -> Value:
        """g(x)."""

    @abstractmethod
    def stock_slope(self, x: Value) -> Value:
        """g'(x)."""

    def evaluate(self, x: Value, *parameters: Value) -> Value:
        coefficients, weight, scale, shift = parameters
        return multiply_add(
            weight[0], self.stock(multiply_add(scale[0], x, shift[0])), HERMITE.evaluate(x, coefficients)
        )

    def derivatives(self, grad: Value, x: Value, *parameters: Value) -> tuple[Term, list[Term]]:
        coefficients, weight, scale, shift = parameters
        series, terms = HERMITE.derivatives(grad, x, coefficients)

        def grad_x() -> Value:
            slope = self.stock_slope(multiply_add(scale[0], x, shift[0]))
            return multiply_add(grad * (weight[0] * scale[0]), slope, series())

        return grad_x, terms

    def together(self, x: Tensor, *parameters: Tensor) -> Together | None:
        coefficients, weight, scale, shift = parameters
        series, at = HERMITE.together(x, coefficients), scale[0] * x + shift[0]
        if series is None:
            return None
        return Together(
            lambda: series.value() + weight[0] * self.stock(at),
            lambda: series.slope() + (weight[0] * scale[0]) * self.stock_slope(at),
            series.terms,
        )

    def moments(self, values: Values, bounds: Bounds | None = None) -> Moments:
        scale, shift = (float(values[name][0]) for name in ("scale", "shift"))
        breaks = (self.transition - shift) / scale if scale else ()
        degree = len(values["coefficients"])
        return clamped(lambda x: sampled(self, values, x), bounds or (-12.0, 12.0), degree, breaks)

    def start(self, degree: int, bounds: Bounds | None = None, tied: bool = False) -> dict[str, Array]:
        """The stock activation, for ReLU^2 with a slope added, scaled and shifted to gains of 1."""
        values = self._alone(degree)
        values["coefficients"][1] = self.added_slope
        return stable(self, values, bounds)

    def affine(self, values: Values, scale: float, shift: float) -> dict[str, Array]:
        coefficients = scale * values["coefficients"]
        coefficients[0] += shift
        return {**values, "coefficients": coefficients, self._weight: scale * values[self._weight]}

    def straightened(self, values: Values, share: float, slope: float) -> dict[str, Array]:
        return {
            **values,
            **HERMITE.straightened(values, share, slope),
            self._weight: share * values[self._weight],
        }

    def rescale(self, values: Values, mean: float, std: float) -> dict[str, Array]:
        """Exact: the series is rescaled as a Hermite expansion, and the stock activation gets other w, s and t."""
        return {
            **HERMITE.rescale(values, mean, std),
            self._weight: std * values[self._weight],
            "scale": values["scale"] / std,
            "shift": values["shift"] - values["scale"] * (mean / std),
        }

    def fit(self, problem: Problem, degree: int, tied: bool = False) -> dict[str, Array]:
        """The series is fitted to the difference from the stock activation; no difference gives zeros."""
        zeros = self._alone(degree)
        value, slope = sampled(self, zeros, problem.z)
        rest = replace(problem, value=problem.value - value, slope=problem.slope - slope * problem.inside)
        rounding = 1e-12 * (1.0 + np.abs(problem.value))
        if (np.abs(rest.value) <= rounding).all() and (np.abs(rest.slope) * problem.inside <= 1e-9).all():
            return zeros
        return {**zeros, **fit_series(rest, degree)}

    def remedies(self, clamp: float | None) -> tuple[str, ...]:
        return HERMITE.remedies(clamp)


class GELUSeries(StockSeries):
    colour = "#004488"
    transition = np.linspace(-10.0, 10.0, 11)

    def stock(self, x: Value) -> Value:
        return x * 0.5 * ((x * math.sqrt(0.5)).erf() + 1.0)

    def stock_slope(self, x: Value) -> Value:
        density = (x * x * -0.5).exp() * (1 / math.sqrt(2 * math.pi))
        return multiply_add(x, density, (x * math.sqrt(0.5)).erf() * 0.5 + 0.5)


class SiLUSeries(StockSeries):
    colour = "#222255"
    transition = np.linspace(-40.0, 40.0, 41)

    def stock(self, x: Value) -> Value:
        return x * x.sigmoid()

    def stock_slope(self, x: Value) -> Value:
        gate = x.sigmoid()
        return gate * (x * (1.0 - gate) + 1.0)


class ReLUSquaredSeries(StockSeries):
    colour = "#661100"
    transition = np.zeros(1)
    # The layer map of c (ReLU^2 + b) with gains of 1 has its repelling fixed point at 1.24, so that a signal of 1.25
    # times the variance would grow without bound. With this slope the point is at 3.0, as for Hermite of degree 3.
    added_slope = -1.5

    def stock(self, x: Value) -> Value:
        positive = x.relu()
        return positive * positive

    def stock_slope(self, x: Value) -> Value:
        return x.relu() * 2.0


def _parameters(stock: str) -> tuple[Parameter, ...]:
    fixed = (f"{stock}_weight", "scale", "shift")
    return (
        Parameter("coefficients", offset=1),
        *(Parameter(name, learnable=False, scalar=True) for name in fixed),
    )


GELU_SERIES = GELUSeries("gelu_series", "GELUSeries", _parameters("gelu"), HERMITE.degrees, 3)
SILU_SERIES = SiLUSeries("silu_series", "SiLUSeries", _parameters("silu"), HERMITE.degrees, 3)
RELU_SQUARED_SERIES = ReLUSquaredSeries(
    "relu_squared_series", "ReLUSquaredSeries", _parameters("relu_squared"), HERMITE.degrees, 3
)
