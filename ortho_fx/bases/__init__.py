"""The bases: each is a family of functions, with all code that depends on the family.

A basis has its parameters (names and shapes), formula, exact first derivatives, moments, initial values, fit, and
frozen form. It has no state. `BASES` holds the known bases by name; `ortho_fx.register_basis` adds to it.
"""

from __future__ import annotations

from ortho_fx.bases.basis import Basis
from ortho_fx.bases.chebyshev import CHEBYSHEV
from ortho_fx.bases.fourier import FOURIER
from ortho_fx.bases.hermite import HERMITE
from ortho_fx.bases.piecewise_power import PIECEWISE_POWER
from ortho_fx.bases.safe_rational import SAFE_RATIONAL
from ortho_fx.bases.stock_series import GELU_SERIES, RELU_SQUARED_SERIES, SILU_SERIES
from ortho_fx.bases.tropical import TROPICAL
from ortho_fx.bases.tropical_rational import TROPICAL_RATIONAL
from ortho_fx.errors import OrthoFxError

OURS = (
    HERMITE,
    FOURIER,
    TROPICAL,
    TROPICAL_RATIONAL,
    CHEBYSHEV,
    SAFE_RATIONAL,
    PIECEWISE_POWER,
    GELU_SERIES,
    SILU_SERIES,
    RELU_SQUARED_SERIES,
)
BASES: dict[str, Basis] = {basis.name: basis for basis in OURS}

__all__ = [
    "BASES",
    "CHEBYSHEV",
    "FOURIER",
    "GELU_SERIES",
    "HERMITE",
    "OURS",
    "PIECEWISE_POWER",
    "RELU_SQUARED_SERIES",
    "SAFE_RATIONAL",
    "SILU_SERIES",
    "TROPICAL",
    "TROPICAL_RATIONAL",
    "Basis",
    "basis_named",
]

# Activations that users may look for among the bases, and why they are none.
_NO_BASES = {
    "polynorm": "it divides by norms over the last dimension, so it is no function of one number, and no rewrite can "
    "put it in the place of an activation: build ortho_fx.PolyNormActivation() into the model",
}


def basis_named(name: str) -> Basis:
    """The basis of that name.

    Raises:
        OrthoFxError: an unknown basis; the message lists the known ones.
    """
    if isinstance(name, str) and name in _NO_BASES:
        raise OrthoFxError(f"{name} is no basis: {_NO_BASES[name]}")
    if not isinstance(name, str) or name not in BASES:
        raise OrthoFxError(f"basis must be one of {', '.join(BASES)}; got {name!r}")
    return BASES[name]
