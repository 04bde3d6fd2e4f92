"""Gaussian moments of the bases in closed form: what gains and initialisation are made of.

For a function g of a standard normal X: E[g], E[g^2], E[g'^2], E[(X^2 - 1) g] and E[(X^2 - 1) g^2]. The last two are
derivatives in the input's variance (d/dq E[h(sqrt(q) X)] at q = 1 is E[(X^2 - 1) h(X)] / 2), which exist at kinks too.
A clamped function, constant beyond two bounds, has closed forms where it is piecewise linear; elsewhere the part
between the bounds is integrated by Gauss-Legendre quadrature, to the last digits of float64. All arithmetic is float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ortho_fx.bases import BASES

Array = NDArray[np.float64]
Values = Mapping[str, Array]


@dataclass(frozen=True)
class Moments:
    """Moments of g(X) for a standard normal X."""

    mean: float
    square: float
    derivative_square: float
    mean_growth: float
    square_growth: float

    @property
    def variance(self) -> float:
        return max(self.square - self.mean**2, 0.0)


def moments(basis: str, values: Values, bounds: tuple[float, float] | None = None) -> Moments:
    """The moments of the expansion in `basis` with these parameters, its input clamped to `bounds` if there are any."""
    if basis in ("tropical", "tropical_rational"):
        knots, slopes, offsets = linear_pieces(basis, values)
        return _piecewise_linear(*(_cut(knots, slopes, offsets, bounds) if bounds else (knots, slopes, offsets)))
    if bounds:
        return _clamped(basis, values, bounds)
    return _hermite(values) if basis == "hermite" else _fourier(values)


def _hermite(values: Values) -> Moments:
    # In the orthonormal basis He_k / sqrt(k!) the coefficients are c_k = a_k / sqrt(k!); (X^2 - 1) acts on products of
    # neighbours: E[(X^2 - 1) g^2] = E[(g^2)''] = 2 E[g'^2] + 2 E[g g''].
    a = np.asarray(values["coefficients"], dtype=np.float64)
    root = np.exp([-0.5 * math.lgamma(k + 1) for k in range(len(a))])
    c = a * root
    first = c[1:] * np.sqrt(np.arange(1, len(a)))
    second = first[1:] * np.sqrt(np.arange(1, len(a) - 1))
    derivative_square = float(first @ first)
    return Moments(
        mean=float(c[0]),
        square=float(c @ c),
        derivative_square=derivative_square,
        mean_growth=float(second[0]) if len(second) else 0.0,
        square_growth=2.0 * (derivative_square + float(c[: len(second)] @ second)),
    )


def _fourier(values: Values) -> Moments:
    # E cos(u X - v) = cos(v) exp(-u^2 / 2), and E[(X^2 - 1) cos(u X - v)] is -u^2 times that.
    a0 = float(np.asarray(values["constant"])[0])
    w = np.asarray(wave_frequencies(values), dtype=np.float64)
    p = np.asarray(values["phases"], dtype=np.float64)
    a = np.asarray(values["coefficients"]) * np.exp([-math.lgamma(k + 2) for k in range(len(w))])

    def expected(u: Array, v: Array) -> Array:
        return np.cos(v) * np.exp(-(u**2) / 2)

    single = a * expected(w, p)
    pairs = np.outer(a, a) / 2
    minus, plus = np.subtract.outer(w, w), np.add.outer(w, w)
    cos_minus = expected(minus, np.subtract.outer(p, p))
    cos_plus = expected(plus, np.add.outer(p, p))
    wave_square = float((pairs * (cos_minus + cos_plus)).sum())
    wave_growth = -float((pairs * (minus**2 * cos_minus + plus**2 * cos_plus)).sum())
    mean_growth = -float((w**2 * single).sum())
    wave = float(single.sum())
    return Moments(
        mean=a0 + wave,
        square=a0**2 + 2 * a0 * wave + wave_square,
        derivative_square=float((pairs * np.outer(w, w) * (cos_minus - cos_plus)).sum()),
        mean_growth=mean_growth,
        square_growth=2 * a0 * mean_growth + wave_growth,
    )


def wave_frequencies(values: Values) -> Array:
    """The frequency of each wave of a Fourier expansion, also where one number is stored for all of them."""
    frequencies, degree = np.asarray(values["frequencies"]), len(values["coefficients"])
    return frequencies if len(frequencies) == degree else np.multiply.outer(np.arange(1.0, degree + 1), frequencies[0])


def _clamped(basis: str, values: Values, bounds: tuple[float, float]) -> Moments:
    # What lies beyond 12 standard deviations weighs less than 1e-32.
    low, high = (min(max(bound, -12.0), 12.0) for bound in bounds)
    fastest = float(np.abs(wave_frequencies(values)).max()) if basis == "fourier" else len(values["coefficients"])
    panels = max(1, math.ceil((high - low) * (1 + fastest) / 8))
    nodes, weights = np.polynomial.legendre.leggauss(24)
    edges = np.linspace(low, high, panels + 1)
    x = (edges[:-1, None] + (nodes + 1) * (high - low) / (2 * panels)).ravel()
    weight = np.tile(weights, panels) * ((high - low) / (2 * panels)) * _density(x)
    ends = np.array([low, high])
    formula = BASES[basis]
    with torch.inference_mode(False), torch.enable_grad():  # whatever mode the model is built in
        points = torch.from_numpy(np.concatenate([x, ends])).requires_grad_()
        parameters = [torch.from_numpy(np.asarray(values[parameter.name], float)) for parameter in formula.parameters]
        y = formula.evaluate(points, *formula.prepare(torch.float64, *parameters))
        (slope,) = torch.autograd.grad(y.sum(), points)
    inner, outer = np.split(y.detach().numpy(), [len(x)])
    # Beyond a bound t: P(X > t), and E[X^2 - 1; X > t] = t phi(t).
    mass = np.array([_above(-low), _above(high)])
    growth = np.array([-low, high]) * _density(ends)
    growing = weight * (x**2 - 1)
    return Moments(
        mean=float(weight @ inner + mass @ outer),
        square=float(weight @ inner**2 + mass @ outer**2),
        derivative_square=float(weight @ slope.numpy()[: len(x)] ** 2),
        mean_growth=float(growing @ inner + growth @ outer),
        square_growth=float(growing @ inner**2 + growth @ outer**2),
    )


def _density(x: Array) -> Array:
    return np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)


def _above(x: float) -> float:
    return 0.5 * math.erfc(x / math.sqrt(2))


def _cut(knots: Array, slopes: Array, offsets: Array, bounds: tuple[float, float]) -> tuple[Array, Array, Array]:
    """A piecewise linear function made constant beyond the bounds."""
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


def linear_pieces(basis: str, values: Values) -> tuple[Array, Array, Array]:
    """The knots (m), slopes and offsets (m + 1) of a tropical expansion, as the piecewise linear function it is."""
    knots, pieces = upper_envelope(values["slopes"], values["offsets"])
    slopes, offsets = np.asarray(values["slopes"])[pieces], np.asarray(values["offsets"])[pieces]
    if basis == "tropical":
        return knots, slopes, offsets
    below_knots, below = upper_envelope(values["denominator_slopes"], values["denominator_offsets"])
    below_slopes = np.asarray(values["denominator_slopes"])[below]
    below_offsets = np.asarray(values["denominator_offsets"])[below]
    merged = np.unique(np.concatenate([knots, below_knots]))
    # The piece to the right of each knot, and the leftmost one.
    up = np.concatenate([[0], np.searchsorted(knots, merged, side="right")])
    down = np.concatenate([[0], np.searchsorted(below_knots, merged, side="right")])
    return merged, slopes[up] - below_slopes[down], offsets[up] - below_offsets[down]


def upper_envelope(slopes: Array, offsets: Array) -> tuple[Array, NDArray[np.intp]]:
    """The knots of max_k (slopes[k] x + offsets[k]) in increasing order, and the lines between them."""
    order = np.lexsort((offsets, slopes))
    hull: list[int] = []
    knots: list[float] = []
    for line in order:
        if hull and slopes[hull[-1]] == slopes[line]:
            hull.pop()  # parallel and, by the order, below
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


def _piecewise_linear(knots: Array, slopes: Array, offsets: Array) -> Moments:
    # Truncated normal moments J_n = E[X^n; left < X < right]; J_n = (n - 1) J_{n-2} + left^{n-1} phi(left) - ...
    density = _density(knots)
    below = np.array([0.0, *(_above(-t) for t in knots), 1.0])
    edges = [np.concatenate([[0.0], knots**n * density, [0.0]]) for n in range(4)]
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
