"""Tropical polynomials, y(x) = max_{k=0..n} (s_k x + b_k): convex and piecewise linear, with fixed slopes s_k.

The paper's form scale * max_k (k x + b_k) is the case s_k = scale * k, with the scale multiplied into the offsets.

A maximum of lines equals its leftmost line plus a bend at every knot, where another line becomes the largest:
y(x) = s x + b + sum of d_j max(x - t_j, 0). The knots t_j and bends d_j are computed once for all x. Each x then costs
one comparison per knot. A line that is nowhere the largest has no knot. At a knot itself the derivatives are those to
its left, and of equal lines the first counts.

The frozen form drops the lines that are nowhere the largest, or nowhere within the clamp.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ortho_fx.bases.basis import Basis
from ortho_fx.bases.folded import Folded
from ortho_fx.bases.formula import (
    Parameter,
    Term,
    TorchorthoState,
    Value,
    after,
    masked,
    multiply_add,
    renamed,
)
from ortho_fx.bases.knots import fit_knots, maximum_of
from ortho_fx.bases.piecewise import (
    lines_between_quantiles,
    maximum_or_line,
    maximum_pieces,
    moments_of,
    needed_lines,
)
from ortho_fx.bases.stable import stable
from ortho_fx.numerics.least_squares import Problem
from ortho_fx.numerics.moments import Array, Bounds, Moments, Values

# A slope and an offset.
Line = tuple[Value, Value]


def starts(slopes: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """The x from which each line is the largest, in ascending order, and the lines in this order.

    The first line starts at -inf. A line that is nowhere the largest starts at inf.
    """
    # The crossing of lines k and j, and which of the two is steeper, for all pairs [k, j].
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
    """max_k (s_k x + b_k) as a line and bends, [s, d_1, ..., d_n] and [b, t_1, ..., t_n], and the order of the lines.

    Unused knots are placed at inf, without a bend.
    """
    start, order = starts(slopes, offsets)
    ordered = slopes.gather(0, order)
    bend = torch.where(start[1:].isinf(), 0.0, ordered[1:] - ordered[:-1])
    # With a NaN among the offsets no line is the largest. The sum puts the NaN into the result.
    first = offsets.gather(0, order[:1]) + 0.0 * offsets.sum(0, keepdim=True)
    return torch.cat([ordered[:1], bend]), torch.cat([first, start[1:]]), order


def start_of(line: Line, number: Value, lines: Sequence[Line]) -> Value:
    """`starts` for one of the lines, without its order, on numbers of a kernel; `number` is the place of the line."""
    slope, offset = line
    start, end, hidden = (number.constant(value) for value in (-math.inf, math.inf, 0.0))
    for k, (other, above) in enumerate(lines):
        bend, drop = slope - other, above - offset
        parallel = bend.equals(0.0)
        crossing = drop / parallel.where(1.0, bend)
        start = start.maximum((bend > 0.0).where(crossing, -math.inf))
        end = end.minimum((bend < 0.0).where(crossing, math.inf))
        first = drop.equals(0.0).where((number > k).as_number(), (drop > 0.0).as_number())
        hidden = hidden.maximum(parallel.where(first, 0.0))
    return (start < end).where((hidden > 0.0).where(math.inf, start), math.inf)


def place_of(line: Line, start: Value, lines: Sequence[Line], starts: Sequence[Value]) -> Value:
    """How many lines come before one in the order of `bends`; -1 for a line that is nowhere the largest."""
    place = start.constant(0.0)
    for (slope, _), other in zip(lines, starts, strict=True):
        place = place + (other < math.inf).as_number() * (line[0] > slope).as_number()
    return (start < math.inf).where(place, -1.0)


def starts_and_places(lines: Sequence[Line]) -> tuple[list[Value], list[Value]]:
    """`start_of` and `place_of` for every line, with each pair of lines compared once."""
    constant = lines[0][0].constant
    starts, ends = [constant(-math.inf)] * len(lines), [constant(math.inf)] * len(lines)
    flatter = {}
    for k, (slope, offset) in enumerate(lines):
        for j, (other, above) in enumerate(lines[:k]):
            bend, drop = slope - other, above - offset
            # Of parallel lines the upper one counts, and of equal lines the first: j ends before it starts, or k begins
            # nowhere.
            parallel = (drop < 0.0).where(-math.inf, math.inf)
            crossing = bend.equals(0.0).where(parallel, drop / bend)
            flatter[k, j] = bend < 0.0
            # The steeper line begins where the other one ends.
            starts[k] = starts[k].maximum(flatter[k, j].where(-math.inf, crossing))
            ends[j] = ends[j].minimum(flatter[k, j].where(math.inf, crossing))
            starts[j] = starts[j].maximum(flatter[k, j].where(crossing, -math.inf))
            ends[k] = ends[k].minimum(flatter[k, j].where(crossing, math.inf))
    starts = [(start < end).where(start, math.inf) for start, end in zip(starts, ends, strict=True)]
    seen = [(start < math.inf).as_number() for start in starts]
    places = [constant(0.0)] * len(lines)
    for (k, j), is_flatter in flatter.items():
        places[k] = places[k] + is_flatter.where(0.0, seen[j])
        places[j] = places[j] + is_flatter.where(seen[k], 0.0)
    return starts, [(start < math.inf).where(place, -1.0) for start, place in zip(starts, places, strict=True)]


def bend_at(place: Value, lines: Sequence[Line], starts: Sequence[Value], places: Sequence[Value]) -> list[Value]:
    """Row `place` of each of the tensors that `bends` gives."""

    def row(wanted: Value, default: float, values: Iterable[Value | float]) -> Value:
        found = wanted.constant(default)
        for at, value in zip(places, values, strict=True):
            found = at.equals(wanted).where(value, found)
        return found

    slope, before = (row(wanted, 0.0, (slope for slope, _ in lines)) for wanted in (place, place - 1.0))
    start = row(place, math.inf, starts)
    first = row(place, 0.0, (offset for _, offset in lines))
    for _, offset in lines:
        first = first + offset * 0.0  # as in `bends`, for NaN
    number = row(place, -1.0, range(len(lines)))
    leads = place.equals(0.0)
    bend = (start < math.inf).where(slope - before, 0.0)
    return [leads.where(slope, bend), leads.where(first, start), number]


def shares(after_knots: Tensor, order: Tensor) -> Tensor:
    """Sums over the x where each line is the largest, from sums over all x and over the x to the right of each knot.

    `order` is the order of the lines from `bends`.
    """
    # In this order each line is the largest from its own knot to the next line's knot.
    ordered = after_knots - torch.cat([after_knots[1:], torch.zeros_like(after_knots[:1])])
    number = torch.arange(len(order), device=order.device).reshape(-1, *(1 for _ in order.shape))
    return torch.where(order == number, ordered, 0.0).sum(1)


class Bends:
    """A line with bends, evaluated at x: its value, slope and gradient terms."""

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
        """1 where x is to the right of a knot, for each knot."""
        return [after(self._x, self._offsets[k]) for k in range(1, len(self._offsets))]

    def slope(self) -> Value:
        slope = self._slopes[0]
        for k, right in enumerate(self._after, start=1):
            slope = multiply_add(self._slopes[k], right, slope)
        return slope

    def terms(self, grad: Value) -> list[Term]:
        """`grad` everywhere, and to the right of each knot."""
        return [lambda: grad, *(lambda k=k: masked(self._after[k], grad) for k in range(len(self._offsets) - 1))]


def torchortho_parameters(state: Mapping[str, Tensor], tied: bool = False) -> dict[str, Tensor]:
    """Converts TropicalActivation of degree n: y(x) = sqrt(2) / n * max_k (powers_k x + coefficients_k), from k = 0."""
    lines = renamed(state, {"powers": "slopes", "coefficients": "offsets"})
    if "offsets" not in lines:
        return lines
    dtype, scale = lines["offsets"].dtype, math.sqrt(2) / max(len(lines["offsets"]) - 1, 1)
    return {name: line.to(dtype) * scale for name, line in lines.items()}


class PiecewiseLinear(Basis):
    """The base class of the tropical bases: maxima of lines, with slopes and offsets as parameters."""

    closed_form = True
    reach = 8.0
    piecewise = True
    fits_in_units = True

    def affine(self, values: Values, scale: float, shift: float) -> dict[str, Array]:
        """The parameters of scale * f + shift: shifting all lines of a maximum shifts the maximum."""
        scaled = {name: scale * value for name, value in values.items()}
        scaled["offsets"] = scaled["offsets"] + shift
        return scaled

    def straightened(self, values: Values, share: float, slope: float) -> dict[str, Array]:
        """Exact: a line more is added to all lines of a maximum."""
        scaled = {name: share * value for name, value in values.items()}
        scaled["slopes"] = scaled["slopes"] + (1 - share) * slope
        return scaled

    def rescale(self, values: Values, mean: float, std: float) -> dict[str, Array]:
        """Exact: the lines are shifted."""
        moved = dict(values)
        for slopes, offsets in (("slopes", "offsets"), ("denominator_slopes", "denominator_offsets")):
            if offsets in values:
                moved[offsets] = std * values[offsets] - mean * values[slopes]
        return moved


class Tropical(PiecewiseLinear):
    colour = "#E69F00"
    maxima = ((0, 1),)
    torchortho = TorchorthoState(
        "TropicalActivation", "powers", torchortho_parameters, frozenset({"powers", "coefficients"})
    )

    def prepare(self, dtype: torch.dtype, *parameters: Tensor) -> tuple[Tensor, ...]:
        slopes, offsets = parameters
        return bends(slopes.to(dtype), offsets.to(dtype))

    def evaluate(self, x: Value, *parameters: Value) -> Value:
        return Bends(x, *parameters[:2]).value()

    def derivatives(self, grad: Value, x: Value, *parameters: Value) -> tuple[Term, list[Term]]:
        maximum = Bends(x, *parameters[:2])
        return lambda: grad * maximum.slope(), maximum.terms(grad)

    def collect_prepared(
        self, sums: Tensor, parameters: Sequence[Tensor], prepared: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        return (shares(sums, prepared[2]),)

    def moments(self, values: Values, bounds: Bounds | None = None) -> Moments:
        return moments_of(maximum_pieces(values["slopes"], values["offsets"]), bounds)

    def start(self, degree: int, bounds: Bounds | None = None, tied: bool = False) -> dict[str, Array]:
        """Equally spaced slopes, from 0.4 to 1 times the largest, and knots that divide N(0, 1) into equal masses."""
        # Flatter first slopes bend it more, and deep plain networks then lose their inputs sooner.
        slopes, offsets = lines_between_quantiles(degree, 0.4, 1.0, 0.0)
        return stable(self, {"slopes": slopes, "offsets": offsets}, bounds)

    def paper_start(self, degree: int, tied: bool = False) -> dict[str, Array]:
        return paper_lines(degree)

    def fit(self, problem: Problem, degree: int, tied: bool = False) -> dict[str, Array]:
        line, knots, turns = fit_knots(problem, degree, 0)
        slopes, offsets = maximum_of(line, knots, turns, degree)
        return {"slopes": slopes, "offsets": offsets}

    def fold(self, values: Values, interval: Bounds | None, dtype: torch.dtype) -> Folded:
        return maximum_or_line(*needed_lines(values["slopes"], values["offsets"], interval))


def paper_lines(degree: int) -> dict[str, Array]:
    """The paper's initial values: scale * max_k (k x + 1), with scale sqrt(2) / n."""
    scale = math.sqrt(2) / degree
    return {"slopes": scale * np.arange(degree + 1.0), "offsets": np.full(degree + 1, scale)}


TROPICAL = Tropical(
    name="tropical",
    title="Tropical",
    parameters=(Parameter("slopes", learnable=False, offset=1), Parameter("offsets", offset=1)),
    degrees=range(1, 65),
    default_degree=5,
)
