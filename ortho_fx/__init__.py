"""ortho_fx: learnable activations for any PyTorch model, as fast as the ones that they replace."""

from ortho_fx.activations import (
    ExpansionActivation,
    FourierActivation,
    HermiteActivation,
    TropicalActivation,
    TropicalRationalActivation,
)
from ortho_fx.calibration import Calibration, calibrate_
from ortho_fx.check import Check
from ortho_fx.config import ExpansionConfig
from ortho_fx.errors import OrthoFxError
from ortho_fx.fit import Fit, fit
from ortho_fx.freeze import FrozenExpansion, freeze_
from ortho_fx.gains import Gains, gains
from ortho_fx.optimizer import param_groups
from ortho_fx.passes.sites import Site
from ortho_fx.rewrite import RewriteReport, find_sites, revert_, rewrite_

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "Check",
    "ExpansionActivation",
    "ExpansionConfig",
    "Fit",
    "FourierActivation",
    "FrozenExpansion",
    "Gains",
    "HermiteActivation",
    "OrthoFxError",
    "RewriteReport",
    "Site",
    "TropicalActivation",
    "TropicalRationalActivation",
    "calibrate_",
    "find_sites",
    "fit",
    "freeze_",
    "gains",
    "param_groups",
    "revert_",
    "rewrite_",
]
