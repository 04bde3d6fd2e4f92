"""Tropical rationals, y(x) = max_k (s_k x + b_k) - max_k (t_k x + c_k), k = 0..n, with learnable slopes and offsets.

Every continuous piecewise linear function is such a difference of two convex functions, at a sufficient degree.

In the frozen form each maximum keeps the lines that it needs. A denominator of one line is subtracted from the lines of
the numerator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ortho_fx.bases.folded import Folded
from ortho_fx.bases.formula import Parameter, Term, TorchorthoState, Value, renamed
from ortho_fx.bases.knots import fit_knots, maximum_of
from ortho_fx.bases.piecewise import (
    less,
    lines_between_quantiles,
    maximum_or_line,
    maximum_pieces,
    moments_of,
    needed_lines,
)
from ortho_fx.bases.stable import stable
from ortho_fx.bases.tropical import Bends, PiecewiseLinear, bends, paper_lines, shares
from ortho_fx.numerics.least_squares import Problem
from ortho_fx.numerics.moments import Array, Bounds, Moments, Values


def torchortho_parameters(state: Mapping[str, Tensor], tied: bool = False) -> dict[str, Tensor]:
    """Converts TropicalRationalActivation.

    y(x) = max_k (powers_num_k x + coefficients_num_k) - max_k (powers_denom_k x + coefficients_denom_k), from k = 0.
    """
    return renamed(
        state,
        {
            "powers_num": "slopes",
            "coefficients_num": "offsets",
            "powers_denom": "denominator_slopes",
            "coefficients_denom": "denominator_offsets",
        },
    )


class TropicalRational(PiecewiseLinear):
    colour = "#D55E00"
    maxima = ((0, 1), (2, 3))
    torchortho = TorchorthoState(
        "TropicalRationalActivation",
        "powers_num",
        torchortho_parameters,
        frozenset({"powers_num", "coefficients_num", "powers_denom", "coefficients_denom", "act_init"}),
    )

    def prepare(self, dtype: torch.dtype, *parameters: Tensor) -> tuple[Tensor, ...]:
        slopes, offsets, order = bends(*_pairs(dtype, parameters))
        return slopes[:, 0], offsets[:, 0], slopes[:, 1], offsets[:, 1], order

    def evaluate(self, x: Value, *parameters: Value) -> Value:
        return Bends(x, *parameters[:2]).value() - Bends(x, *parameters[2:4]).value()

    def derivatives(self, grad: Value, x: Value, *parameters: Value) -> tuple[Term, list[Term]]:
        above, below = Bends(x, *parameters[:2]), Bends(x, *parameters[2:4])
        moment = grad * x
        terms = [term for part in (above, below) for factor in (moment, grad) for term in part.terms(factor)]
        return lambda: grad * (above.slope() - below.slope()), terms

    def collect_prepared(
        self, sums: Tensor, parameters: Sequence[Tensor], prepared: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        # Dimensions [k, numerator or denominator, slopes or offsets, ...]; the denominator has a negative sign.
        after_knots = sums.unflatten(0, (2, 2, -1)).movedim(2, 0)
        sign = (1 - 2 * torch.arange(2, device=sums.device)).reshape(2, *(1 for _ in sums.shape))
        gradients = shares(after_knots, prepared[4].unsqueeze(2)) * sign
        return gradients[:, 0, 0], gradients[:, 0, 1], gradients[:, 1, 0], gradients[:, 1, 1]

    def moments(self, values: Values, bounds: Bounds | None = None) -> Moments:
        up = maximum_pieces(values["slopes"], values["offsets"])
        down = maximum_pieces(values["denominator_slopes"], values["denominator_offsets"])
        return moments_of(less(up, down), bounds)

    def start(self, degree: int, bounds: Bounds | None = None, tied: bool = False) -> dict[str, Array]:
        """The tropical start with slopes from 0.25 times the largest, over a denominator that is half as steep."""
        # The denominator's knots are between the numerator's, so that no two pieces have the same gradient.
        slopes, offsets = lines_between_quantiles(degree, 0.25, 1.0, 0.0)
        denominator_slopes, denominator_offsets = lines_between_quantiles(degree, 0.125, 0.5, -0.5)
        values = {
            "slopes": slopes,
            "offsets": offsets,
            "denominator_slopes": denominator_slopes,
            "denominator_offsets": denominator_offsets,
        }
        return stable(self, values, bounds)

    def paper_start(self, degree: int, tied: bool = False) -> dict[str, Array]:
        """The paper's tropical values, over a denominator of zeros: the paper starts its rationals only from fits."""
        zeros = np.zeros(degree + 1)
        return {**paper_lines(degree), "denominator_slopes": zeros, "denominator_offsets": zeros.copy()}

    def fit(self, problem: Problem, degree: int, tied: bool = False) -> dict[str, Array]:
        """Knots with a positive change of slope belong to the numerator, the others to the denominator."""
        line, knots, turns = fit_knots(problem, degree, degree)
        up = turns > 0
        slopes, offsets = maximum_of(line, knots[up], turns[up], degree)
        denominator_slopes, denominator_offsets = maximum_of(np.zeros(2), knots[~up], -turns[~up], degree)
        return {
            "slopes": slopes,
            "offsets": offsets,
            "denominator_slopes": denominator_slopes,
            "denominator_offsets": denominator_offsets,
        }

    def fold(self, values: Values, interval: Bounds | None, dtype: torch.dtype) -> Folded:
        slopes, offsets = needed_lines(values["slopes"], values["offsets"], interval)
        down, below = needed_lines(values["denominator_slopes"], values["denominator_offsets"], interval)
        if len(down) == 1:
            return maximum_or_line(slopes - down, offsets - below)
        constants = {"slopes": slopes, "offsets": offsets, "denominator_slopes": down, "denominator_offsets": below}
        return "difference", constants


def _pairs(dtype: torch.dtype, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Slopes and offsets, each of numerator and denominator stacked in dimension 1."""
    slopes, offsets, denominator_slopes, denominator_offsets = (parameter.to(dtype) for parameter in parameters)
    return torch.stack([slopes, denominator_slopes], 1), torch.stack([offsets, denominator_offsets], 1)


TROPICAL_RATIONAL = TropicalRational(
    name="tropical_rational",
    title="TropicalRational",
    parameters=(
        Parameter("slopes", offset=1),
        Parameter("offsets", offset=1),
        Parameter("denominator_slopes", offset=1),
        Parameter("denominator_offsets", offset=1),
    ),
    degrees=range(1, 65),
    default_degree=6,
)
