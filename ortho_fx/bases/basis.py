"""`Basis`: everything that depends on a basis, so that nothing outside of it asks for its name.

A basis has to give its formula: `evaluate`, the exact first derivatives, and how their sums become the gradients of its
parameters. All else has a numeric default that works for any formula, by quadrature and least squares, and is there to
be overridden where a closed form is known: moments, the starts, the change of variable that calibration needs, the fit,
the form that `freeze_` folds it into, and its polynomial.

Formulas are written as `ortho_fx.bases.formula` says. Parameters are indexed, `coefficients[k]`, and have a length;
whatever they hold broadcasts against the input, so the formula is the same for one expansion a layer and one a channel.
Arithmetic runs in one dtype, float32 or float64: whoever calls casts. Numbers outside of formulas (`Values`) are
float64 arrays by the names of the parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ortho_fx.bases import numeric
from ortho_fx.bases.folded import Folded
from ortho_fx.bases.formula import Parameter, Term, TorchorthoState, Value, after, masked, multiply_add
from ortho_fx.errors import OrthoFxError
from ortho_fx.numerics.least_squares import Problem
from ortho_fx.numerics.moments import Array, Bounds, Moments, Values

__all__ = ["Basis", "Parameter", "Term", "Value", "after", "masked", "multiply_add"]


@dataclass(frozen=True)
class Basis(ABC):
    """A family of functions y(x; parameters) of one real variable.

    Attributes:
        name: what an `ExpansionConfig` and the command line call it: an identifier in lower case.
        title: the same in the names of classes and in messages; `<title>Activation` is its module.
        parameters: its parameters, in the order in which formulas take them.
        degrees: the degrees that it has.
        default_degree: the degree of an expansion that names none.
    """

    name: str
    title: str
    parameters: tuple[Parameter, ...]
    degrees: range
    default_degree: int

    # Whether `moments` and `rescale` are exact and take microseconds. Where they do not, `gains` integrates.
    closed_form: ClassVar[bool] = False
    # How many standard deviations of a Gaussian weight the nodes of a fit cover, and whether they are twice as dense
    # at high degrees, and errors stated on finer ones, because the function has kinks.
    reach: ClassVar[float] = 16.0
    piecewise: ClassVar[bool] = False
    # Whether it is fitted in units of the weight's mean and deviation, and rescaled, which has to be exact then.
    fits_in_units: ClassVar[bool] = False
    # The class of torchortho 0.1 whose saved state it reads.
    torchortho: ClassVar[TorchorthoState | None] = None

    @property
    def learnable(self) -> tuple[str, ...]:
        return tuple(parameter.name for parameter in self.parameters if parameter.learnable)

    @property
    def tieable(self) -> bool:
        """Whether `tied` means something for it."""
        return any(parameter.tieable for parameter in self.parameters)

    # The formula.

    def prepare(self, dtype: torch.dtype, *parameters: Tensor) -> tuple[Tensor, ...]:
        """What `evaluate` and `derivatives` take in the place of the parameters: what is computed once for all x.

        As many tensors as there are parameters, with as many numbers in all, computed in this dtype; the parameters
        themselves, unless a basis says otherwise. What follows them is for `collect_prepared` alone.
        """
        return parameters

    @abstractmethod
    def evaluate(self, x: Value, *parameters: Value) -> Value:
        """y(x)."""

    @abstractmethod
    def derivatives(self, grad: Value, x: Value, *parameters: Value) -> tuple[Term, list[Term]]:
        """The vector-Jacobian product before it is summed up: the gradient of x, and the terms of `collect`.

        Each is computed when it is called for, and shares what it can with those called before. There are as many terms
        as learnable numbers.
        """

    def collect(self, sums: Tensor, *parameters: Tensor) -> Sequence[Tensor]:
        """The gradient of each learnable parameter, in order, from the terms summed over all that share an expansion.

        `sums` holds a term a row; its other dimensions are those of the parameters, which are in its dtype. Unless a
        basis says otherwise, the terms are the gradients themselves, parameter after parameter.
        """
        sizes = [len(p) for p, described in zip(parameters, self.parameters, strict=True) if described.learnable]
        return sums.split(sizes)

    def collect_prepared(
        self, sums: Tensor, parameters: Sequence[Tensor], prepared: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """The same for a basis whose `prepare` computes what this needs: `prepared` is what it returned."""
        return self.collect(sums, *parameters)

    # The start.

    def moments(self, values: Values, bounds: Bounds | None = None) -> Moments:
        """The moments of y(X) for X ~ N(0, 1), its input clamped to `bounds` if there are any."""
        return numeric.moments(self, values, bounds)

    def start(self, degree: int, bounds: Bounds | None = None, tied: bool = False) -> dict[str, Array]:
        """The "stable" start: forward and backward gain 1 for X ~ N(0, 1), clamped to `bounds` if there are any.

        Raises:
            OrthoFxError: the default finds none.
        """
        return numeric.start(self, degree, bounds, tied)

    def paper_start(self, degree: int, tied: bool = False) -> dict[str, Array]:
        """The "paper" start, for bases that the paper has."""
        raise OrthoFxError(f"{self.name} has no start of init 'paper'")

    @property
    def has_paper_start(self) -> bool:
        return type(self).paper_start is not Basis.paper_start

    def rescale(self, values: Values, mean: float, std: float) -> dict[str, Array]:
        """The parameters of std * y((x - mean) / std), for those of y.

        The default refits by least squares, and keeps the gains: exact for a basis that is closed under this.
        """
        return numeric.rescaled(self, values, mean, std)

    # The fit.

    def fit(self, problem: Problem, degree: int, tied: bool = False) -> dict[str, Array]:
        """The parameters that are closest to a function at weighted nodes, deterministic.

        The default is linear least squares where the formula is linear in all parameters, and else Levenberg's and
        Marquardt's steps from several starts.
        """
        return numeric.fitted(self, problem, degree, tied)

    # What it becomes.

    def fold(self, values: Values, interval: Bounds | None, dtype: torch.dtype) -> Folded | None:
        """The cheapest form that equals it, for `freeze_`; None keeps the formula, with constant parameters.

        Args:
            values: the parameters, each of shape (size, groups).
            interval: where inputs are clamped to.
            dtype: what the constants will be stored in.
        """
        return None

    def series(self, values: Values) -> Any | None:
        """The polynomial that it is, as a series of `numpy.polynomial` on its default domain; None where it is none."""
        return None

    @property
    def is_polynomial(self) -> bool:
        return type(self).series is not Basis.series

    # Training.

    def remedies(self, clamp: float | None) -> tuple[str, ...]:
        """Settings to try first where a run with this clamp diverges."""
        return ()
