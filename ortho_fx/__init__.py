"""ortho_fx: learnable activations for any PyTorch model, as fast as the ones that they replace."""

from ortho_fx import torch_private  # noqa: F401  -- before all else: it refuses a PyTorch that is too old
from ortho_fx.activations import (
    ExpansionActivation,
    FourierActivation,
    HermiteActivation,
    TropicalActivation,
    TropicalRationalActivation,
)
from ortho_fx.anneal import Annealing
from ortho_fx.calibration import Calibration, calibrate_
from ortho_fx.check import Check
from ortho_fx.config import ExpansionConfig
from ortho_fx.doctor import CompileSupport, compile_support
from ortho_fx.errors import OrthoFxError
from ortho_fx.export import Export, export_onnx, export_program
from ortho_fx.fit import Fit, fit
from ortho_fx.freeze import FrozenExpansion, freeze_
from ortho_fx.gains import Gains, gains
from ortho_fx.optimizer import param_groups
from ortho_fx.passes.sites import Site
from ortho_fx.polynomial import Polynomial, to_polynomial
from ortho_fx.polynomial_costs import PolynomialReport, polynomial_report
from ortho_fx.register import register_basis
from ortho_fx.rewrite import RewriteReport, find_sites, revert_, rewrite_

__version__ = "0.1.0"

__all__ = [
    "Annealing",
    "Calibration",
    "Check",
    "CompileSupport",
    "ExpansionActivation",
    "ExpansionConfig",
    "Export",
    "Fit",
    "FourierActivation",
    "FrozenExpansion",
    "Gains",
    "HermiteActivation",
    "OrthoFxError",
    "Polynomial",
    "PolynomialReport",
    "RewriteReport",
    "Site",
    "TropicalActivation",
    "TropicalRationalActivation",
    "calibrate_",
    "compile_support",
    "export_onnx",
    "export_program",
    "find_sites",
    "fit",
    "freeze_",
    "gains",
    "param_groups",
    "polynomial_report",
    "register_basis",
    "revert_",
    "rewrite_",
    "to_polynomial",
]
