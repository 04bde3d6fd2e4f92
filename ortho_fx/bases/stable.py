"""The "stable" start of bases whose functions can be scaled and shifted exactly.

All these bases use one rule. For any g with D = E[g'^2], m = E[g], v = Var g under X ~ N(0, 1), the Gaussian Poincare
inequality v <= D ensures that
    f = gamma (g + beta),  gamma = 1 / sqrt(D),  beta = -m +- sqrt(D - v)
exists. f has the forward gain E[f^2] = 1 and the backward gain E[f'^2] = 1. The rule only scales the coefficients and
shifts the constant term. Of the two signs, the one with the smaller |chi| is taken, where chi is the slope
d/dq E[f(sqrt(q) X)^2] at q = 1. If |chi| < 1, the variance converges to 1 layer after layer.
"""

from __future__ import annotations

import math
from typing import Protocol

from ortho_fx.numerics.moments import Array, Bounds, Moments, Values


class Closed(Protocol):
    def moments(self, values: Values, bounds: Bounds | None = None) -> Moments: ...

    def affine(self, values: Values, scale: float, shift: float) -> dict[str, Array]: ...


def stable(basis: Closed, values: Values, bounds: Bounds | None) -> dict[str, Array]:
    """The parameters of gamma (g + beta), from those of g, with the input clamped to `bounds` if given."""
    g = basis.moments(values, bounds)
    gamma = 1.0 / math.sqrt(g.derivative_square)
    shift = math.sqrt(max(g.derivative_square - g.variance, 0.0))
    candidates = [basis.affine(values, gamma, gamma * beta) for beta in (-g.mean + shift, -g.mean - shift)]
    return min(candidates, key=lambda candidate: abs(basis.moments(candidate, bounds).square_growth))
