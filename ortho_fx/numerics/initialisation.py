"""The initial values of expansions: "stable", with gains of exactly 1 that persist over many layers, and "paper".

Each basis computes its own initial values, in `ortho_fx.bases`; ours share the rule in `ortho_fx.bases.stable`. Fourier
and tropical functions start close to a line: at equal gains, deeper networks can be trained if their functions bend
less. `ortho_fx.bases.deep` makes that exact for a given depth.
"""

from __future__ import annotations

import functools

from ortho_fx.bases import Basis, basis_named
from ortho_fx.config import DEPTH, PRESET, ExpansionConfig, depth_of
from ortho_fx.numerics.moments import Array
from ortho_fx.numerics.preset import preset_values


def initial_parameters(config: ExpansionConfig) -> dict[str, Array]:
    """The initial parameters of an expansion for inputs N(0, 1), by name, in float64.

    "stable" (and "calibrated", which is rescaled after the inputs are measured) is exact at every degree, clamped or
    not: forward and backward gain are 1. Our bases also have |chi| < 1, except for the Hermite expansion of degree 1,
    which is the identity (chi = 1). Hermite coefficients start at a_k = +-0.7^(k-1) times a common factor
    (+-1 at degree 2), in the sign pattern + + - - that makes chi small; Fourier as sines (phases pi / 2) of frequencies
    0.35 k; tropical maxima with slopes equally spaced from two fifths of the largest (a quarter in the rational), and
    knots that divide the Gaussian into pieces of equal mass.

    "paper" is the initialisation of arXiv 2502.01247 with its sums taken up to the degree: a_k = 1 and
    a_0 = sqrt(1 - 1/n!), divided by sqrt(sum_{k<n} 1/k!), for Hermite; the same with squared factorials for Fourier;
    scale sqrt(2) / n and equal offsets for tropical. The paper starts its tropical rational from fits only: here it
    is the tropical start over a denominator of zeros.

    "depth:L" is "stable", bent less for a plain network of L layers; `ortho_fx.bases.deep` describes it.

    "preset:FILE" has the parameters in that file; `ortho_fx.numerics.preset` reads it.

    "fit" depends on the replaced function; `ortho_fx.numerics.fit` computes it.
    """
    assert config.degree is not None
    if config.init.startswith(PRESET):
        return preset_values(config)
    basis = basis_named(config.basis)
    depth = depth_of(config.init) if config.init.startswith(DEPTH) else None
    start = _start(basis, config.degree, config.init == "paper", depth, config.clamp, config.tied)
    return {name: value.copy() for name, value in start.items()}


# Cached, because a model has many sites and few configs.
@functools.lru_cache(maxsize=256)
def _start(
    basis: Basis, degree: int, paper: bool, depth: int | None, clamp: float | None, tied: bool
) -> dict[str, Array]:
    if paper:
        return basis.paper_start(degree, tied)
    bounds = None if clamp is None else (-clamp, clamp)
    if depth is not None:
        return basis.deep_start(degree, depth, bounds, tied)
    return basis.start(degree, bounds, tied)
