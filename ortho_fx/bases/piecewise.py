"""Maxima of lines as piecewise linear functions: their knots, moments and necessary lines, for the tropical bases."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from ortho_fx.bases.folded import Folded, packed
from ortho_fx.numerics.moments import Array, Bounds, Moments, above, density

# The knots (m), and the slopes and offsets of the pieces between them (m + 1).
Pieces = tuple[Array, Array, Array]


def lines_between_quantiles(degree: int, flattest: float, steepest: float, shift: float) -> tuple[Array, Array]:
    """Slopes and offsets of a maximum of lines whose knots are at the quantiles (k + shift) / (n + 1) of N(0, 1)."""
    slopes = np.linspace(flattest, steepest, degree + 1)
    knots = np.array([NormalDist().inv_cdf((k + shift) / (degree + 1)) for k in range(1, degree + 1)])
    return slopes, np.concatenate([[0.0], -np.cumsum(np.diff(slopes) * knots)])


def moments_of(pieces: Pieces, bounds: Bounds | None) -> Moments:
    """The moments of a piecewise linear function, in closed form."""
    return _moments(*(_cut(*pieces, bounds) if bounds else pieces))


def _cut(knots: Array, slopes: Array, offsets: Array, bounds: Bounds) -> Pieces:
    """Makes a piecewise linear function constant beyond the bounds."""
    inside = (knots > bounds[0]) & (knots < bounds[1])
    edges = np.array(bounds)
    piece = np.array([np.searchsorted(knots, bounds[0], side="right"), np.searchsorted(knots, bounds[1])])
    level = slopes[piece] * edges + offsets[piece]
    kept = slice(piece[0], piece[1] + 1)
    return (
        np.concatenate([edges[:1], knots[inside], edges[1:]]),
        np.concatenate([[0.0], slopes[kept], [0.0]]),
        np.concatenate([level[:1], offsets[kept], level[1:]]),
    )


def maximum_pieces(slopes: Array, offsets: Array) -> Pieces:
    """max_k (slopes[k] x + offsets[k]) as knots and pieces."""
    knots, pieces = upper_envelope(slopes, offsets)
    return knots, np.asarray(slopes)[pieces], np.asarray(offsets)[pieces]


def less(one: Pieces, other: Pieces) -> Pieces:
    """The difference of two piecewise linear functions."""
    merged = np.unique(np.concatenate([one[0], other[0]]))
    # The piece to the right of each knot, and the leftmost one.
    up = np.concatenate([[0], np.searchsorted(one[0], merged, side="right")])
    down = np.concatenate([[0], np.searchsorted(other[0], merged, side="right")])
    return merged, one[1][up] - other[1][down], one[2][up] - other[2][down]


def upper_envelope(slopes: Array, offsets: Array) -> tuple[Array, NDArray[np.intp]]:
    """The knots of max_k (slopes[k] x + offsets[k]) in increasing order, and the lines between them."""
    order = np.lexsort((offsets, slopes))
    hull: list[int] = []
    knots: list[float] = []
    for line in order:
        if hull and slopes[hull[-1]] == slopes[line]:
            hull.pop()  # parallel, and below because of the sort order
            if knots:
                knots.pop()
        while hull:
            top = hull[-1]
            knot = float((offsets[top] - offsets[line]) / (slopes[line] - slopes[top]))
            if not knots or knot > knots[-1]:
                knots.append(knot)
                break
            hull.pop()
            knots.pop()
        hull.append(int(line))
    return np.array(knots), np.array(hull, dtype=np.intp)


def _moments(knots: Array, slopes: Array, offsets: Array) -> Moments:
    # Truncated normal moments J_n = E[X^n; left < X < right]; J_n = (n - 1) J_{n-2} + left^{n-1} phi(left) - ...
    weight = density(knots)
    below = np.array([0.0, *(above(-t) for t in knots), 1.0])
    edges = [np.concatenate([[0.0], knots**n * weight, [0.0]]) for n in range(4)]
    j0 = np.diff(below)
    j1 = -np.diff(edges[0])
    j2 = j0 - np.diff(edges[1])
    j3 = 2 * j1 - np.diff(edges[2])
    j4 = 3 * j2 - np.diff(edges[3])
    s, b = slopes, offsets
    return Moments(
        mean=float((s * j1 + b * j0).sum()),
        square=float((s**2 * j2 + 2 * s * b * j1 + b**2 * j0).sum()),
        derivative_square=float((s**2 * j0).sum()),
        mean_growth=float((s * (j3 - j1) + b * (j2 - j0)).sum()),
        square_growth=float((s**2 * (j4 - j2) + 2 * s * b * (j3 - j1) + b**2 * (j2 - j0)).sum()),
    )


def needed_lines(slopes: Array, offsets: Array, interval: Bounds | None) -> tuple[Array, Array]:
    """The slopes and offsets of the lines that are the maximum on some part of the interval."""
    lowest, highest = (-math.inf, math.inf) if interval is None else interval
    needed = np.zeros(slopes.shape, dtype=bool)
    for k in range(len(slopes)):
        steeper = slopes - slopes[k]
        # Line j crosses line k at this x. It is above line k to the right if it is steeper, and to the left if flatter.
        with np.errstate(divide="ignore", invalid="ignore"):
            crossing = (offsets[k] - offsets) / steeper
        start = np.where(steeper < 0, crossing, -math.inf).max(axis=0)
        end = np.where(steeper > 0, crossing, math.inf).min(axis=0)
        higher = offsets > offsets[k]
        higher[:k] |= offsets[:k] == offsets[k]
        needed[k] = (np.maximum(start, lowest) < np.minimum(end, highest)) & ~(higher & (steeper == 0)).any(axis=0)
    if interval is not None:  # an interval of one point needs one line
        top = (slopes * highest + offsets).argmax(axis=0)
        needed[top, np.arange(len(top))] |= ~needed.any(axis=0)
    _, slopes, offsets = packed(needed, slopes, offsets)
    return slopes, offsets


def maximum_or_line(slopes: Array, offsets: Array) -> Folded:
    """The form of a maximum of needed lines; a single line is a polynomial."""
    if len(slopes) == 1:
        return "polynomial", {"monomial_coefficients": np.concatenate([offsets, slopes])}
    return "maximum", {"slopes": slopes, "offsets": offsets}
