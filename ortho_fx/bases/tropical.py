"""Tropical polynomials, y(x) = max_{k=0..n} (s_k x + b_k): convex and piecewise linear, with fixed slopes s_k.

The paper's form scale * max_k (k x + b_k) is the case s_k = scale * k, with the scale multiplied into the offsets.
Where several pieces tie, they share the gradient equally, as in `torch.amax`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ortho_fx.bases.basis import Basis, Parameter, Reduce


def maximum(x: Tensor, slopes: Tensor, offsets: Tensor) -> Tensor:
    """max_k (s_k x + b_k), elementwise."""
    y = slopes[0] * x + offsets[0]
    for k in range(1, offsets.shape[0]):
        y = torch.maximum(y, slopes[k] * x + offsets[k])
    return y


def piece_shares(x: Tensor, slopes: Tensor, offsets: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The derivative in `x`, and the share of each piece: 1 where it alone is the maximum, 1/m where m pieces tie.

    The number of ties is counted along the running maximum, so it is at least 1 whatever rounding does: a
    fused multiply-add in one place and not in another costs at most one piece's share and never divides by zero.
    """
    values = [slopes[k] * x + offsets[k] for k in range(offsets.shape[0])]
    top, ties = values[0], torch.ones_like(x)
    slope = slopes[0].expand_as(x)
    for k in range(1, len(values)):
        above, level = values[k] > top, values[k] == top
        slope = torch.where(above, slopes[k], torch.where(level, slope + slopes[k], slope))
        ties = torch.where(above, 1.0, torch.where(level, ties + 1.0, ties))
        top = torch.maximum(top, values[k])
    share = 1.0 / ties
    return slope * share, [torch.where(value == top, share, 0.0) for value in values]


class Tropical(Basis):
    def evaluate(self, x: Tensor, *parameters: Tensor) -> Tensor:
        slopes, offsets = parameters
        return maximum(x, slopes, offsets)

    def gradients(self, grad: Tensor, x: Tensor, reduce: Reduce, *parameters: Tensor) -> Sequence[Tensor]:
        slopes, offsets = parameters
        slope, shares = piece_shares(x, slopes, offsets)
        grad_x = grad * slope
        return grad_x, torch.stack([reduce(grad * share) for share in shares])


TROPICAL = Tropical(
    name="tropical",
    title="Tropical",
    parameters=(Parameter("slopes", learnable=False, offset=1), Parameter("offsets", offset=1)),
    degrees=range(1, 65),
    default_degree=5,
)
