"""How expansions start: "stable", with gains of exactly 1 that depth keeps, and "paper".

The stable rule is one for every basis. For any g with D = E[g'^2], m = E[g], v = Var g under X ~ N(0, 1), the Gaussian
Poincare inequality v <= D makes
    f = gamma (g + beta),  gamma = 1 / sqrt(D),  beta = -m +- sqrt(D - v)
exist, and f has the forward gain E[f^2] = 1 and the backward gain E[f'^2] = 1. It rescales the coefficients and moves
the constant term only. Of the two signs that one is taken whose slope chi = d/dq E[f(sqrt(q) X)^2] at q = 1 is smaller
in magnitude: the variance 1 attracts, layer after layer, where |chi| < 1.
"""

from __future__ import annotations

import functools
import math
from statistics import NormalDist

import numpy as np

from ortho_fx.config import ExpansionConfig
from ortho_fx.moments import Array, Values, moments, wave_frequencies


def initial_parameters(config: ExpansionConfig) -> dict[str, Array]:
    """The starting parameters of an expansion for inputs N(0, 1), by name, in float64.

    "stable" (and "calibrated", which is rescaled once the inputs are measured) is exact at every degree, clamped or
    not: forward and backward gain 1, and |chi| < 1 but for the Hermite expansion of degree 1, which is the identity
    (chi = 1). Hermite coefficients start at a_k = +-0.7^(k-1) times a common factor
    (+-1 at degree 2), in the sign pattern + + - - that makes chi small; Fourier as sines (phases pi / 2) of frequencies
    0.35 k; tropical maxima with slopes equally spaced from two fifths of the largest (a quarter in the rational), and
    knots that divide the Gaussian into pieces of equal mass. Fourier and tropical functions start this close to a line
    because a network of equal gains trains the deeper, the less its functions bend (benchmarks/trainable_depth.py
    measures how deep).

    "paper" is the initialisation of arXiv 2502.01247 with its sums taken up to the degree: a_k = 1 and
    a_0 = sqrt(1 - 1/n!), divided by sqrt(sum_{k<n} 1/k!), for Hermite; the same with squared factorials for Fourier;
    scale sqrt(2) / n and equal offsets for tropical. The paper starts its tropical rational from fits only: here it
    is the tropical start over a denominator of zeros.

    "fit" depends on the function that is replaced, and starts in `ortho_fx.fit`.
    """
    assert config.degree is not None
    start = _start(config.basis, config.degree, config.init == "paper", config.clamp)
    values = {name: value.copy() for name, value in start.items()}
    if config.tied:  # they are multiples of the first
        values["frequencies"] = values["frequencies"][:1]
    return values


# A model has many sites and few configs.
@functools.lru_cache(maxsize=256)
def _start(basis: str, degree: int, paper: bool, clamp: float | None) -> dict[str, Array]:
    if paper:
        return _PAPER[basis](degree)
    return _stable(basis, _SHAPES[basis](degree), None if clamp is None else (-clamp, clamp))


def rescale(basis: str, values: Values, mean: float, std: float) -> dict[str, Array]:
    """The parameters of std * f((x - mean) / std), for those of f: exact, since every basis is closed under it.

    Hermite polynomials change variable by their generating function exp(x t - t^2 / 2): P_n(u x + v) =
    sum_k u^k h_{n-k} P_k(x), where m h_m = v h_{m-1} + (u^2 - 1) h_{m-2} and h_0 = 1.
    """
    if basis == "hermite":
        a = np.asarray(values["coefficients"], dtype=np.float64)
        u, v = 1 / std, -mean / std
        h = np.zeros(len(a))
        h[0] = 1.0
        for m in range(1, len(a)):
            h[m] = (v * h[m - 1] + (u**2 - 1) * (h[m - 2] if m > 1 else 0.0)) / m
        return {"coefficients": np.array([std * u**k * (a[k:] @ h[: len(a) - k]) for k in range(len(a))])}
    if basis == "fourier":
        return {
            "constant": std * values["constant"],
            "coefficients": std * values["coefficients"],
            "frequencies": values["frequencies"] / std,
            "phases": values["phases"] + wave_frequencies(values) * (mean / std),
        }
    moved = dict(values)
    for slopes, offsets in (("slopes", "offsets"), ("denominator_slopes", "denominator_offsets")):
        if offsets in values:
            moved[offsets] = std * values[offsets] - mean * values[slopes]
    return moved


def _stable(basis: str, values: dict[str, Array], bounds: tuple[float, float] | None) -> dict[str, Array]:
    g = moments(basis, values, bounds)
    gamma = 1.0 / math.sqrt(g.derivative_square)
    shift = math.sqrt(max(g.derivative_square - g.variance, 0.0))
    candidates = []
    for beta in (-g.mean + shift, -g.mean - shift):
        candidate = {name: gamma * value if name in _SCALED else value for name, value in values.items()}
        constant = _CONSTANT[basis]
        moved = candidate[constant].copy()
        moved[_constant_index(basis)] += gamma * beta
        candidate[constant] = moved
        candidates.append(candidate)
    return min(candidates, key=lambda candidate: abs(moments(basis, candidate, bounds).square_growth))


# The parameters that multiply the function, and the one that holds its constant term.
_SCALED = {"constant", "coefficients", "slopes", "offsets", "denominator_slopes", "denominator_offsets"}
_CONSTANT = {
    "hermite": "coefficients",
    "fourier": "constant",
    "tropical": "offsets",
    "tropical_rational": "offsets",
}


def _constant_index(basis: str) -> slice:
    """Where in that parameter: a_0 alone, or every offset, since the maximum of shifted lines is shifted by as much."""
    return slice(0, 1) if basis in ("hermite", "fourier") else slice(None)


def _hermite_shape(degree: int) -> dict[str, Array]:
    # Smaller coefficients at higher orders widen the basin from which a signal comes back: `gains(...).basin` is 3.6
    # where equal ones have 2.5 at degree 3, with a slope still below 1/2. A parabola gains nothing.
    ratio = 0.7 if degree > 2 else 1.0
    order = np.arange(degree + 1)
    coefficients = np.array([1.0, 1.0, -1.0, -1.0])[order % 4] * ratio ** np.maximum(order - 1, 0)
    coefficients[0] = 0.0
    return {"coefficients": coefficients}


def _fourier_shape(degree: int, fundamental: float = 0.35, phase: float = math.pi / 2) -> dict[str, Array]:
    return {
        "constant": np.zeros(1),
        "coefficients": np.ones(degree),
        "frequencies": fundamental * np.arange(1.0, degree + 1),
        "phases": np.full(degree, phase),
    }


def _lines(degree: int, flattest: float, steepest: float, shift: float) -> tuple[Array, Array]:
    """Slopes and offsets of a maximum of lines whose knots are at the quantiles (k + shift) / (n + 1)."""
    slopes = np.linspace(flattest, steepest, degree + 1)
    knots = np.array([NormalDist().inv_cdf((k + shift) / (degree + 1)) for k in range(1, degree + 1)])
    return slopes, np.concatenate([[0.0], -np.cumsum(np.diff(slopes) * knots)])


def _tropical_shape(degree: int) -> dict[str, Array]:
    # Flatter first slopes bend it more: from a quarter on, a plain network of 128 layers does not train to 95 %.
    slopes, offsets = _lines(degree, 0.4, 1.0, 0.0)
    return {"slopes": slopes, "offsets": offsets}


def _tropical_rational_shape(degree: int) -> dict[str, Array]:
    # Half as steep and with knots between the numerator's: no piece of the one mirrors the gradient of the other.
    slopes, offsets = _lines(degree, 0.25, 1.0, 0.0)
    denominator_slopes, denominator_offsets = _lines(degree, 0.125, 0.5, -0.5)
    return {
        "slopes": slopes,
        "offsets": offsets,
        "denominator_slopes": denominator_slopes,
        "denominator_offsets": denominator_offsets,
    }


def _factorial_weights(degree: int, power: int) -> tuple[float, float]:
    """sqrt(1 - 1 / n!^power), and 1 / sqrt(sum_{k<n} 1 / k!^power)."""
    total = math.fsum(1.0 / math.factorial(k) ** power for k in range(degree))
    return math.sqrt(1.0 - 1.0 / math.factorial(degree) ** power), 1.0 / math.sqrt(total)


def _paper_hermite(degree: int) -> dict[str, Array]:
    constant, scale = _factorial_weights(degree, 1)
    return {"coefficients": scale * np.array([constant, *np.ones(degree)])}


def _paper_fourier(degree: int) -> dict[str, Array]:
    constant, scale = _factorial_weights(degree, 2)
    return {
        **_fourier_shape(degree, 1.0, math.pi / 4),
        "constant": np.array([scale * constant]),
        "coefficients": np.full(degree, scale),
    }


def _paper_tropical(degree: int) -> dict[str, Array]:
    scale = math.sqrt(2) / degree
    return {"slopes": scale * np.arange(degree + 1.0), "offsets": np.full(degree + 1, scale)}


def _paper_tropical_rational(degree: int) -> dict[str, Array]:
    zeros = np.zeros(degree + 1)
    return {**_paper_tropical(degree), "denominator_slopes": zeros, "denominator_offsets": zeros.copy()}


_SHAPES = {
    "hermite": _hermite_shape,
    "fourier": _fourier_shape,
    "tropical": _tropical_shape,
    "tropical_rational": _tropical_rational_shape,
}
_PAPER = {
    "hermite": _paper_hermite,
    "fourier": _paper_fourier,
    "tropical": _paper_tropical,
    "tropical_rational": _paper_tropical_rational,
}
