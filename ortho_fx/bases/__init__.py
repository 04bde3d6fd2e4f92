"""The bases: each is a family of functions, with all code that depends on the family.

A basis has its parameters (names and shapes), formula, exact first derivatives, moments, initial values, fit, and
frozen form. It has no state. `BASES` holds the known bases by name; `ortho_fx.register_basis` adds to it.
"""

from __future__ import annotations

from ortho_fx.bases.basis import Basis
from ortho_fx.bases.fourier import FOURIER
from ortho_fx.bases.hermite import HERMITE
from ortho_fx.bases.tropical import TROPICAL
from ortho_fx.bases.tropical_rational import TROPICAL_RATIONAL
from ortho_fx.errors import OrthoFxError

OURS = (HERMITE, FOURIER, TROPICAL, TROPICAL_RATIONAL)
BASES: dict[str, Basis] = {basis.name: basis for basis in OURS}

__all__ = ["BASES", "FOURIER", "HERMITE", "OURS", "TROPICAL", "TROPICAL_RATIONAL", "Basis", "basis_named"]


def basis_named(name: str) -> Basis:
    """The basis of that name.

    Raises:
        OrthoFxError: an unknown basis; the message lists the known ones.
    """
    if not isinstance(name, str) or name not in BASES:
        raise OrthoFxError(f"basis must be one of {', '.join(BASES)}; got {name!r}")
    return BASES[name]
