"""`Formula`: an expression in one tensor `x`, and which function of the table it computes."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ortho_fx.passes.vocabulary.recognise import evaluated, match
from ortho_fx.passes.vocabulary.targets import Reference, cached, self_gated


@dataclass(frozen=True)
class Formula:
    """A function of one tensor: `argument` is the tensor's expression, `text` is the function written in `x`."""

    argument: ast.expr
    text: str
    repeated: bool

    def reference(self) -> Reference | None:
        """The table's function that the formula equals; None if there is none.

        Also None if the formula repeats an argument that cannot be computed once instead (see `_repeatable`).
        """
        return None if self.repeated and not _repeatable(self.argument) else _match(self.text)

    def gated(self) -> Reference | None:
        """The formula as a reference, if it is a product of x, or of a bounded x, with a gate of x; else None."""
        return _gated(self.text) if self.repeated and _repeatable(self.argument) else None


def _repeatable(node: ast.expr) -> bool:
    """Whether an expression that is written twice can be computed once: a name, or attributes and items of one."""
    return all(
        isinstance(part, ast.Name | ast.Attribute | ast.Subscript | ast.Slice | ast.Constant | ast.Tuple | ast.UnaryOp)
        or isinstance(part, ast.expr_context | ast.unaryop)
        for part in ast.walk(node)
    )


@cached(maxsize=4096)
def _match(text: str) -> Reference | None:
    return match(functools.partial(self_gated, formula=text))


@cached(maxsize=4096)
def _gated(text: str) -> Reference | None:
    if sum(_mentions_x(factor) for factor in _factors(ast.parse(text, mode="eval").body)) < 2:
        return None
    x = torch.tensor([-64.0, -32.0, 0.0, 32.0, 64.0], dtype=torch.float64)
    y = evaluated(functools.partial(self_gated, formula=text), x)
    if y is None or y[2].abs() > 1e-6 or y.abs().max() > 4 * 64**2:
        return None
    straight = (y[4] - 2 * y[3]).abs() < 1e-6 and (y[4] + y[0]).abs() < 1e-6
    return None if straight else Reference("self_gated", (("formula", text),))


def _factors(node: ast.expr) -> Iterator[ast.expr]:
    """The factors of a product, divisors included; the expression itself if it is no product."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult | ast.Div):
        yield from (*_factors(node.left), *_factors(node.right))
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("mul", "multiply"):
        method = not (isinstance(node.func.value, ast.Name) and node.func.value.id == "torch")
        for part in (*([node.func.value] if method else []), *node.args):
            yield from _factors(part)
    else:
        yield node


def _mentions_x(node: ast.expr) -> bool:
    return any(isinstance(part, ast.Name) and part.id == "x" for part in ast.walk(node))
