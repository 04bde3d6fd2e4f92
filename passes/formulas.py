"""Activation formulas in source: an expression that computes a function of one tensor, elementwise.

0.5 x (1 + tanh(...)), x * sigmoid(1.702 x), relu(x) ** 2: whatever the spelling, the largest expression is taken whose
only ingredient besides constants is one tensor expression, rewritten in terms of `x`, and evaluated to see which
function of the table it is. A product of x with a gate of x that is none of these keeps its formula as its name.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ortho_fx.passes.elementwise import METHODS, bends, operation_of
from ortho_fx.passes.methods import UNRESOLVED, Method, Scalar
from ortho_fx.passes.recognise import evaluated, match
from ortho_fx.passes.targets import Reference, self_gated

_BINARY = ast.Add | ast.Sub | ast.Mult | ast.Div | ast.Pow
_IGNORED = {"inplace", "out"}


@dataclass(frozen=True)
class Formula:
    """What an expression computes of its one tensor: `argument` is that expression, `text` the function in `x`."""

    argument: ast.expr
    text: str
    repeated: bool

    def reference(self) -> Reference | None:
        """The function of the table that it is; None where it is none, or may compute its argument only once."""
        return None if self.repeated and not _repeatable(self.argument) else _match(self.text)

    def gated(self) -> Reference | None:
        """The formula itself, where it is a product of x, or of what bounds x, with a gate of x."""
        return _gated(self.text) if self.repeated and _repeatable(self.argument) else None


def formula_of(node: ast.expr, method: Method) -> Formula | None:
    """The formula that an expression is; None where it has several ingredients, or does not bend."""
    reader = _Reader(method)
    tree = reader.read(node)
    (argument, *others) = reader.arguments.values() or (None,)
    if argument is None or others or argument is node or not reader.bends:
        return None
    return Formula(argument, ast.unparse(tree), reader.count > 1)


class _Reader:
    """Rewrites an expression in terms of `x`; collects what `x` stands for."""

    def __init__(self, method: Method) -> None:
        self.method = method
        self.arguments: dict[str, ast.expr] = {}
        self.count, self.bends = 0, False

    def read(self, node: ast.expr) -> ast.expr:
        constant = self.method.constant(node)
        if isinstance(constant, Scalar):
            return ast.Constant(constant)
        if isinstance(node, ast.BinOp) and isinstance(node.op, _BINARY):
            return ast.BinOp(self.read(node.left), node.op, self.read(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
            return ast.UnaryOp(node.op, self.read(node.operand))
        if isinstance(node, ast.Call) and not any(isinstance(argument, ast.Starred) for argument in node.args):
            function = self._function(node.func)
            if function is not None:
                keywords = [
                    ast.keyword(k.arg, self.read(k.value)) for k in node.keywords if k.arg not in _IGNORED and k.arg
                ]
                return ast.Call(function, [self.read(argument) for argument in node.args], keywords)
        self.arguments.setdefault(ast.dump(node), node)
        self.count += 1
        return ast.Name("x", ast.Load())

    def _function(self, node: ast.expr) -> ast.expr | None:
        """The function of a call as the formula writes it; None where that is no elementwise operation."""
        operation = operation_of(self.method.resolve(node)) if isinstance(node, ast.Name | ast.Attribute) else None
        if operation is not None:
            self.bends |= bends(operation.rpartition(".")[2]) and not operation.startswith("math.")
            return ast.parse(operation, mode="eval").body
        if isinstance(node, ast.Attribute) and node.attr in METHODS and self.method.resolve(node.value) is UNRESOLVED:
            self.bends |= bends(node.attr)
            return ast.Attribute(self.read(node.value), node.attr.removesuffix("_"), ast.Load())
        return None


def _repeatable(node: ast.expr) -> bool:
    """Whether an expression can be computed once where it was written twice: a name, or attributes and items of one."""
    return all(
        isinstance(part, ast.Name | ast.Attribute | ast.Subscript | ast.Slice | ast.Constant | ast.Tuple | ast.UnaryOp)
        or isinstance(part, ast.expr_context | ast.unaryop)
        for part in ast.walk(node)
    )


@functools.lru_cache(maxsize=4096)
def _match(text: str) -> Reference | None:
    return match(functools.partial(self_gated, formula=text))


@functools.lru_cache(maxsize=4096)
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
    """The factors of a product, divisors included; the expression itself where it is none."""
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
