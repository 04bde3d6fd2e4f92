"""Least squares for the fits of bases: the problem at weighted nodes, and solvers for linear and separable problems.

Source: Gauss-Newton steps for separable problems (Golub and Pereyra, 1973; Kaufman, 1975).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ortho_fx.numerics.moments import Array

# Rounding in float32 adds an error of this size for each unit of a term. Fits count it as part of their error. This
# keeps terms small where large terms would cancel, as at high degrees on a narrow range.
ROUNDING = 6e-8


@dataclass(frozen=True)
class Problem:
    """A function (value and slope) at nodes z, with their weights.

    `inside` is 1 within the clamp and 0 beyond. `standard` says that the weight is the density of N(0, 1), unclamped.
    """

    z: Array
    weight: Array
    value: Array
    slope: Array
    inside: Array
    derivative_weight: float
    standard: bool

    def weighted(self, value_columns: Array, slope_columns: Array) -> Array:
        """Columns of values, scaled by their weights for the sum of squares, above those of weighted derivatives.

        There are no rows of derivatives if their weight is 0.
        """
        root = np.sqrt(self.weight)
        rows = root[:, None] * value_columns
        if not self.derivative_weight:
            return rows
        root = math.sqrt(self.derivative_weight) * root
        return np.concatenate([rows, root[:, None] * slope_columns])

    @property
    def target(self) -> Array:
        return self.weighted(self.value[:, None], self.slope[:, None])[:, 0]


@dataclass(frozen=True)
class Separable:
    """A least-squares problem that is linear in most parameters: columns(nonlinear) @ linear ~ target."""

    columns: Callable[[Array], Array]
    jacobian: Callable[[Array, Array], Array]
    target: Array
    ridge: Array
    admissible: Callable[[Array, Array], bool] = lambda nonlinear, linear: True

    def at(self, nonlinear: Array) -> Solution:
        """The solution with the best linear parameters for these nonlinear ones."""
        matrix = self.columns(nonlinear)
        linear = damped(matrix, self.target, self.ridge)
        residual = self.target - matrix @ linear
        cost = float(residual @ residual + (self.ridge * linear) @ (self.ridge * linear))
        return Solution(self, nonlinear, linear, matrix, residual, cost)


@dataclass(frozen=True)
class Solution:
    problem: Separable
    nonlinear: Array
    linear: Array
    matrix: Array
    residual: Array
    cost: float

    def improved(self, steps: int) -> Solution:
        """The solution after at most so many Levenberg-Marquardt steps, each of which lowers the cost."""
        best, damping = self, 1e-3
        for _ in range(steps):
            jacobian = best.problem.jacobian(best.nonlinear, best.linear)
            length = np.linalg.norm(jacobian, axis=0)
            length[length == 0] = 1.0
            joint = np.concatenate([best.matrix, jacobian / length], axis=1)
            ridge = np.concatenate([best.problem.ridge, np.full(len(length), damping)])
            step = damped(joint, best.residual, ridge)[len(best.linear) :] / length
            trial = best.problem.at(best.nonlinear + step)
            if trial.cost < best.cost and best.problem.admissible(trial.nonlinear, trial.linear):
                gained = best.cost - trial.cost
                best, damping = trial, max(damping / 4, 1e-9)
                if gained < 1e-9 * best.cost:
                    break
            else:
                damping *= 6
                if damping > 1e6:
                    break
        return best

    def searched(self, rounds: int) -> Solution:
        """The solution after a search that moves one nonlinear parameter at a time, and shortens steps that fail."""
        best, step = self, np.full(len(self.nonlinear), 0.1)
        for _ in range(rounds):
            for index in range(len(step)):
                for change in (step[index], -step[index]):
                    moved = best.nonlinear.copy()
                    moved[index] += change
                    trial = best.problem.at(moved)
                    if trial.cost < best.cost and best.problem.admissible(trial.nonlinear, trial.linear):
                        best = trial
                        break
                else:
                    step[index] /= 2
        return best


def cost_of(solution: Solution) -> float:
    return solution.cost


def damped(matrix: Array, target: Array, ridge: Array) -> Array:
    """Minimises |matrix v - target|^2 + |ridge v|^2."""
    stacked = np.concatenate([matrix, np.diag(ridge)])
    q, r = np.linalg.qr(stacked)
    return np.linalg.solve(r, q.T @ np.concatenate([target, np.zeros(len(ridge))]))
