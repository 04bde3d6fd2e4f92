"""The "stable" start of bases whose functions can be scaled and shifted exactly.

The rule is one for all of them. For any g with D = E[g'^2], m = E[g], v = Var g under X ~ N(0, 1), the Gaussian
Poincare inequality v <= D makes
    f = gamma (g + beta),  gamma = 1 / sqrt(D),  beta = -m +- sqrt(D - v)
exist, and f has the forward gain E[f^2] = 1 and the backward gain E[f'^2] = 1. It rescales the coefficients and moves
the constant term only. Of the two signs that one is taken whose slope chi = d/dq E[f(sqrt(q) X)^2] at q = 1 is smaller
in magnitude: the variance 1 attracts, layer after layer, where |chi| < 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

from ortho_fx.numerics.moments import Array, Bounds, Moments, Values

# The parameters of scale * g + shift, for those of g.
Affine = Callable[[Values, float, float], dict[str, Array]]


class HasMoments(Protocol):
    def moments(self, values: Values, bounds: Bounds | None = None) -> Moments: ...


def stable(basis: HasMoments, values: Values, affine: Affine, bounds: Bounds | None) -> dict[str, Array]:
    """The parameters of gamma (g + beta), for those of g, its input clamped to `bounds` if there are any."""
    g = basis.moments(values, bounds)
    gamma = 1.0 / math.sqrt(g.derivative_square)
    shift = math.sqrt(max(g.derivative_square - g.variance, 0.0))
    candidates = [affine(values, gamma, gamma * beta) for beta in (-g.mean + shift, -g.mean - shift)]
    return min(candidates, key=lambda candidate: abs(basis.moments(candidate, bounds).square_growth))
