"""The bases: each module holds one family of functions as formulas on tensors.

A basis knows its parameters (names and shapes), how to evaluate itself, and its exact first derivatives. It holds no
state: operators, activation modules and initialisers all read the same formulas.
"""

from __future__ import annotations

from ortho_fx.bases.basis import Basis
from ortho_fx.bases.fourier import FOURIER
from ortho_fx.bases.hermite import HERMITE
from ortho_fx.bases.tropical import TROPICAL
from ortho_fx.bases.tropical_rational import TROPICAL_RATIONAL

BASES: dict[str, Basis] = {basis.name: basis for basis in (HERMITE, FOURIER, TROPICAL, TROPICAL_RATIONAL)}

__all__ = ["BASES", "FOURIER", "HERMITE", "TROPICAL", "TROPICAL_RATIONAL", "Basis"]
