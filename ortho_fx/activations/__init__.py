"""Activation modules, learnable and frozen, with their gains, fits, and conversion from torchortho's files."""

from ortho_fx.activations.expansion import (
    CLASSES,
    ExpansionActivation,
    FourierActivation,
    HermiteActivation,
    TropicalActivation,
    TropicalRationalActivation,
    activation_at,
    make_activation,
)

__all__ = [
    "CLASSES",
    "ExpansionActivation",
    "FourierActivation",
    "HermiteActivation",
    "TropicalActivation",
    "TropicalRationalActivation",
    "activation_at",
    "make_activation",
]
