"""Gaussian moments of a function, from which gains and initial values are computed.

For a function g of a standard normal X they are E[g], E[g^2], E[g'^2], E[(X^2 - 1) g] and E[(X^2 - 1) g^2]. The last
two give derivatives with respect to the input's variance: d/dq E[h(sqrt(q) X)] at q = 1 is E[(X^2 - 1) h(X)] / 2, which
exists for functions with kinks too. Our bases have closed forms; this file integrates any function. All arithmetic is
float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ortho_fx.errors import OrthoFxError

Array = NDArray[np.float64]
Values = Mapping[str, Array]
Bounds = tuple[float, float]
# A function from points to values and slopes.
Sampled = Callable[[Array], tuple[Array, Array]]

# The nodes of each panel of the adaptive quadrature, and how often a panel of width 0.1 may be halved around a kink, to
# a width of 1e-10.
_NODES, _HALVINGS = 9, 30
# Gauss-Legendre nodes and weights of each panel of `clamped`, which `gains` calls hundreds of times.
_GAUSS = np.polynomial.legendre.leggauss(24)
# Of one width at a time; a kink or a jump makes a few.
_MOST_PANELS = 100_000


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


def integrated(function: Sampled) -> Moments:
    """The moments of a function by adaptive quadrature, which refines around kinks and jumps."""
    z, weight = adaptive_nodes(function)
    value, slope = function(z)
    return Moments(*(float(weight @ each) for each in integrands(z, value, slope)))


def integrands(z: Array, value: Array, slope: Array) -> tuple[Array, ...]:
    """The integrands of the moments at points z, in the order of the fields of `Moments`."""
    growth = z**2 - 1
    return value, value * value, slope * slope, growth * value, growth * value * value


def clamped(function: Sampled, bounds: Bounds, fastest: float, breaks: Sequence[float] | Array = ()) -> Moments:
    """The moments of a smooth function that is constant beyond two bounds, to the last digits of float64.

    The part between the bounds is integrated by Gauss-Legendre quadrature.

    Args:
        function: returns values and slopes at points between the bounds.
        bounds: the bounds to which the input is clamped.
        fastest: the highest angular frequency, in radians per unit of x, or the degree of a polynomial.
        breaks: further ends of panels: where a derivative may jump, or around a place where the function bends sharply.
    """
    # The probability beyond 12 standard deviations is below 1e-32.
    low, high = (min(max(bound, -12.0), 12.0) for bound in bounds)
    panels = max(1, math.ceil((high - low) * (1 + fastest) / 8))
    nodes, weights = _GAUSS
    edges = np.linspace(low, high, panels + 1)
    edges = np.unique(np.concatenate([edges, [place for place in breaks if low < place < high]]))
    half = np.diff(edges)[:, None] / 2
    x = (edges[:-1, None] + (nodes + 1) * half).ravel()
    weight = (weights * half).ravel() * density(x)
    ends = np.array([low, high])
    y, slope = function(np.concatenate([x, ends]))
    inner, outer = np.split(y, [len(x)])
    # Beyond a bound t: P(X > t), and E[X^2 - 1; X > t] = t phi(t).
    mass = np.array([above(-low), above(high)])
    growth = np.array([-low, high]) * density(ends)
    growing = weight * (x**2 - 1)
    return Moments(
        mean=float(weight @ inner + mass @ outer),
        square=float(weight @ inner**2 + mass @ outer**2),
        derivative_square=float(weight @ slope[: len(x)] ** 2),
        mean_growth=float(growing @ inner + growth @ outer),
        square_growth=float(growing @ inner**2 + growth @ outer**2),
    )


def density(x: Array) -> Array:
    return np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)


def above(x: float) -> float:
    return 0.5 * math.erfc(x / math.sqrt(2))


def adaptive_nodes(at: Callable[[Array], tuple[Array, Array]]) -> tuple[Array, Array]:
    """Nodes and weights (times the normal density) for the squares of a function and its derivative.

    A panel is halved if that changes an integral, so panels become small around kinks and jumps. Lobatto's rule has
    nodes at the ends of a panel; Gauss' rule would miss a kink between an end and the first node.
    """
    legendre = np.polynomial.Legendre.basis(_NODES - 1)
    nodes = np.concatenate([[-1.0], np.sort(legendre.deriv().roots().real), [1.0]])
    weights = 2 / (_NODES * (_NODES - 1) * legendre(nodes) ** 2)

    def rule(left: Array, width: float) -> tuple[Array, Array, Array]:
        z = left[:, None] + (nodes + 1) * (width / 2)
        weight = weights * (width / 2) * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
        value, slope = (part.reshape(z.shape) for part in at(z.ravel()))
        return z, weight, np.stack([(weight * value**2).sum(1), (weight * slope**2).sum(1)])

    width = 0.1
    left: Array = np.arange(-120.0, 120.0) * width
    _, _, whole = rule(left, width)
    done: list[tuple[Array, Array]] = []
    for _ in range(_HALVINGS):
        if len(left) > _MOST_PANELS:
            raise OrthoFxError("the function is noisy or oscillates too fast for its gains to be computed")
        left, width = np.stack([left, left + width / 2], axis=1).ravel(), width / 2
        z, weight, halves = rule(left, width)
        both = halves.reshape(2, -1, 2).sum(2)
        coarse = np.repeat((np.abs(both - whole) > 1e-13 * (1 + np.abs(both))).any(0), 2)
        done.append((z[~coarse].ravel(), weight[~coarse].ravel()))
        if not coarse.any():
            break
        left, whole = left[coarse], halves[:, coarse]
    else:
        done.append((z[coarse].ravel(), weight[coarse].ravel()))
    return np.concatenate([z for z, _ in done]), np.concatenate([weight for _, weight in done])
