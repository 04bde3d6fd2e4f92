"""Activation modules: learnable, frozen; their gains, their fits, and the files of torchortho."""

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
