"""Activations that are none: a ReLU that keeps a number positive or makes a loss, gates by hand, rescaled functions.

`relu(x).sqrt()`, `elu(x) + 1` and `relu(w) + eps` need a result that is never negative, and an expansion has any sign.
`relu(1 - score).mean()` is a hinge loss, and a loss that learns can make itself small. `relu6(y + 3)` is a gate.
`silu(x) / 0.596` was measured for one function and would be wrong for another. All are found by what goes in and what
becomes of the result. A front end tells that in the terms of `Use`, whether it reads source or a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ortho_fx.passes.vocabulary.targets import BY_NAME

# Functions that are nowhere below their value at -inf, which somebody may count on.
POSITIVE = frozenset({"relu", "relu6", "relu_squared", "elu", "celu"})
_ROOTS = frozenset({"sqrt", "rsqrt"})
_LOGARITHMS = frozenset({"log", "log2", "log10", "log1p"})
_DIVISIONS = frozenset({"truediv", "div", "divide", "true_divide", "floordiv", "floor_divide"})
_PRODUCTS = frozenset({"mul", "multiply"})
_POWERS = frozenset({"pow", "float_power"})
_REDUCTIONS = frozenset({"sum", "mean"})
_RUNNING = frozenset({"cumsum", "cumprod", "logcumsumexp"})
# What they give out has the sign of what they take in.
_KEEP_SIGN = frozenset(
    {
        *("view", "reshape", "flatten", "unflatten", "transpose", "permute", "movedim", "squeeze", "unsqueeze", "t"),
        *("expand", "expand_as", "repeat", "tril", "triu", "contiguous", "getitem", "clone", "detach", "float"),
        *("double", "to", "type_as", "sum", "mean", "amax", "alias", "clamp", "clamp_min", "clip"),
    }
)
_DEEPEST = 5
_STAYS = "and it stays unless it is named as a target"


@dataclass(frozen=True)
class Use:
    """One operation that takes the result of an activation, or what became of it.

    Attributes:
        operation: its name, without module and overload.
        operand: which of its arguments it is.
        other: the number that the other operand of two is; None where it is no constant.
        further: what takes the operation's own result.
        alone: whether it takes nothing else.
    """

    operation: str
    operand: int
    other: float | None
    further: Callable[[], Iterable[Use]]
    alone: bool = False


def guard_of(function: str, uses: Iterable[Use], *, of_parameter: bool = False, of_margin: bool = False) -> str:
    """Why an activation function, by its name in the table, is taken for no activation there; empty where it is one.

    Args:
        function: its name.
        uses: what takes its result.
        of_parameter: whether its input is made of parameters alone.
        of_margin: whether its input is a sum or a difference with a constant in it.
    """
    if function not in BY_NAME or BY_NAME[function].gate:
        return ""
    known = list(uses)
    if function in POSITIVE:
        need = "a parameter" if of_parameter else _needs_positive(known, _DEEPEST)
        if need:
            return f"it keeps {need} positive, {_STAYS}"
        if of_margin and _is_one_number(known, _DEEPEST):
            return f"it is a hinge loss, {_STAYS}"
    # A constant around the function, not one in the next formula that takes its result.
    if len(known) == 1 and _rescales(known[0]):
        return f"its result is rescaled by a constant, {_STAYS}"
    # x * relu6(y + 3) / 6 multiplies x by a hard sigmoid of y.
    if function == "relu6" and of_margin:
        return f"it is a hard sigmoid, {_STAYS}"
    return ""


def _rescales(use: Use) -> bool:
    by = use.operation in _PRODUCTS or (use.operation in _DIVISIONS and use.operand == 0)
    return by and use.other is not None and use.other not in (0, 1)


def _needs_positive(uses: Sequence[Use], depth: int) -> str:
    for use in uses:
        need = _need(use, alone=len(uses) == 1)
        if not need and depth and (use.operation in _KEEP_SIGN or _rescales(use)):
            need = _needs_positive(list(use.further()), depth - 1)
        if need:
            return need
    return ""


def _is_one_number(uses: Sequence[Use], depth: int) -> bool:
    """Whether a sum or a mean over everything is made of the values or their squares, weighted or not."""
    for use in uses:
        name = use.operation
        if name in _REDUCTIONS and use.alone:
            return True
        passes = name in _KEEP_SIGN or name == "square" or name in _POWERS or name in _DIVISIONS
        passes = name in _PRODUCTS or (passes and use.operand == 0)
        if passes and depth and _is_one_number(list(use.further()), depth - 1):
            return True
    return False


def _need(use: Use, *, alone: bool) -> str:
    name, first = use.operation, use.operand == 0
    if name in _ROOTS:
        return "what is under a root"
    if name in _LOGARITHMS:
        return "what is under a logarithm"
    if name == "add" and alone and use.other is not None and use.other > 0:
        return "what a positive constant is added to"
    if name == "reciprocal" or (name in _DIVISIONS and not first):
        return "a divisor"
    if name in _POWERS and first and (use.other is None or use.other < 0 or not float(use.other).is_integer()):
        return "the base of a power"
    return "a cumulative sum" if name in _RUNNING and first else ""


def number(value: Any) -> float | None:
    """A constant operand as `Use` has it."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
