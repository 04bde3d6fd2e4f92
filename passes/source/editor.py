"""Walks the syntax tree of a method, lists its activations in source order, and replaces the chosen ones."""

from __future__ import annotations

import ast
import types
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ortho_fx.passes.source.formulas import formula_of
from ortho_fx.passes.source.methods import UNRESOLVED, Method, is_getattr
from ortho_fx.passes.vocabulary.elementwise import bends
from ortho_fx.passes.vocabulary.formula import Formula
from ortho_fx.passes.vocabulary.recognise import recognise
from ortho_fx.passes.vocabulary.targets import BY_NAME, EVERY_TARGET, Reference, Target

_CHOSEN_LATER = "which activation it calls is known only when it runs"


@dataclass(frozen=True)
class Call:
    """One activation call in the source of a module class.

    Attributes:
        function: the name of the activation function in the table of targets.
        kind: as in `Site`.
        code: the code object that runs the call.
        argument: the input expression; None if the input is not one plain expression.
        reference: the scalar function of the call; None if its other arguments are not constant.
        in_place: whether the call writes to its input.
        problem: why the call cannot be replaced; empty if it can.
        constants: the attributes of self that decide which activation is called.
        attribute: the name of its expansion on the instance: the function, and the call's number among the class' calls
            of that function. So the name does not depend on which other calls are replaced.
        line: the first line of the call.
        order: the position of the call in the order of evaluation.
    """

    function: str
    kind: str
    code: types.CodeType
    argument: ast.expr | None
    reference: Reference | None
    in_place: bool = False
    problem: str = ""
    constants: frozenset[str] = frozenset()
    attribute: str = ""
    line: int = 0
    order: int = 0

    @property
    def location(self) -> str:
        return f"{Path(self.code.co_filename).name}:{self.line}"


class CallEditor(ast.NodeTransformer):
    """Lists activations in `found`, and replaces the chosen ones by `self.<attribute>(argument)`.

    Args:
        method: the method to read.
        numbers: the number of the last call so far of each function in the class; the editor continues the count.
        split: children whose calls are activations too.
        chosen: the `attribute` of each call to replace.
        helpers: functions that became methods of the class, with their names there.
    """

    def __init__(
        self,
        method: Method,
        numbers: dict[str, int],
        split: frozenset[str] = frozenset(),
        chosen: frozenset[str] = frozenset(),
        helpers: Mapping[types.FunctionType, str] = types.MappingProxyType({}),
    ) -> None:
        self.method, self.numbers, self.split, self.chosen, self.helpers = method, numbers, split, chosen, helpers
        self.found: list[Call] = []
        self._discarded: set[ast.expr] = set()
        self._called: set[ast.expr] = set()
        self._evaluated = 0

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        self._discarded.add(node.value)
        return self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        """`x *= torch.sigmoid(x)` assigns a formula to x."""
        if isinstance(node.target, ast.Name):
            target = ast.Name(node.target.id, ast.Load())
            value = ast.copy_location(ast.BinOp(ast.copy_location(target, node), node.op, node.value), node)
            found = self._formula(value)
            if found is not None:
                edited = self._replaced(value, found)
                if edited is not value:
                    return ast.copy_location(ast.Assign([node.target], edited), node)
                return node
        return self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        found = self._formula(node)
        return self._replaced(node, found) if found is not None else self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        if isinstance(node.targets[0], ast.Name) and self.method.is_assigned(node.targets[0].id):
            self._called.add(node.value)
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return self._passed_on(node)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        return self._passed_on(node)

    def _passed_on(self, node: ast.Name | ast.Attribute) -> ast.AST:
        """Lists an activation function that is passed on and not called here: `checkpoint(F.gelu, x)`."""
        target = None
        if isinstance(node.ctx, ast.Load) and node not in self._called:
            target = EVERY_TARGET.of_function(self.method.resolve(node))
        if target is None:
            return self.generic_visit(node)
        problem = "it is handed on as a function, and where that is called is not known"
        return self._replaced(node, self._new(target.name, "function", None, None, problem=problem))

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self._called.add(node.func)
        found = self._call(node)
        if found is None:
            found = self._formula(node)
        if found is not None:
            return self._replaced(node, found)
        helper = self.method.resolve(node.func) if isinstance(node.func, ast.Name | ast.Attribute) else None
        edited = self.generic_visit(node)
        if isinstance(helper, types.FunctionType) and helper in self.helpers:
            assert isinstance(edited, ast.Call)
            edited.func = ast.copy_location(self._of_self(self.helpers[helper]), node.func)
        return edited

    def _new(
        self,
        function: str,
        kind: str,
        argument: ast.expr | None,
        reference: Reference | None,
        in_place: bool = False,
        problem: str = "",
        constants: frozenset[str] = frozenset(),
    ) -> Call:
        code = self.method.function.__code__
        return Call(function, kind, code, argument, reference, in_place, problem, constants)

    def _of_self(self, attribute: str) -> ast.Attribute:
        return ast.Attribute(ast.Name(self.method.self_name, ast.Load()), attribute, ast.Load())

    def _replaced(self, node: ast.expr, found: Call) -> ast.expr:
        """Lists an activation; returns its replacement if it is chosen."""
        number = self.numbers[found.function] = self.numbers.get(found.function, -1) + 1
        argument, problem = found.argument, found.problem
        if not problem and argument is None:
            problem = "its input is not a plain argument"
        elif not problem and found.in_place and node in self._discarded and not isinstance(argument, ast.Name):
            problem = "it changes a tensor in place that has no name of its own"
        attribute = f"{found.function}_expansion_{number}"
        index = len(self.found)
        self.found.append(replace(found, attribute=attribute, line=node.lineno, problem=problem))
        edited: ast.expr = node
        if attribute in self.chosen and argument is not None:
            edited = ast.Call(self._of_self(attribute), [self.visit(argument)], [])
            if found.in_place and isinstance(argument, ast.Name):
                # After the in-place call the name held the result, so it must now hold the expansion's output.
                edited = ast.NamedExpr(ast.Name(argument.id, ast.Store()), edited)
            edited = ast.copy_location(edited, node)
        elif found.kind == "formula" and argument is not None:
            self.visit(argument)
        else:
            self.generic_visit(node)
        # Python evaluates calls inside the arguments first. They have been visited and counted by now.
        self.found[index] = replace(self.found[index], order=self._evaluated)
        self._evaluated += 1
        return edited

    def _call(self, node: ast.Call) -> Call | None:
        """A call of one activation function, by any expression for the function."""
        asked = set(self.method.asked)
        self.method.asked.clear()
        function = self.method.called(node.func)
        target = EVERY_TARGET.of_function(function) if function is not UNRESOLVED else None
        reference = self._reference(target, node) if target is not None else None
        constants = frozenset(self.method.asked)
        self.method.asked |= asked
        if target is not None:
            in_place = function in EVERY_TARGET.in_place or any(_may_be_in_place(k) for k in node.keywords)
            return self._new(target.name, "function", _first_argument(node), reference, in_place, constants=constants)
        if function is not UNRESOLVED:
            return self._of_object(node, function, constants)
        return self._unknown(node) or self._method(node)

    def _reference(self, target: Target, node: ast.Call) -> Reference | None:
        """The scalar function of a call with its further arguments; None if these are not constant."""
        values = [self.method.constant(value) for value in node.args[1:][: len(target.settings)]]
        named = {k.arg: self.method.constant(k.value) for k in node.keywords if k.arg in target.settings}
        if UNRESOLVED in (*values, *named.values()) or any(keyword.arg is None for keyword in node.keywords):
            return None
        return target.reference(values, {str(name): value for name, value in named.items()})

    def _of_object(self, node: ast.Call, function: object, constants: frozenset[str]) -> Call | None:
        """A call of a module that is not a child, or of a function from outside of PyTorch."""
        if isinstance(function, type):
            return None
        reference = recognise(function)
        if reference is None:
            return None
        built_with = node.func.keywords if isinstance(node.func, ast.Call) else []
        in_place = any(_may_be_in_place(k) for k in (*node.keywords, *built_with))
        kind = (
            "built in forward"
            if isinstance(function, nn.Module) and not isinstance(node.func, ast.Name)
            else "function"
        )
        return self._new(reference.target, kind, _first_argument(node), reference, in_place, constants=constants)

    def _unknown(self, node: ast.Call) -> Call | None:
        """A call of `ACT2FN[...]` or `getattr(F, ...)` whose key is known only at run time."""
        if is_getattr(node.func):
            assert isinstance(node.func, ast.Call)
            base = self.method.resolve(node.func.args[0])
            if base in (F, torch, nn):
                return self._new("activation", "function", _first_argument(node), None, problem=_CHOSEN_LATER)
        item = node.func.func if isinstance(node.func, ast.Call) else node.func
        if isinstance(item, ast.Subscript):
            table = self.method.resolve(item.value)
            if isinstance(table, Mapping) and any(key in BY_NAME for key in table if isinstance(key, str)):
                return self._new("activation", "function", _first_argument(node), None, problem=_CHOSEN_LATER)
        return None

    def _method(self, node: ast.Call) -> Call | None:
        if not isinstance(node.func, ast.Attribute):
            return None
        receiver, name = node.func.value, node.func.attr
        if self.method.is_self(receiver):
            if name in self.split:
                return self._new(name, "call", _first_argument(node), None)
            return None
        target = EVERY_TARGET.methods.get(name)
        if target is None or node.args or node.keywords or self.method.resolve(receiver) is not UNRESOLVED:
            return None
        return self._new(target.name, "method", receiver, target.reference(), name.endswith("_"))

    def _formula(self, node: ast.expr) -> Call | None:
        if not any(_bends(part) for part in ast.walk(node)):
            return None
        asked = set(self.method.asked)
        self.method.asked.clear()
        formula = formula_of(node, self.method)
        constants = frozenset(self.method.asked)
        self.method.asked |= asked
        if formula is None:
            return None
        reference = formula.reference() or self._gated(node, formula)
        if reference is None:
            return None
        in_place = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.endswith("_")
        return self._new(reference.target, "formula", formula.argument, reference, in_place, constants=constants)

    def _gated(self, node: ast.expr, formula: Formula) -> Reference | None:
        """The reference of a self-gated product without a name; None if it holds an activation that is no gate."""
        reference = formula.gated()
        if reference is None:
            return None
        inside = CallEditor(self.method, {}, self.split)
        inside.generic_visit(node)
        names = {found.function for found in inside.found}
        return reference if all(name in BY_NAME and BY_NAME[name].gate for name in names) else None


def _bends(node: ast.AST) -> bool:
    return (isinstance(node, ast.Attribute) and bends(node.attr)) or (isinstance(node, ast.Name) and bends(node.id))


def _first_argument(node: ast.Call) -> ast.expr | None:
    if node.args:
        return None if isinstance(node.args[0], ast.Starred) else node.args[0]
    if len(node.keywords) == 1 and node.keywords[0].arg is not None:
        return node.keywords[0].value
    return next((keyword.value for keyword in node.keywords if keyword.arg == "input"), None)


def _may_be_in_place(keyword: ast.keyword) -> bool:
    return keyword.arg == "inplace" and not (isinstance(keyword.value, ast.Constant) and not keyword.value.value)
