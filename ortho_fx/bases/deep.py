"""The start of init "depth:L", for plain networks of L layers: gains of 1, and the less bent the larger L is.

With c_k the orthonormal Hermite coefficients of f, two inputs of cosine c leave a wide layer with the cosine
    C(c) = sum_k c_k^2 c^k,
if the forward gain of f is 1. Then C(1) = 1, and a backward gain of 1 is C'(1) = 1. All cosines go to 1, but slowly:
after L layers 1 - c is about 2 / (C''(1) L), with C''(1) = E[f''^2]. A network that gives nearly the same direction to
all inputs learns slowly or not at all. So f bends just as much as keeps two orthogonal inputs at the cosine `COSINE`
after L layers. The functions to choose from are
    f = gamma (a x + share n(x) + beta),
where a x is the linear part of the "stable" start, with a = E[X y(X)], and n(x) is its rest. gamma and beta keep both
gains at 1, as in `ortho_fx.bases.stable`. Where a basis holds no lines, y(share x) / share is in the place of the sum.

Source: the map of cosines is that of Poole et al., arXiv 1606.05340. To choose activations by the map of the whole
network is the idea of Martens et al., arXiv 2110.01765, and Zhang et al., arXiv 2203.08120. Their conditions and their
families of functions are others.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np

from ortho_fx.bases import numeric
from ortho_fx.bases.stable import Closed, stable
from ortho_fx.errors import OrthoFxError
from ortho_fx.numerics.moments import Array, Bounds, Values

# The cosine of two orthogonal inputs after all layers.
COSINE = 0.5
# The highest order of the map. What is left of a function with kinks, below 1e-3, counts as one order more.
_ORDERS = 100
# The search for the share: the halvings until it is small enough, the steps after that, and the allowed error of the
# cosine.
_HALVINGS, _STEPS, _CLOSE = 10, 40, 1e-6
# Gains that are further off are corrected; this concerns bases that cannot be scaled and shifted exactly.
_OFF = 1e-9


class Straightened(Closed, numeric.Formula, Protocol):
    def start(self, degree: int, bounds: Bounds | None = None, tied: bool = False) -> dict[str, Array]: ...

    def straightened(self, values: Values, share: float, slope: float) -> dict[str, Array]: ...


def deep(basis: Straightened, degree: int, depth: int, bounds: Bounds | None, tied: bool) -> dict[str, Array]:
    """The parameters of the start for `depth` layers; those of the "stable" start if it bends no more than that.

    Raises:
        OrthoFxError: the basis, or its clamp, bends too much for that depth however small the share is.
    """
    start = basis.start(degree, bounds, tied)
    slope = float(orthonormal_coefficients(basis, start, bounds)[1])

    def at(share: float) -> dict[str, Array]:
        values = stable(basis, basis.straightened(start, share, slope), bounds)
        found = basis.moments(values, bounds)
        if max(abs(found.square - 1), abs(found.derivative_square - 1)) < _OFF:
            return values
        corrected = numeric.with_gains(basis, values, (1.0, 1.0), bounds)
        if corrected is None:
            raise too_deep()
        return corrected

    def too_deep() -> OrthoFxError:
        clamped, way_out = ("", "") if bounds is None else (f" clamped at {bounds[1]:g}", "a larger clamp, ")
        return OrthoFxError(
            f"init 'depth:{depth}' finds no {basis.name} expansion of degree {degree}{clamped} that is close enough to "
            f"a line: choose {way_out}a smaller depth, or init 'stable'"
        )

    def excess(values: Values) -> float:
        return network_cosine(orthonormal_coefficients(basis, values, bounds), depth) - COSINE

    share, values = 1.0, start
    for _ in range(_HALVINGS):
        if excess(values) <= 0:
            break
        share /= 2
        values = at(share)
    else:
        raise too_deep()
    low, high = share, 2 * share
    for _ in range(_STEPS if share < 1 else 0):
        off = excess(values)
        if abs(off) < _CLOSE:
            break
        low, high = (low, share) if off > 0 else (share, high)
        share = math.sqrt(low * high)
        values = at(share)
    return values


def orthonormal_coefficients(basis: numeric.Formula, values: Values, bounds: Bounds | None = None) -> Array:
    """c_k = E[f(X) He_k(X)] / sqrt(k!) for k = 0 .. 100, by quadrature, to 1e-4 where f has kinks."""
    z, weight = numeric.gaussian_nodes(8.0)
    weighted = weight * numeric.sampled(basis, values, z, bounds)[0]
    before, polynomial = np.zeros_like(z), np.ones_like(z)
    coefficients = []
    for k in range(_ORDERS + 1):
        coefficients.append(weighted @ polynomial)
        before, polynomial = polynomial, (z * polynomial - math.sqrt(k) * before) / math.sqrt(k + 1)
    return np.array(coefficients)


def network_cosine(coefficients: Array, depth: int, cosine: float = 0.0) -> float:
    """The cosine of two inputs after `depth` wide layers, from the c_k of an activation with a forward gain of 1."""
    squares = coefficients**2
    powers = np.arange(len(squares) + 1)
    squares = np.append(squares, max(1.0 - squares.sum(), 0.0))
    for _ in range(depth):
        cosine = float(squares @ cosine**powers)
    return cosine
