"""Numeric defaults for any basis, computed from its formula by quadrature and least squares.

Nothing here depends on a particular basis. Derivatives in x come from autograd. Derivatives in the parameters are
finite differences, which are exact if the formula is linear in its parameters; a numeric test finds that out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ortho_fx.bases.formula import Parameter
from ortho_fx.errors import OrthoFxError
from ortho_fx.numerics.least_squares import ROUNDING, Problem, damped
from ortho_fx.numerics.moments import Array, Bounds, Moments, Sampled, Values, adaptive_nodes, density, integrated

# For a formula that is not linear: the number of starts, the steps of each, and the steps of the best two after that.
_STARTS, _SCANNED_STEPS, _STEPS = 8, 15, 80
# Newton's method for the gains: rounds of new nodes, steps in each, the error that it aims for, and the allowed error.
_ROUNDS, _NEWTON_STEPS, _CLOSE, _ACCEPTED = 4, 60, 1e-12, 1e-10
# Only every fourth node is used while starts are compared.
_COARSE = 4


class Formula(Protocol):
    """The part of a basis that the functions here use."""

    @property
    def name(self) -> str: ...

    @property
    def parameters(self) -> tuple[Parameter, ...]: ...

    def prepare(self, dtype: torch.dtype, *parameters: Tensor) -> tuple[Tensor, ...]: ...

    def evaluate(self, x: Any, *parameters: Any) -> Any: ...


def sampled(formula: Formula, values: Values, x: Array, bounds: Bounds | None = None) -> tuple[Array, Array]:
    """y and y' at points, with the input clamped to the bounds.

    With parameters of shape (size, groups), the results have one column per group.
    """
    with torch.inference_mode(False), torch.enable_grad():  # the model may be built in any mode
        parameters = [torch.from_numpy(np.array(values[p.name], dtype=np.float64)) for p in formula.parameters]
        prepared = formula.prepare(torch.float64, *parameters)[: len(parameters)]
        points = torch.tensor(x, dtype=torch.float64)
        groups = parameters[0].shape[1:]
        points = points.reshape(-1, *(1 for _ in groups)).expand(-1, *groups).clone().requires_grad_()
        z = points if bounds is None else points.clamp(*bounds)
        y = (formula.evaluate(z, *prepared) + torch.zeros_like(z)).expand_as(z)
        slope = torch.autograd.grad(y.sum(), points, allow_unused=True)[0]
    slope = torch.zeros_like(y) if slope is None else slope
    return y.detach().numpy(), slope.numpy()


def moments(formula: Formula, values: Values, bounds: Bounds | None = None) -> Moments:
    """The moments of y(X) for X ~ N(0, 1), by adaptive quadrature."""
    return integrated(lambda z: sampled(formula, values, z, bounds))


def start(formula: Formula, degree: int, bounds: Bounds | None, tied: bool) -> dict[str, Array]:
    """Parameters with forward and backward gain 1, close to the fit of a slightly nonlinear function.

    That function is the "stable" Hermite expansion of degree 3.

    Raises:
        OrthoFxError: no such parameters were found.
    """
    z, weight = gaussian_nodes(8.0)
    a1, a2, a3 = 1.0, -0.7, -0.49
    value = a1 * z + a2 * (z**2 - 1) / 2 + a3 * (z**3 - 3 * z) / 6
    slope = a1 + a2 * z + a3 * (z**2 - 1) / 2
    derivative_square, variance = weight @ slope**2, weight @ value**2
    scale = 1 / math.sqrt(derivative_square)
    value = scale * (value + math.sqrt(derivative_square - variance))
    inside = np.ones_like(z) if bounds is None else ((z > bounds[0]) & (z < bounds[1])).astype(float)
    clipped = z if bounds is None else np.clip(z, *bounds)
    problem = Problem(clipped, weight, value, scale * slope, inside, 0.1, bounds is None)
    values = with_gains(formula, fitted(formula, problem, degree, tied), (1.0, 1.0), bounds)
    if values is None:
        raise OrthoFxError(
            f"no {formula.name} expansion of degree {degree} with gains of 1 was found: its basis needs a `start`"
        )
    return values


def rescaled(formula: Formula, values: Values, mean: float, std: float) -> dict[str, Array]:
    """The parameters of std * y((x - mean) / std), by least squares under x ~ N(mean, std^2), with the gains of y."""
    if (mean, std) == (0.0, 1.0):
        return {parameter.name: np.array(values[parameter.name], dtype=np.float64) for parameter in formula.parameters}
    z, weight = gaussian_nodes(8.0)
    value, slope = sampled(formula, values, z)
    problem = Problem(mean + std * z, weight, std * value, slope, np.ones_like(z), std**2, False)
    moved = _refitted(formula, values, problem)
    known = moments(formula, values)
    kept = with_gains(formula, moved, (known.square, known.derivative_square), None, mean, std)
    return moved if kept is None else kept


def straightened(formula: Formula, values: Values, share: float, slope: float) -> dict[str, Array]:
    """The parameters of share * y + (1 - share) * slope * x, by least squares under x ~ N(0, 1)."""
    z, weight = gaussian_nodes(8.0)
    value, rise = sampled(formula, values, z)
    line = (1 - share) * slope
    problem = Problem(z, weight, share * value + line * z, share * rise + line, np.ones_like(z), 1.0, False)
    return _refitted(formula, values, problem)


def affine(formula: Formula, values: Values, scale: float, shift: float) -> dict[str, Array]:
    """The parameters of scale * y + shift, by least squares under x ~ N(0, 1)."""
    z, weight = gaussian_nodes(8.0)
    value, slope = sampled(formula, values, z)
    problem = Problem(z, weight, scale * value + shift, scale * slope, np.ones_like(z), 1.0, False)
    return _refitted(formula, values, problem)


def _refitted(formula: Formula, values: Values, problem: Problem) -> dict[str, Array]:
    """The parameters of least error, found from these if the formula is not linear."""
    unknowns = _Unknowns(formula, [len(values[parameter.name]) for parameter in formula.parameters])
    if unknowns.linear:
        return unknowns.unpack(unknowns.solved(problem, 1e-14))
    return unknowns.unpack(unknowns.stepped(problem, unknowns.pack(values), _STEPS)[0])


def fitted(formula: Formula, problem: Problem, degree: int, tied: bool = False) -> dict[str, Array]:
    """The least-squares parameters: exact for a linear formula, else the best result of steps from several starts."""
    unknowns = _Unknowns(formula, [parameter.size(degree, tied) for parameter in formula.parameters])
    if unknowns.linear:
        return unknowns.unpack(unknowns.solved(problem, ROUNDING))
    coarse = Problem(
        problem.z[::_COARSE],
        problem.weight[::_COARSE],
        problem.value[::_COARSE],
        problem.slope[::_COARSE],
        problem.inside[::_COARSE],
        problem.derivative_weight,
        False,
    )
    random = np.random.default_rng(0)
    starts = [random.normal(size=unknowns.size) for _ in range(_STARTS)]
    scanned = sorted((unknowns.stepped(coarse, each, _SCANNED_STEPS) for each in starts), key=lambda found: found[1])
    best = min((unknowns.stepped(problem, each, _STEPS) for each, _ in scanned[:2]), key=lambda found: found[1])
    return unknowns.unpack(best[0])


class _Unknowns:
    """The parameters of a formula as one vector."""

    def __init__(self, formula: Formula, sizes: Sequence[int]) -> None:
        self.formula, self.sizes, self.size = formula, tuple(sizes), sum(sizes)

    def pack(self, values: Values) -> Array:
        return np.concatenate([np.asarray(values[p.name], dtype=np.float64) for p in self.formula.parameters])

    def unpack(self, vector: Array) -> dict[str, Array]:
        parts = np.split(vector, np.cumsum(self.sizes)[:-1])
        return {p.name: part.copy() for p, part in zip(self.formula.parameters, parts, strict=True)}

    def at(self, vector: Array, x: Array, bounds: Bounds | None = None) -> tuple[Array, Array]:
        return sampled(self.formula, self.unpack(vector), x, bounds)

    @functools.cached_property
    def linear(self) -> bool:
        """Whether the formula is linear in all of its parameters, apart from a constant term."""
        random = np.random.default_rng(0)
        x = random.normal(size=16)
        one, other = random.normal(size=(2, self.size))
        first, second, both = (self.at(vector, x)[0] for vector in (one, other, 2.0 * one - other))
        return bool(np.allclose(both, 2.0 * first - second, rtol=1e-9, atol=1e-9 * np.abs(first).max()))

    def columns(self, vector: Array, x: Array, bounds: Bounds | None = None) -> tuple[Array, Array]:
        """The derivatives of y and of y' with respect to each unknown, one column each."""
        values, slopes = [], []
        for k in range(self.size):
            step = 1.0 if self.linear else 1e-6 * max(1.0, abs(vector[k]))
            ends = []
            for sign in (step, -step):
                moved = vector.copy()
                moved[k] += sign
                ends.append(self.at(moved, x, bounds))
            values.append((ends[0][0] - ends[1][0]) / (2 * step))
            slopes.append((ends[0][1] - ends[1][1]) / (2 * step))
        return np.stack(values, axis=1), np.stack(slopes, axis=1)

    def solved(self, problem: Problem, ridge: float) -> Array:
        """The least-squares solution of a linear formula, computed with columns scaled to length 1."""
        origin = np.zeros(self.size)
        fixed, slope = self.at(origin, problem.z)
        values, slopes = self.columns(origin, problem.z)
        matrix = problem.weighted(values, slopes * problem.inside[:, None])
        target = problem.target - problem.weighted(fixed[:, None], (slope * problem.inside)[:, None])[:, 0]
        length = _lengths(matrix)
        return damped(matrix / length, target, np.full(self.size, ridge)) / length

    def stepped(self, problem: Problem, vector: Array, steps: int) -> tuple[Array, float]:
        """The vector after at most so many Levenberg-Marquardt steps, each of which lowers the cost; and the cost."""

        def residual_at(vector: Array) -> Array:
            value, slope = self.at(vector, problem.z)
            fitted = problem.weighted(value[:, None], (slope * problem.inside)[:, None])[:, 0]
            return np.concatenate([problem.target - fitted, -ROUNDING * vector])

        residual, damping = residual_at(vector), 1e-3
        cost = float(residual @ residual)
        for _ in range(steps):
            values, slopes = self.columns(vector, problem.z)
            matrix = problem.weighted(values, slopes * problem.inside[:, None])
            matrix = np.concatenate([matrix, ROUNDING * np.eye(self.size)])
            length = _lengths(matrix)
            gained = 0.0
            while damping < 1e6 and not gained:
                trial = vector + damped(matrix / length, residual, np.full(self.size, damping)) / length
                trial_residual = residual_at(trial)
                trial_cost = float(trial_residual @ trial_residual)
                if trial_cost < cost:
                    gained, vector, residual, cost = cost - trial_cost, trial, trial_residual, trial_cost
                    damping = max(damping / 4, 1e-9)
                else:
                    damping *= 6
            if gained < 1e-10 * cost or cost < 1e-24:
                break
        return vector, cost


def with_gains(
    formula: Formula,
    values: Values,
    gains: tuple[float, float],
    bounds: Bounds | None,
    mean: float = 0.0,
    std: float = 1.0,
) -> dict[str, Array] | None:
    """Parameters near these with E[y^2] = gains[0] std^2 and E[y'^2] = gains[1] for x ~ N(mean, std^2).

    Newton's method takes the shortest possible steps. A parameter's unit of length is its effect on the function. The
    result is None if the method does not converge.
    """
    unknowns = _Unknowns(formula, [len(values[parameter.name]) for parameter in formula.parameters])
    wanted = np.array(gains)

    def sampled_at(vector: Array) -> Sampled:
        def standard(z: Array) -> tuple[Array, Array]:
            value, slope = unknowns.at(vector, mean + std * z, bounds)
            return value / std, slope

        return standard

    def squares(vector: Array, z: Array, weight: Array) -> Array:
        value, slope = sampled_at(vector)(z)
        return np.array([weight @ value**2, weight @ slope**2])

    def newton(vector: Array, found: Callable[[Array], Array], gradient: Callable[[Array], Array]) -> Array:
        """The vector after steps, which continue as long as the error falls."""
        off = found(vector) - wanted
        for _ in range(_NEWTON_STEPS):
            if np.abs(off).max() < _CLOSE:
                break
            step = np.linalg.lstsq(gradient(vector) / length, -off, rcond=1e-12)[0] / length
            for share in (1.0, 0.5, 0.25, 0.1, 0.01):
                trial_off = found(vector + share * step) - wanted
                if np.abs(trial_off).max() < np.abs(off).max():
                    vector, off = vector + share * step, trial_off
                    break
            else:
                break
        return vector

    def integrals(vector: Array) -> Array:
        return squares(vector, *adaptive_nodes(sampled_at(vector)))

    def differences(vector: Array) -> Array:
        columns = []
        for k in range(unknowns.size):
            step = np.zeros(unknowns.size)
            step[k] = 1e-4 * max(1.0, abs(vector[k]))
            columns.append((integrals(vector + step) - integrals(vector - step)) / (2 * step[k]))
        return np.stack(columns, axis=1)

    start = vector = unknowns.pack(values)
    for _ in range(_ROUNDS):
        z, weight = adaptive_nodes(sampled_at(vector))
        if np.abs(squares(vector, z, weight) - wanted).max() < _ACCEPTED:
            return unknowns.unpack(vector)

        def found(vector: Array, z: Array = z, weight: Array = weight) -> Array:
            return squares(vector, z, weight)

        def gradient(vector: Array, z: Array = z, weight: Array = weight) -> Array:
            value, slope = sampled_at(vector)(z)
            values_of, slopes_of = unknowns.columns(vector, mean + std * z, bounds)
            return 2 * np.stack([(weight * value) @ values_of / std, (weight * slope) @ slopes_of])

        columns = unknowns.columns(vector, mean + std * z, bounds)
        length = np.hypot(*(_lengths(np.sqrt(weight)[:, None] * each) for each in columns))
        vector = newton(vector, found, gradient)
    # Moving kinks need new nodes at every step: with fixed nodes, E[y'^2] jumps when a kink crosses a node.
    vector = newton(start, integrals, differences)
    return unknowns.unpack(vector) if np.abs(integrals(vector) - wanted).max() < _ACCEPTED else None


def _lengths(matrix: Array) -> Array:
    length = np.linalg.norm(matrix, axis=0)
    return np.where(length == 0, 1.0, length)


def gaussian_nodes(reach: float) -> tuple[Array, Array]:
    """Quadrature nodes for N(0, 1), on panels of width 1/4, and their weights, with sum 1."""
    nodes, weights = np.polynomial.legendre.leggauss(8)
    left = np.arange(-reach, reach, 0.25)
    z = (left[:, None] + (nodes + 1) / 8).ravel()
    weight = np.tile(weights, len(left)) / 8 * density(z)
    return z, weight / weight.sum()
