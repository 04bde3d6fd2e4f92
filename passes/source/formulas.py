"""Finds activation formulas in source: expressions that compute an elementwise function of one tensor.

Examples are 0.5 x (1 + tanh(...)), x * sigmoid(1.702 x) and relu(x) ** 2, in any spelling. The largest expression is
taken that contains, besides constants, only one tensor expression. It is rewritten in terms of `x` and evaluated, to
see which function of the table it is. A product of x with a gate of x that is not in the table is named by its formula.
"""

from __future__ import annotations

import ast

from ortho_fx.passes.source.methods import Method, Scalar
from ortho_fx.passes.vocabulary.elementwise import METHODS, bends, operation_of
from ortho_fx.passes.vocabulary.formula import Formula
from ortho_fx.passes.vocabulary.meaning import UNRESOLVED

_BINARY = ast.Add | ast.Sub | ast.Mult | ast.Div | ast.Pow
_IGNORED = {"inplace"}
_ALIASES = ("float", "double")


def formula_of(node: ast.expr, method: Method) -> Formula | None:
    """The formula of an expression; None if it reads several tensor expressions, or has no nonlinear operation."""
    reader = _Reader(method)
    tree = reader.read(node)
    (argument, *others) = reader.arguments.values() or (None,)
    if argument is None or others or argument is node or not reader.bends:
        return None
    return Formula(argument, ast.unparse(tree), reader.count > 1)


def written_on_the_way(node: ast.expr, argument: ast.expr, method: Method) -> bool | None:
    """Whether a formula writes its result to its input; None where it writes there something that is not its result."""
    told = ast.dump(argument)
    last = False
    for part in ast.walk(node):
        written = _written(part, method)
        while written is not None and not (same := ast.dump(written) == told):
            written = _alias(written, method)
        if written is not None and same:
            if part is not node:
                return None
            last = True
    return last


def _written(node: ast.AST, method: Method) -> ast.expr | None:
    """The tensor that a call inside of a formula writes to."""
    if not isinstance(node, ast.Call):
        return None
    flags = [k.value for k in node.keywords if k.arg == "inplace"]
    asked = any(not isinstance(flag, ast.Constant) or flag.value for flag in flags)
    if isinstance(node.func, ast.Attribute) and method.resolve(node.func) is UNRESOLVED:
        return node.func.value if node.func.attr.endswith("_") else None
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return node.args[0] if node.args and (asked or name.endswith("_")) else None


def _alias(node: ast.expr, method: Method) -> ast.expr | None:
    """The tensor that an expression may return itself: `x.float()` is x where that is a float already."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd):
        return node.operand
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _ALIASES:
        return node.func.value
    return _written(node, method)


class _Reader:
    """Rewrites an expression in terms of `x`, and collects the tensor expressions that `x` replaces."""

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
        """The called function as the formula writes it; None if it is not elementwise."""
        operation = operation_of(self.method.resolve(node)) if isinstance(node, ast.Name | ast.Attribute) else None
        if operation is not None:
            self.bends |= bends(operation.rpartition(".")[2]) and not operation.startswith("math.")
            return ast.parse(operation, mode="eval").body
        if isinstance(node, ast.Attribute) and node.attr in METHODS and self.method.resolve(node.value) is UNRESOLVED:
            self.bends |= bends(node.attr)
            return ast.Attribute(self.read(node.value), node.attr.removesuffix("_"), ast.Load())
        return None
