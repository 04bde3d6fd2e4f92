"""The fit of a piecewise linear function, for the tropical bases.

At fixed knots the problem is linear in the changes of slope. A knot with a positive change belongs to a maximum of
lines, one with a negative change to the maximum that is subtracted. Knots start at the kinks of the function and, where
the function is smooth, with the asymptotically best density |w f''^2|^(1/5). Gauss-Newton steps improve them.

Source: the density of knots is that of de Boor, A Practical Guide to Splines.
"""

from __future__ import annotations

import numpy as np

from ortho_fx.numerics.least_squares import Problem, Separable, Solution, cost_of
from ortho_fx.numerics.moments import Array

# Rounds of the direct search, which also improves the error of the slope.
_ROUNDS = 8


def maximum_of(line: Array, knots: Array, turns: Array, degree: int) -> tuple[Array, Array]:
    """Slopes and offsets of the lines whose maximum starts as `line` (offset, slope) and bends by `turns` at `knots`.

    Spare lines pass through a knot, with a slope between those of its two lines. They do not change the maximum, and
    become part of it as soon as their neighbours move. A function without knots gets copies of its line.
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


def fit_knots(problem: Problem, up: int, down: int) -> tuple[Array, Array, Array]:
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

    def solved(knots: Array, signs: Array) -> Solution:
        def admissible(knots: Array, linear: Array) -> bool:
            return bool((np.diff(knots) > 1e-6).all() and (linear[2:] * signs > 0).all())

        ridge = np.full(2 + len(knots), 1e-12)
        solution = Separable(columns, jacobian, problem.target, ridge, admissible).at(knots)
        turns = solution.linear[2:] * signs
        if len(knots) and turns.min() <= 0:
            # A knot whose change of slope has the wrong sign is useless. The worst one goes; the rest is solved again.
            kept = np.arange(len(knots)) != np.argmin(turns)
            return solved(knots[kept], signs[kept])
        steps = int(np.clip(2e7 / (len(problem.target) * (2 + 2 * len(knots)) ** 2), 2, 40))
        solution = solution.improved(steps) if len(knots) else solution
        # The steps use only the value's derivative in the knots: a slope jumps at a knot and has no derivative there.
        return solution.searched(_ROUNDS) if problem.derivative_weight else solution

    # The steps end in a nearby local optimum, so there are two starts.
    best = min((solved(*_first_knots(problem, up, down, power)) for power in (0.2, 0.4)), key=cost_of)
    return best.linear[:2], best.nonlinear, best.linear[2:]


def _first_knots(problem: Problem, up: int, down: int, power: float) -> tuple[Array, Array]:
    """The initial knots, in order, with their signs: at kinks, and between them with density w^power |f''|^(2/5)."""
    z, slope = problem.z, problem.slope
    width, turn = np.diff(z), np.diff(slope)
    apart = width > 0  # nodes beyond a clamp coincide
    width = np.where(apart, width, np.inf)
    rate = np.abs(turn) / width
    span = max(float(np.ptp(slope)), 1e-300)
    beside = np.maximum(np.concatenate([rate[2:], [0, 0]]), np.concatenate([[0, 0], rate[:-2]]))
    kink = apart & (np.abs(turn) > 0.02 * span) & (rate > 8 * beside)
    # The tangents from the left and the right meet at the kink.
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
