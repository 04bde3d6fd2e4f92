"""What becomes of a value in a method: the operations that take it, followed through the names that it is given."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from ortho_fx.passes.source.methods import Method
from ortho_fx.passes.vocabulary.guards import Use, number
from ortho_fx.passes.vocabulary.meaning import UNRESOLVED

_LONGEST_WAY = 8
_OPERATIONS: dict[type[ast.operator], str] = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.Div: "truediv",
    ast.FloorDiv: "floordiv",
    ast.Pow: "pow",
    ast.MatMult: "matmul",
}


def uses_of(node: ast.expr, method: Method) -> Iterator[Use]:
    """The operations that take the value of an expression."""
    parent = method.scopes.parents.get(node)
    if isinstance(parent, ast.BinOp) and type(parent.op) in _OPERATIONS:
        operand = int(parent.right is node)
        other = parent.left if operand else parent.right
        yield _use(_OPERATIONS[type(parent.op)], operand, other, parent, method)
    elif isinstance(parent, ast.AugAssign) and parent.value is node and type(parent.op) in _OPERATIONS:
        yield Use(_OPERATIONS[type(parent.op)], 1, None, lambda: ())
    elif isinstance(parent, ast.Attribute):
        call = method.scopes.parents.get(parent)
        if isinstance(call, ast.Call) and call.func is parent:
            argument, alone = call.args[0] if call.args else None, not call.args and not call.keywords
            yield _use(_name(parent.attr), 0, argument, call, method, alone=alone)
    elif isinstance(parent, ast.Call) and node in parent.args:
        yield from _of_call(node, parent, method)
    elif isinstance(parent, ast.Subscript) and parent.value is node:
        yield _use("getitem", 0, None, parent, method)
    elif isinstance(parent, ast.IfExp) and node is not parent.test:
        yield from uses_of(parent, method)
    elif isinstance(parent, ast.NamedExpr):
        yield from uses_of(parent, method)
    elif isinstance(parent, ast.Assign):
        for target in parent.targets:
            yield from _of_name(target, parent, method)
    elif isinstance(parent, ast.Tuple | ast.List):
        statement = method.scopes.parents.get(parent)
        if isinstance(statement, ast.Assign):
            for target in statement.targets:
                if isinstance(target, ast.Tuple | ast.List) and len(target.elts) == len(parent.elts):
                    yield from _of_name(target.elts[parent.elts.index(node)], statement, method)


def _of_call(node: ast.expr, call: ast.Call, method: Method) -> Iterator[Use]:
    """A function's argument counts from 0, that of a tensor's method from 1."""
    index, alone = call.args.index(node), len(call.args) == 1 and not call.keywords
    if isinstance(call.func, ast.Attribute) and not method.is_self(call.func.value):
        of_tensor = method.resolve(call.func) is UNRESOLVED
        others = [call.func.value, *call.args] if of_tensor else call.args
        operand = index + of_tensor
        other = others[1 - operand] if operand < 2 <= len(others) else None
        yield _use(_name(call.func.attr), operand, other, call, method, alone=alone and not of_tensor)
    elif isinstance(call.func, ast.Name):
        other = call.args[1 - index] if index < 2 <= len(call.args) else None
        yield _use(_name(call.func.id), index, other, call, method, alone=alone)


def _of_name(target: ast.expr, statement: ast.stmt, method: Method) -> Iterator[Use]:
    if isinstance(target, ast.Name):
        for load in method.scopes.later_loads(statement, target.id):
            yield from uses_of(load, method)
        yield from _changed_in_place(target, statement, method)


def _changed_in_place(target: ast.Name, statement: ast.stmt, method: Method) -> Iterator[Use]:
    """`y /= 0.6` after the statement that gave y its value."""
    for later in method.scopes.after(statement):
        if isinstance(later, ast.Assign) and any(isinstance(t, ast.Name) and t.id == target.id for t in later.targets):
            return
        if isinstance(later, ast.AugAssign) and isinstance(later.target, ast.Name) and later.target.id == target.id:
            if type(later.op) in _OPERATIONS:
                yield _use(_OPERATIONS[type(later.op)], 0, later.value, later, method)


def of_margin(node: ast.expr | None, method: Method, depth: int = _LONGEST_WAY) -> bool:
    """Whether an expression, or that of a name with one value, is a sum or a difference with a constant in it."""
    if node is None or not depth:
        return False
    if isinstance(node, ast.Name):
        binding = method.scopes.only_binding(node)
        return binding is not None and of_margin(binding.value, method, depth - 1)
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Add | ast.Sub):
        return False
    sides = node.left, node.right
    return any(number(method.constant(side)) for side in sides) or any(of_margin(s, method, depth - 1) for s in sides)


def _use(
    operation: str, operand: int, other: ast.expr | None, result: ast.AST, method: Method, *, alone: bool = False
) -> Use:
    constant = None if other is None else number(method.constant(other))

    def further() -> Iterator[Use]:
        return uses_of(result, method) if isinstance(result, ast.expr) else iter(())

    return Use(operation, operand, constant, further, alone)


def _name(spelled: str) -> str:
    return spelled.removesuffix("_")
