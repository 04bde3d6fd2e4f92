"""Tropical polynomials, y(x) = max_{k=0..n} (s_k x + b_k): convex and piecewise linear, with fixed slopes s_k.

The paper's form scale * max_k (k x + b_k) is the case s_k = scale * k, with the scale multiplied into the offsets.

A maximum of lines is the line that is the largest at the far left, and a bend at every knot where another takes over:
y(x) = s x + b + sum of d_j max(x - t_j, 0). The knots t_j and bends d_j are computed once for all x; every x then costs
a comparison a knot, not the lines. A line that is the largest nowhere has no knot. At a knot itself the derivatives are
those to its left, and of equal lines the first counts.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ortho_fx.bases.basis import Basis, Parameter, Term, Value, after, masked, multiply_add


def starts(slopes: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Where each line begins to be the largest, in ascending order, and the lines in this order.

    The first begins at -inf; a line that is the largest nowhere at inf.
    """
    # Where line k crosses line j, and which of the two is steeper, for all pairs [k, j].
    bend = slopes.unsqueeze(1) - slopes.unsqueeze(0)
    drop = offsets.unsqueeze(0) - offsets.unsqueeze(1)
    crossing = drop / torch.where(bend == 0, 1.0, bend)
    start = torch.where(bend > 0, crossing, -torch.inf).amax(1)
    end = torch.where(bend < 0, crossing, torch.inf).amin(1)
    number = torch.arange(len(slopes), device=slopes.device).reshape(-1, *(1 for _ in slopes.shape))
    earlier = number.squeeze(1).unsqueeze(0) < number
    hidden = ((bend == 0) & ((drop > 0) | ((drop == 0) & earlier))).any(1)
    return torch.where((start < end) & ~hidden, start, torch.inf).sort(0)


def bends(slopes: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """max_k (s_k x + b_k) as a line and bends: [s, d_1, ..., d_n] and [b, t_1, ..., t_n]; and the order of the lines.

    Knots that there are fewer of lie at inf, without a bend.
    """
    start, order = starts(slopes, offsets)
    ordered = slopes.gather(0, order)
    bend = torch.where(start[1:].isinf(), 0.0, ordered[1:] - ordered[:-1])
    # A NaN among the offsets leaves no line the largest: it has to show in the result.
    first = offsets.gather(0, order[:1]) + 0.0 * offsets.sum(0, keepdim=True)
    return torch.cat([ordered[:1], bend]), torch.cat([first, start[1:]]), order


def shares(after_knots: Tensor, order: Tensor) -> Tensor:
    """Sums over where each line is the largest, from those over all x and those to the right of each knot.

    `order` is what `bends` says it is.
    """
    # Of the lines in ascending order, each is the largest from its own knot to that of the next.
    ordered = after_knots - torch.cat([after_knots[1:], torch.zeros_like(after_knots[:1])])
    number = torch.arange(len(order), device=order.device).reshape(-1, *(1 for _ in order.shape))
    return torch.where(order == number, ordered, 0.0).sum(1)


class Bends:
    """A line and bends at x: the value, and what it makes of derivatives."""

    def __init__(self, x: Value, slopes: Value, offsets: Value) -> None:
        self._x, self._slopes, self._offsets = x, slopes, offsets

    def value(self) -> Value:
        x, slopes, offsets = self._x, self._slopes, self._offsets
        y = multiply_add(slopes[0], x, offsets[0])
        for k in range(1, len(offsets)):
            y = multiply_add(slopes[k], (x - offsets[k]).relu(), y)
        return y

    @functools.cached_property
    def _after(self) -> list[Value]:
        """Whether x lies to the right of each knot."""
        return [after(self._x, self._offsets[k]) for k in range(1, len(self._offsets))]

    def slope(self) -> Value:
        slope = self._slopes[0]
        for k, right in enumerate(self._after, start=1):
            slope = slope + masked(right, self._slopes[k])
        return slope

    def terms(self, grad: Value) -> list[Term]:
        """`grad` everywhere, and to the right of each knot."""
        return [lambda: grad, *(lambda k=k: masked(self._after[k], grad) for k in range(len(self._offsets) - 1))]


class Tropical(Basis):
    def prepare(self, dtype: torch.dtype, *parameters: Tensor) -> tuple[Tensor, ...]:
        slopes, offsets = parameters
        return bends(slopes.to(dtype), offsets.to(dtype))

    def evaluate(self, x: Value, *parameters: Value) -> Value:
        return Bends(x, *parameters[:2]).value()

    def derivatives(self, grad: Value, x: Value, *parameters: Value) -> tuple[Term, list[Term]]:
        maximum = Bends(x, *parameters[:2])
        return lambda: grad * maximum.slope(), maximum.terms(grad)

    def collect(self, sums: Tensor, parameters: Sequence[Tensor], prepared: Sequence[Tensor]) -> Sequence[Tensor]:
        return (shares(sums, prepared[2]),)


TROPICAL = Tropical(
    name="tropical",
    title="Tropical",
    parameters=(Parameter("slopes", learnable=False, offset=1), Parameter("offsets", offset=1)),
    degrees=range(1, 65),
    default_degree=5,
)
