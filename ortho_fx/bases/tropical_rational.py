"""Tropical rationals, y(x) = max_k (s_k x + b_k) - max_k (t_k x + c_k), k = 0..n, whose slopes and offsets all learn.

A difference of two convex functions: every continuous piecewise linear function with enough pieces is one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ortho_fx.bases.basis import Basis, Parameter, Term, Value
from ortho_fx.bases.tropical import Bends, bends, shares


class TropicalRational(Basis):
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

    def collect(self, sums: Tensor, parameters: Sequence[Tensor], prepared: Sequence[Tensor]) -> Sequence[Tensor]:
        # [k, above or below, of slopes or offsets, ...], and what is below counts negative.
        after_knots = sums.unflatten(0, (2, 2, -1)).movedim(2, 0)
        sign = (1 - 2 * torch.arange(2, device=sums.device)).reshape(2, *(1 for _ in sums.shape))
        gradients = shares(after_knots, prepared[4].unsqueeze(2)) * sign
        return gradients[:, 0, 0], gradients[:, 0, 1], gradients[:, 1, 0], gradients[:, 1, 1]


def _pairs(dtype: torch.dtype, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Slopes and offsets, each with those above beside those below."""
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
