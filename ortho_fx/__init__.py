"""ortho_fx: learnable activations for any PyTorch model, as fast as the ones that they replace."""

from ortho_fx.cli import completion

if completion.asked():  # by a shell, in which the import of PyTorch would be a wait of seconds
    completion.answer()

from ortho_fx import (
    moved,  # noqa: F401
    torch_private,  # noqa: F401  -- first of all: it refuses a PyTorch that is too old
)
from ortho_fx.activations.expansion import (
    ChebyshevActivation,
    ExpansionActivation,
    FourierActivation,
    GELUSeriesActivation,
    HermiteActivation,
    PiecewisePowerActivation,
    ReLUSquaredSeriesActivation,
    SafeRationalActivation,
    SiLUSeriesActivation,
    TropicalActivation,
    TropicalRationalActivation,
)
from ortho_fx.activations.fit import Fit, fit
from ortho_fx.activations.freeze import FreezeReport, FrozenExpansion, freeze_
from ortho_fx.activations.gains import Gains, gains
from ortho_fx.activations.gated import GatedExpansion
from ortho_fx.activations.polynorm import PolyNormActivation
from ortho_fx.config import ExpansionConfig
from ortho_fx.doctor import CompileSupport, compile_support
from ortho_fx.errors import OrthoFxError
from ortho_fx.export import Export, export_onnx, export_program
from ortho_fx.passes.vocabulary.register import register_activation
from ortho_fx.passes.vocabulary.sites import Site
from ortho_fx.polynomial.conversion import Polynomial, to_polynomial
from ortho_fx.polynomial.costs import PolynomialReport, polynomial_report
from ortho_fx.recording import Recorder
from ortho_fx.register import register_basis
from ortho_fx.rewriting import loading
from ortho_fx.rewriting.anneal import Annealing
from ortho_fx.rewriting.calibration import Calibration, calibrate_
from ortho_fx.rewriting.check import Check
from ortho_fx.rewriting.like import rewrite_like_
from ortho_fx.rewriting.optimizer import param_groups
from ortho_fx.rewriting.rewrite import RevertReport, RewriteReport, find_sites, revert_, rewrite_
from ortho_fx.rewriting.save import ExpansionsFile, save_expansions
from ortho_fx.rewriting.sources import expansion_config
from ortho_fx.version import __version__

__all__ = [
    "Annealing",
    "Calibration",
    "ChebyshevActivation",
    "Check",
    "CompileSupport",
    "ExpansionActivation",
    "ExpansionConfig",
    "ExpansionsFile",
    "Export",
    "Fit",
    "FourierActivation",
    "FreezeReport",
    "FrozenExpansion",
    "GELUSeriesActivation",
    "Gains",
    "GatedExpansion",
    "HermiteActivation",
    "OrthoFxError",
    "PiecewisePowerActivation",
    "PolyNormActivation",
    "Polynomial",
    "PolynomialReport",
    "ReLUSquaredSeriesActivation",
    "Recorder",
    "RevertReport",
    "RewriteReport",
    "SafeRationalActivation",
    "SiLUSeriesActivation",
    "Site",
    "TropicalActivation",
    "TropicalRationalActivation",
    "__version__",
    "calibrate_",
    "compile_support",
    "expansion_config",
    "export_onnx",
    "export_program",
    "find_sites",
    "fit",
    "freeze_",
    "gains",
    "param_groups",
    "polynomial_report",
    "register_activation",
    "register_basis",
    "revert_",
    "rewrite_",
    "rewrite_like_",
    "save_expansions",
    "to_polynomial",
]

loading.explain()
