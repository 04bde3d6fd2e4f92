"""`Basis`: all code that depends on a basis, so that no other code has to check which basis it has.

A basis must define its formula: `evaluate`, the exact first derivatives, and how their sums become the gradients of its
parameters. All other methods have a numeric default for any formula, by quadrature and least squares. A basis overrides
them if it has a closed form: moments, initial values, the change of variable for calibration, the fit, the frozen form,
and the polynomial.

`ortho_fx.bases.formula` describes how formulas are written. Parameters are indexed, `coefficients[k]`, and have a
length. Their elements broadcast against the input, so one formula serves one expansion per layer and one per channel.
Arithmetic runs in one dtype, float32 or float64; the caller casts. Numbers outside of formulas (`Values`) are float64
arrays by parameter name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ortho_fx.bases import numeric
from ortho_fx.bases.deep import deep
from ortho_fx.bases.folded import Folded
from ortho_fx.bases.formula import Parameter, Term, Together, TorchorthoState, Value, after, masked, multiply_add
from ortho_fx.errors import OrthoFxError
from ortho_fx.numerics.least_squares import Problem
from ortho_fx.numerics.moments import Array, Bounds, Moments, Values

__all__ = ["Basis", "Parameter", "Term", "Value", "after", "masked", "multiply_add"]


@dataclass(frozen=True)
class Basis(ABC):
    """A family of functions y(x; parameters) of one real variable.

    A subclass defines `evaluate` for y, `derivatives` for its derivatives, and may override the other methods. Formulas
    get x and parameters that broadcast against it, all float32 or all float64.

    Attributes:
        name: the name in an `ExpansionConfig` and on the command line: an identifier in lower case.
        title: the name in class names and messages; the module class is `<title>Activation`.
        parameters: the parameters, in the order in which formulas take them.
        degrees: the possible degrees, a range with step 1.
        default_degree: the degree of an expansion without a given degree.

    Raises:
        OrthoFxError: `start` and `paper_start` without a result; `ortho_fx.register_basis` checks all else.

    Source: the four bases of ortho_fx are those of Khalfaoui-Hassani and Kesselheim, arXiv 2502.01247.
    """

    name: str
    title: str
    parameters: tuple[Parameter, ...]
    degrees: range
    default_degree: int

    # Whether `moments` and `rescale` are exact and fast (microseconds). If not, `gains` integrates numerically.
    closed_form: ClassVar[bool] = False
    # How many standard deviations of a Gaussian weight the nodes of a fit cover.
    reach: ClassVar[float] = 16.0
    # Whether the function has kinks. Fits then use denser nodes at high degrees, and finer nodes for their errors.
    piecewise: ClassVar[bool] = False
    # Whether fits use units of the weight's mean and deviation, and then rescale; `rescale` must be exact for this.
    fits_in_units: ClassVar[bool] = False
    # The colour in pictures, as "#rrggbb"; the default is a grey. `ortho_fx.plots` says how ours were chosen.
    colour: ClassVar[str] = "#808080"
    # The class of torchortho 0.1 whose saved state the basis reads.
    torchortho: ClassVar[TorchorthoState | None] = None

    @property
    def learnable(self) -> tuple[str, ...]:
        return tuple(parameter.name for parameter in self.parameters if parameter.learnable)

    @property
    def tieable(self) -> bool:
        """Whether the basis has a parameter that `tied` applies to."""
        return any(parameter.tieable for parameter in self.parameters)

    # The formula.

    def prepare(self, dtype: torch.dtype, *parameters: Tensor) -> tuple[Tensor, ...]:
        """The tensors that `evaluate` and `derivatives` get instead of the parameters, computed once for all x.

        There are as many tensors as parameters, with as many numbers in total, computed in this dtype. Further tensors
        may follow; only `collect_prepared` reads them. The default returns the parameters themselves.
        """
        return parameters

    # The maxima of lines that `prepare` turns into bends: each as the numbers of two parameters, slopes and offsets.
    # Compiled code prepares them in one kernel.
    maxima: ClassVar[tuple[tuple[int, int], ...]] = ()

    def prepare_for_kernels(self, dtype: torch.dtype, *parameters: Tensor) -> tuple[Tensor, ...]:
        """As `prepare`, for formulas in compiled code, whose x is no tensor. The default is `prepare`."""
        return self.prepare(dtype, *parameters)

    @abstractmethod
    def evaluate(self, x: Value, *parameters: Value) -> Value:
        """y(x), elementwise; parameters are those of `prepare`."""

    @abstractmethod
    def derivatives(self, grad: Value, x: Value, *parameters: Value) -> tuple[Term, list[Term]]:
        """The vector-Jacobian product before its sums: the gradient of x, and the terms for `collect`.

        Each result is a function that computes it, and shares intermediate results with those called before. There are
        as many terms as learnable numbers.
        """

    def collect(self, sums: Tensor, *parameters: Tensor) -> Sequence[Tensor]:
        """The gradient of each learnable parameter, in order, from the terms summed over each expansion's elements.

        `sums` has one term per row. Its other dimensions and its dtype are those of the parameters. By default the
        terms are the gradients themselves, parameter after parameter.
        """
        sizes = [len(p) for p, described in zip(parameters, self.parameters, strict=True) if described.learnable]
        return sums.split(sizes)

    def collect_prepared(
        self, sums: Tensor, parameters: Sequence[Tensor], prepared: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """As `collect`, for a basis that also needs the result of `prepare`, `prepared`."""
        return self.collect(sums, *parameters)

    def slope(self, *parameters: Tensor) -> tuple[Tensor, ...]:
        """The parameters of dy/dx as an expansion of the same basis.

        Forward mode computes dy/dx with the operator if a basis defines this. That is quicker than the derivative of
        the formula. Parameters have the shape (size, ...), and the result is differentiable with respect to them. It
        may have fewer numbers, but at least those of degree 1.

        Raises:
            OrthoFxError: dy/dx is no expansion of the basis.
        """
        raise OrthoFxError(f"the derivative of {self.name} is not of the same basis")

    @property
    def has_slope(self) -> bool:
        return type(self).slope is not Basis.slope

    def together(self, x: Tensor, *parameters: Tensor) -> Together | None:
        """The formula with all terms in one tensor; None if the basis has no such form.

        It takes fewer operations than `evaluate` and `derivatives`, and more memory. Derivatives of higher order
        differentiate it. Parameters are those of `prepare`, of a shape (size, ...) that broadcasts against x.
        """
        return None

    # The start.

    def moments(self, values: Values, bounds: Bounds | None = None) -> Moments:
        """The moments of y(X) for X ~ N(0, 1), with X clamped to `bounds` if given."""
        return numeric.moments(self, values, bounds)

    def start(self, degree: int, bounds: Bounds | None = None, tied: bool = False) -> dict[str, Array]:
        """The initial values of init "stable": forward and backward gain 1 for X ~ N(0, 1), clamped to `bounds`.

        Raises:
            OrthoFxError: the numeric default finds none.
        """
        return numeric.start(self, degree, bounds, tied)

    def deep_start(self, degree: int, depth: int, bounds: Bounds | None = None, tied: bool = False) -> dict[str, Array]:
        """The initial values of init "depth:L" for L layers: those of "stable", bent less where L is large.

        Raises:
            OrthoFxError: no expansion of the basis, clamped to `bounds`, is close enough to a line for that depth.
        """
        return deep(self, degree, depth, bounds, tied)

    def paper_start(self, degree: int, tied: bool = False) -> dict[str, Array]:
        """The initial values of init "paper".

        Raises:
            OrthoFxError: the basis is not in the paper.
        """
        raise OrthoFxError(f"{self.name} has no start of init 'paper'")

    @property
    def has_paper_start(self) -> bool:
        return type(self).paper_start is not Basis.paper_start

    def affine(self, values: Values, scale: float, shift: float) -> dict[str, Array]:
        """The parameters of scale * y + shift, from the parameters of y, for inputs N(0, 1).

        The default refits by least squares. It is exact if the basis can express that function.
        """
        return numeric.affine(self, values, scale, shift)

    def straightened(self, values: Values, share: float, slope: float) -> dict[str, Array]:
        """The parameters of share * y + (1 - share) * slope * x, or of y(share x) / share, for inputs N(0, 1).

        Both are closer to a line than y. The default is the sum, by least squares. It is exact if the basis can express
        that function.
        """
        return numeric.straightened(self, values, share, slope)

    def rescale(self, values: Values, mean: float, std: float) -> dict[str, Array]:
        """The parameters of std * y((x - mean) / std), from the parameters of y.

        The default refits by least squares and keeps the gains. It is exact if the basis can express that function.
        """
        return numeric.rescaled(self, values, mean, std)

    # The fit.

    def fit(self, problem: Problem, degree: int, tied: bool = False) -> dict[str, Array]:
        """The parameters with the smallest weighted error to a function at nodes; deterministic.

        The default is linear least squares if the formula is linear in all parameters, and otherwise
        Levenberg-Marquardt steps from several starts.
        """
        return numeric.fitted(self, problem, degree, tied)

    # Other forms of the same function.

    def fold(self, values: Values, interval: Bounds | None, dtype: torch.dtype) -> Folded | None:
        """The cheapest form of the same function, for `freeze_`; None keeps the formula, with constant parameters.

        Args:
            values: the parameters, each of shape (size, groups).
            interval: the interval to which inputs are clamped; None without a clamp.
            dtype: the dtype of the stored constants.
        """
        return None

    def series(self, values: Values) -> Any | None:
        """The function as a series of `numpy.polynomial` on its default domain; None if it is no polynomial."""
        return None

    @property
    def is_polynomial(self) -> bool:
        return type(self).series is not Basis.series

    # Training.

    def remedies(self, clamp: float | None) -> tuple[str, ...]:
        """Settings to try first if training with this clamp diverges."""
        return ()
