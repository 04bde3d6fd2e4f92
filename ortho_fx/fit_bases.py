"""How each basis is fitted to a function at weighted nodes; `ortho_fx.fit` makes the nodes and states the errors.

- Hermite is linear in its coefficients; under the Gaussian weight it is the projection a_k = E[g(X) He_k(X)].
- Fourier is linear at fixed frequencies (cosine and sine pairs); the frequencies start as multiples of the best of some
  fundamentals and follow Gauss-Newton steps. Where they are tied, the fundamental alone follows them.
- Tropical functions are piecewise linear, and linear in their changes of slope at fixed knots. Knots that turn up
  belong to the maximum, those that turn down to the denominator. They start at the function's own kinks and, where it
  is smooth, with the density |w f''^2|^(1/5) that is asymptotically best, and follow Gauss-Newton steps.

Source: least squares in value and derivative is the Hermite interpolation of arXiv 2502.01247; the Gauss-Newton steps
are those of separable problems (Golub and Pereyra, 1973; Kaufman, 1975); the density of knots is that of de Boor, A
Practical Guide to Splines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ortho_fx.moments import Array

# Rounds of the search that places knots for the slope as well.
_ROUNDS = 8
# Rounding in float32 adds an error of this size for each unit of a term. It is counted as part of the error, which
# keeps terms small where large ones would cancel: high degrees on a narrow range.
_ROUNDING = 6e-8
# 1/k! is zero in float32 from here on, and so is the wave that it multiplies.
_MOST_WAVES = 32


@dataclass(frozen=True)
class Problem:
    """A function at nodes, and how they are weighted.

    `inside` is 1 within the clamp and 0 beyond; `standard` says that the weight is the density of N(0, 1) everywhere.
    """

    z: Array
    weight: Array
    value: Array
    slope: Array
    inside: Array
    derivative_weight: float
    standard: bool

    def weighted(self, value_columns: Array, slope_columns: Array) -> Array:
        """Columns of values, and below them of derivatives if these count, as they enter the sum of squares."""
        root = np.sqrt(self.weight)
        rows = root[:, None] * value_columns
        if not self.derivative_weight:
            return rows
        root = math.sqrt(self.derivative_weight) * root
        return np.concatenate([rows, root[:, None] * slope_columns])

    @property
    def target(self) -> Array:
        return self.weighted(self.value[:, None], self.slope[:, None])[:, 0]


def _fit_hermite(problem: Problem, degree: int) -> dict[str, Array]:
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
    return {"coefficients": _damped(matrix / length, problem.target, np.full(degree + 1, _ROUNDING)) / length}


def _fit_fourier(problem: Problem, degree: int, tied: bool = False) -> dict[str, Array]:
    z, waves = problem.z, min(degree, _MOST_WAVES)
    multiples = np.arange(1.0, waves + 1)

    def columns(frequencies: Array) -> Array:
        angles = np.outer(z, frequencies)
        cosine, sine = np.cos(angles), np.sin(angles)
        inside = problem.inside[:, None]
        values = np.concatenate([np.ones((len(z), 1)), cosine, sine], axis=1)
        slopes = np.concatenate(
            [np.zeros((len(z), 1)), -frequencies * sine * inside, frequencies * cosine * inside], axis=1
        )
        return problem.weighted(values, slopes)

    def jacobian(frequencies: Array, linear: Array) -> Array:
        # d/dw (c cos wz + s sin wz), and d/dw of its derivative in z.
        angles = np.outer(z, frequencies)
        cosine, sine = np.cos(angles), np.sin(angles)
        c, s = linear[1 : waves + 1], linear[waves + 1 :]
        turned = s * cosine - c * sine
        along = z[:, None] * turned
        slopes = turned - z[:, None] * frequencies * (c * cosine + s * sine)
        return problem.weighted(along, slopes * problem.inside[:, None])

    heavy = problem.weight > 1e-6 * problem.weight.max()
    reach = float(np.abs(z[heavy]).max())
    ridge = np.concatenate([[0.0], np.full(2 * waves, _ROUNDING)])
    separable = _Separable(columns, jacobian, problem.target, ridge)
    fundamentals = math.pi / reach / np.geomspace(0.7, 5.0, 12)
    starts = [multiples * fundamental for fundamental in fundamentals]
    if tied:
        separable = _Separable(
            lambda fundamental: columns(multiples * fundamental),
            lambda fundamental, linear: jacobian(multiples * fundamental, linear) @ multiples[:, None],
            problem.target,
            ridge,
        )
        starts = [np.array([fundamental]) for fundamental in fundamentals]
    scanned = sorted((separable.at(start) for start in starts), key=_cost)
    # Work of about a tenth of a second, whatever the degree.
    steps = int(np.clip(2.5e7 / (len(problem.target) * (3 * waves + 1) ** 2), 2, 60))
    best = min((solution.improved(steps) for solution in scanned[:2]), key=_cost)
    c, s = best.linear[1 : waves + 1], best.linear[waves + 1 :]
    amplitudes = np.hypot(c, s)
    # The largest waves go where 1/k! is largest, which keeps the coefficients within the range of float32.
    order = np.arange(waves) if tied else np.argsort(-amplitudes, kind="stable")
    factorials = np.array([math.factorial(k + 1) for k in range(degree)], dtype=float)
    coefficients, phases = np.zeros(degree), np.zeros(degree)
    coefficients[:waves] = amplitudes[order]
    phases[:waves] = np.arctan2(s, c)[order]
    frequencies = best.nonlinear
    if not tied:
        frequencies = np.concatenate([frequencies[order], np.arange(waves + 1.0, degree + 1)])
    negative = frequencies < 0
    return {
        "constant": best.linear[:1],
        "coefficients": coefficients * factorials,
        "frequencies": np.abs(frequencies),
        "phases": np.where(negative, -phases, phases),
    }


def _fit_tropical(problem: Problem, degree: int) -> dict[str, Array]:
    line, knots, turns = _fit_knots(problem, degree, 0)
    slopes, offsets = _maximum(line, knots, turns, degree)
    return {"slopes": slopes, "offsets": offsets}


def _fit_tropical_rational(problem: Problem, degree: int) -> dict[str, Array]:
    line, knots, turns = _fit_knots(problem, degree, degree)
    up = turns > 0
    slopes, offsets = _maximum(line, knots[up], turns[up], degree)
    denominator_slopes, denominator_offsets = _maximum(np.zeros(2), knots[~up], -turns[~up], degree)
    return {
        "slopes": slopes,
        "offsets": offsets,
        "denominator_slopes": denominator_slopes,
        "denominator_offsets": denominator_offsets,
    }


def _maximum(line: Array, knots: Array, turns: Array, degree: int) -> tuple[Array, Array]:
    """Slopes and offsets of the convex function that leaves (offset, slope) `line` by `turns` at `knots`.

    Lines that are left over pass through a knot with a slope between those beside it: they change nothing, and take
    part as soon as their neighbours move. A function without knots has copies of its line.
    """
    spare = degree - len(knots)
    if len(knots):
        share = np.full(len(knots), 1 + spare // len(knots))
        share[np.argsort(-turns, kind="stable")[: spare % len(knots)]] += 1
        knots, turns = np.repeat(knots, share), np.repeat(turns / share, share)
    else:
        knots, turns = np.zeros(degree), np.zeros(degree)
    slopes = line[1] + np.concatenate([[0.0], np.cumsum(turns)])
    offsets = line[0] - np.concatenate([[0.0], np.cumsum(turns * knots)])
    return slopes, offsets


def _fit_knots(problem: Problem, up: int, down: int) -> tuple[Array, Array, Array]:
    """The leftmost line (offset, slope), the knots in order, and the change of slope at each.

    At most `up` changes are positive and at most `down` negative.
    """
    z = problem.z

    def columns(knots: Array) -> Array:
        right = (z[:, None] > knots).astype(float)
        values = np.concatenate([np.ones((len(z), 1)), z[:, None], right * (z[:, None] - knots)], axis=1)
        slopes = np.concatenate([np.zeros((len(z), 1)), np.ones((len(z), 1)), right], axis=1)
        return problem.weighted(values, slopes * problem.inside[:, None])

    def jacobian(knots: Array, linear: Array) -> Array:
        right = (z[:, None] > knots).astype(float)
        return problem.weighted(-linear[2:] * right, np.zeros_like(right))

    def solved(knots: Array, signs: Array) -> _Solution:
        def admissible(knots: Array, linear: Array) -> bool:
            return bool((np.diff(knots) > 1e-6).all() and (linear[2:] * signs > 0).all())

        ridge = np.full(2 + len(knots), 1e-12)
        solution = _Separable(columns, jacobian, problem.target, ridge, admissible).at(knots)
        turns = solution.linear[2:] * signs
        if len(knots) and turns.min() <= 0:
            # A change of slope against its sign helps nowhere: the one furthest off goes, and the rest settle.
            kept = np.arange(len(knots)) != np.argmin(turns)
            return solved(knots[kept], signs[kept])
        steps = int(np.clip(2e7 / (len(problem.target) * (2 + 2 * len(knots)) ** 2), 2, 40))
        solution = solution.improved(steps) if len(knots) else solution
        # The steps see what knots do to the value; a slope jumps at a knot and has no derivative there.
        return solution.searched(_ROUNDS) if problem.derivative_weight else solution

    # The steps end in the optimum next to where they start, so they start twice.
    best = min((solved(*_first_knots(problem, up, down, power)) for power in (0.2, 0.4)), key=_cost)
    return best.linear[:2], best.nonlinear, best.linear[2:]


def _first_knots(problem: Problem, up: int, down: int, power: float) -> tuple[Array, Array]:
    """Where knots start, in order, with their signs: at kinks, and with the density w^power |f''|^(2/5) between."""
    z, slope = problem.z, problem.slope
    width, turn = np.diff(z), np.diff(slope)
    apart = width > 0  # nodes beyond a clamp fall together
    width = np.where(apart, width, np.inf)
    rate = np.abs(turn) / width
    span = max(float(np.ptp(slope)), 1e-300)
    beside = np.maximum(np.concatenate([rate[2:], [0, 0]]), np.concatenate([[0, 0], rate[:-2]]))
    kink = apart & (np.abs(turn) > 0.02 * span) & (rate > 8 * beside)
    # Tangents from either side meet in the kink.
    with np.errstate(divide="ignore", invalid="ignore"):
        meet = np.diff(problem.value - slope * z) / -turn
    middle = (z[:-1] + z[1:]) / 2
    meet = np.where(kink & (meet >= z[:-1]) & (meet <= z[1:]), meet, middle)
    weight = (problem.weight[:-1] + problem.weight[1:]) / 2
    bend = np.where(apart & ~kink & (np.abs(turn) > 1e-9 * span), turn, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        density = np.where(bend != 0, (weight / width) ** power * np.abs(bend) ** 0.4 * width**0.6, 0.0)
    knots, signs = [], []
    for sign, count in ((1.0, up), (-1.0, down)):
        kinks = np.flatnonzero(kink & (turn * sign > 0))
        kinks = kinks[np.argsort(-np.abs(turn[kinks]) * weight[kinks], kind="stable")[:count]]
        mass = np.cumsum(np.where(bend * sign > 0, density, 0.0))
        smooth = count - len(kinks) if len(mass) and mass[-1] > 0 else 0
        places = np.interp((np.arange(smooth) + 0.5) / max(smooth, 1) * (mass[-1] if smooth else 0.0), mass, z[1:])
        knots += [meet[kinks], places]
        signs += [np.full(len(kinks) + smooth, sign)]
    every, every_sign = np.concatenate(knots), np.concatenate(signs)
    order = np.argsort(every, kind="stable")
    return every[order], every_sign[order]


@dataclass(frozen=True)
class _Separable:
    """A least-squares problem that is linear but for a few parameters: columns(nonlinear) @ linear ~ target."""

    columns: Callable[[Array], Array]
    jacobian: Callable[[Array, Array], Array]
    target: Array
    ridge: Array
    admissible: Callable[[Array, Array], bool] = lambda nonlinear, linear: True

    def at(self, nonlinear: Array) -> _Solution:
        """The best linear parameters for these nonlinear ones."""
        matrix = self.columns(nonlinear)
        linear = _damped(matrix, self.target, self.ridge)
        residual = self.target - matrix @ linear
        cost = float(residual @ residual + (self.ridge * linear) @ (self.ridge * linear))
        return _Solution(self, nonlinear, linear, matrix, residual, cost)


@dataclass(frozen=True)
class _Solution:
    problem: _Separable
    nonlinear: Array
    linear: Array
    matrix: Array
    residual: Array
    cost: float

    def improved(self, steps: int) -> _Solution:
        """After so many Levenberg-Marquardt steps, of which those count that lower the cost."""
        best, damping = self, 1e-3
        for _ in range(steps):
            jacobian = best.problem.jacobian(best.nonlinear, best.linear)
            length = np.linalg.norm(jacobian, axis=0)
            length[length == 0] = 1.0
            joint = np.concatenate([best.matrix, jacobian / length], axis=1)
            ridge = np.concatenate([best.problem.ridge, np.full(len(length), damping)])
            step = _damped(joint, best.residual, ridge)[len(best.linear) :] / length
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

    def searched(self, rounds: int) -> _Solution:
        """After moving one nonlinear parameter at a time, by steps that get shorter where none lowers the cost."""
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


def _cost(solution: _Solution) -> float:
    return solution.cost


def _damped(matrix: Array, target: Array, ridge: Array) -> Array:
    """Minimises |matrix v - target|^2 + |ridge v|^2."""
    stacked = np.concatenate([matrix, np.diag(ridge)])
    q, r = np.linalg.qr(stacked)
    return np.linalg.solve(r, q.T @ np.concatenate([target, np.zeros(len(ridge))]))


def fit_tied_fourier(problem: Problem, degree: int) -> dict[str, Array]:
    """As the fit of Fourier, for frequencies that are multiples of one."""
    return _fit_fourier(problem, degree, tied=True)


FITS: Mapping[str, Callable[[Problem, int], dict[str, Array]]] = {
    "hermite": _fit_hermite,
    "fourier": _fit_fourier,
    "tropical": _fit_tropical,
    "tropical_rational": _fit_tropical_rational,
}
