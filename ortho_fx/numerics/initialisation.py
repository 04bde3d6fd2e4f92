"""How expansions start: "stable", with gains of exactly 1 that depth keeps, and "paper".

Each basis has its own starts, in `ortho_fx.bases`; `ortho_fx.bases.stable` has the rule that ours share. Fourier and
tropical functions start close to a line because a network of equal gains trains the deeper, the less its functions bend
(benchmarks/trainable_depth.py measures how deep).
"""

from __future__ import annotations

import functools

from ortho_fx.bases import Basis, basis_named
from ortho_fx.config import ExpansionConfig
from ortho_fx.numerics.moments import Array


def initial_parameters(config: ExpansionConfig) -> dict[str, Array]:
    """The starting parameters of an expansion for inputs N(0, 1), by name, in float64.

    "stable" (and "calibrated", which is rescaled once the inputs are measured) is exact at every degree, clamped or
    not: forward and backward gain 1, and for our bases |chi| < 1 but for the Hermite expansion of degree 1, which is
    the identity (chi = 1). Hermite coefficients start at a_k = +-0.7^(k-1) times a common factor
    (+-1 at degree 2), in the sign pattern + + - - that makes chi small; Fourier as sines (phases pi / 2) of frequencies
    0.35 k; tropical maxima with slopes equally spaced from two fifths of the largest (a quarter in the rational), and
    knots that divide the Gaussian into pieces of equal mass.

    "paper" is the initialisation of arXiv 2502.01247 with its sums taken up to the degree: a_k = 1 and
    a_0 = sqrt(1 - 1/n!), divided by sqrt(sum_{k<n} 1/k!), for Hermite; the same with squared factorials for Fourier;
    scale sqrt(2) / n and equal offsets for tropical. The paper starts its tropical rational from fits only: here it
    is the tropical start over a denominator of zeros.

    "fit" depends on the function that is replaced, and starts in `ortho_fx.numerics.fit`.
    """
    assert config.degree is not None
    basis = basis_named(config.basis)
    start = _start(basis, config.degree, config.init == "paper", config.clamp, config.tied)
    return {name: value.copy() for name, value in start.items()}


# A model has many sites and few configs.
@functools.lru_cache(maxsize=256)
def _start(basis: Basis, degree: int, paper: bool, clamp: float | None, tied: bool) -> dict[str, Array]:
    if paper:
        return basis.paper_start(degree, tied)
    return basis.start(degree, None if clamp is None else (-clamp, clamp), tied)
