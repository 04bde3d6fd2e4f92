"""Tropical rationals, y(x) = max_k (s_k x + b_k) - max_k (t_k x + c_k), k = 0..n, whose slopes and offsets all learn.

A difference of two convex functions: every continuous piecewise linear function with enough pieces is one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ortho_fx.bases.basis import Basis, Parameter, Reduce
from ortho_fx.bases.tropical import maximum, piece_shares


class TropicalRational(Basis):
    def evaluate(self, x: Tensor, *parameters: Tensor) -> Tensor:
        slopes, offsets, denominator_slopes, denominator_offsets = parameters
        return maximum(x, slopes, offsets) - maximum(x, denominator_slopes, denominator_offsets)

    def gradients(self, grad: Tensor, x: Tensor, reduce: Reduce, *parameters: Tensor) -> Sequence[Tensor]:
        slopes, offsets, denominator_slopes, denominator_offsets = parameters
        up, shares = piece_shares(x, slopes, offsets)
        down, denominator_shares = piece_shares(x, denominator_slopes, denominator_offsets)
        grad_x = grad * (up - down)
        negated = -grad
        return (
            grad_x,
            torch.stack([reduce(grad * share * x) for share in shares]),
            torch.stack([reduce(grad * share) for share in shares]),
            torch.stack([reduce(negated * share * x) for share in denominator_shares]),
            torch.stack([reduce(negated * share) for share in denominator_shares]),
        )


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
