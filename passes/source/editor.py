"""Walks the syntax tree of a method, lists its activations in source order, and replaces the chosen ones."""

from __future__ import annotations

import ast
import types
from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from ortho_fx.passes.source.methods import Method, is_getattr
from ortho_fx.passes.source.reader import CHOSEN_LATER, HANDED_ON, Call, ChildCall, Reader, first_argument
from ortho_fx.passes.source.uses import of_margin, uses_of
from ortho_fx.passes.vocabulary.activates import held_in
from ortho_fx.passes.vocabulary.guards import guard_of
from ortho_fx.passes.vocabulary.meaning import UNRESOLVED, is_plain
from ortho_fx.passes.vocabulary.recognise import recognise
from ortho_fx.passes.vocabulary.targets import EVERY_TARGET

# Arithmetic of tensors makes a new one, which nobody else has.
_FRESH = ast.Add | ast.Sub | ast.Mult | ast.Div | ast.Pow | ast.MatMult
IN_PLACE = "_ortho_fx_in_place"


class CallEditor(ast.NodeTransformer):
    """Lists activations in `found`, and replaces the chosen ones by `self.<expansion>(argument)`.

    A call that writes to its input is replaced by one that does so too, whatever other names that tensor has.

    Args:
        method: the method to read.
        numbers: the number of the last call so far of each function in the class; the editor continues the count.
        split: children whose calls are activations too.
        chosen: the `attribute` of each call to replace, with the name of its expansion.
        helpers: functions that became methods of the class, with their names there.
    """

    def __init__(
        self,
        method: Method,
        numbers: dict[str, int],
        split: frozenset[str] = frozenset(),
        chosen: Mapping[str, str] = types.MappingProxyType({}),
        helpers: Mapping[types.FunctionType, str] = types.MappingProxyType({}),
    ) -> None:
        self.method, self.numbers, self.split, self.chosen, self.helpers = method, numbers, split, chosen, helpers
        self.reader = Reader(method, split, self._functions_inside)
        self.found: list[Call] = []
        self.children: list[ChildCall] = []
        # What is listed with the call that it is a part of: names of functions, and calls that make them.
        self._known: set[ast.AST] = set()
        self._makers: set[ast.AST] = set()
        self._evaluated = 0

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        """`x *= torch.sigmoid(x)` assigns a formula to x."""
        if isinstance(node.target, ast.Name):
            target = ast.Name(node.target.id, ast.Load())
            value = ast.copy_location(ast.BinOp(ast.copy_location(target, node), node.op, node.value), node)
            for new in (target, value):
                self.method.scopes.stands_for(new, node)
            found = self.reader.formula(value)
            if found is not None:
                edited = self._replaced(value, found, node)
                if edited is not value:
                    return ast.copy_location(ast.Assign([node.target], edited), node)
                return node
        return self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        found = self.reader.formula(node)
        return self._replaced(node, found) if found is not None else self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        target = node.targets[0]
        if isinstance(target, ast.Name) and self.method.is_assigned(target):
            self._known.add(node.value)
            if isinstance(node.value, ast.Call) and self.method.called(node.value) is not UNRESOLVED:
                self._known.update(ast.walk(node.value))
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return self._passed_on(node)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        return self._passed_on(node)

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        if node in self._known:
            self._known.add(node.value)
        return self.generic_visit(node)

    def _passed_on(self, node: ast.Name | ast.Attribute) -> ast.AST:
        """Lists a function that is no call's, `checkpoint(F.gelu, x)`, and a container of them, `for act in ACTS`."""
        name, problem = None, HANDED_ON
        self.method.held.clear()
        if isinstance(node.ctx, ast.Load) and node not in self._known:
            value = self.method.resolve(node)
            target = EVERY_TARGET.of_function(value)
            if target is not None:
                name = target.name
            elif isinstance(value, types.FunctionType) and not is_plain(value):
                reference = recognise(value)
                name = None if reference is None else reference.target
            elif not isinstance(value, nn.Module) and held_in(value):
                name, problem = "activation", CHOSEN_LATER
            elif isinstance(node, ast.Attribute) and node.attr == "__dict__":
                is_torchs = any(self.method.resolve(node.value) is module for module in (F, torch, nn))
                name, problem = ("activation", CHOSEN_LATER) if is_torchs else (None, "")
        if name is None:
            return self.generic_visit(node)
        return self._replaced(node, self.reader.made(name, "function", None, None, problem=problem))

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self._known.add(node.func)
        if node in self._makers:
            return self.generic_visit(node)
        found = self.reader.call(node)
        if found is None:
            found = self.reader.formula(node)
        if found is not None:
            self._makers.add(node.func)
            self._known.update(ast.walk(node.func))
            return self._replaced(node, found)
        if is_getattr(node) and node not in self._known:
            base, name = self.method.resolve(node.args[0]), self.method.constant(node.args[1])
            if name is UNRESOLVED and any(base is module for module in (F, torch, nn)):
                return self._replaced(
                    node, self.reader.made("activation", "function", None, None, problem=CHOSEN_LATER)
                )
        if isinstance(node.func, ast.Attribute) and self.method.is_self(node.func.value):
            self._note_child(node, node.func.attr)
        helper = self.method.resolve(node.func) if isinstance(node.func, ast.Name | ast.Attribute) else None
        edited = self.generic_visit(node)
        if isinstance(helper, types.FunctionType) and helper in self.helpers:
            assert isinstance(edited, ast.Call)
            edited.func = ast.copy_location(self._of_self(self.helpers[helper]), node.func)
        return edited

    def _note_child(self, node: ast.Call, key: str) -> None:
        if not self.chosen:
            in_place = any(self.reader.may_be(keyword.value) for keyword in node.keywords if keyword.arg == "inplace")
            (uses, margin), asked = self.reader.asking(
                lambda: (tuple(uses_of(node, self.method)), of_margin(first_argument(node), self.method))
            )
            decisive = margin or any(use.other is not None for use in uses)
            discarded = isinstance(self.method.scopes.parents.get(node), ast.Expr)
            self.children.append(
                ChildCall(
                    key, uses, in_place, asked if decisive else frozenset(), discarded, self._is_reread(node), margin
                )
            )

    def _is_reread(self, call: ast.Call) -> bool:
        """Whether the code reads the input of a call afterwards, under its name or under another that it was given."""
        argument = first_argument(call)
        statement: ast.AST | None = call
        while statement is not None and not isinstance(statement, ast.stmt):
            statement = self.method.scopes.parents.get(statement)
        if not isinstance(argument, ast.Name) or not isinstance(statement, ast.stmt):
            return False
        names = {argument.id}
        inside = list(ast.walk(self.method.definition))
        stored = (n.lineno for n in inside if isinstance(n, ast.Name) and n.id == argument.id and _is_store(n))
        # What had the name before its last value is another tensor.
        since = max((line for line in stored if line < statement.lineno), default=0)
        for node in inside:
            earlier = isinstance(node, ast.Assign) and since <= node.lineno < statement.lineno
            if earlier and isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                value = node.value.value if isinstance(node.value, ast.Subscript) else node.value
                if isinstance(value, ast.Name) and value.id == argument.id:
                    names.add(node.targets[0].id)
        written = statement.targets if isinstance(statement, ast.Assign) else []
        names -= {target.id for target in written if isinstance(target, ast.Name)}
        return any(any(True for _ in self.method.scopes.later_loads(statement, name)) for name in names)

    def _functions_inside(self, node: ast.expr) -> set[str]:
        inside = CallEditor(self.method, {}, self.split)
        inside.generic_visit(node)
        return {found.function for found in inside.found}

    def _of_self(self, attribute: str) -> ast.Attribute:
        return ast.Attribute(ast.Name(self.method.self_name, ast.Load()), attribute, ast.Load())

    def _replaced(self, node: ast.expr, found: Call, place: ast.AST | None = None) -> ast.expr:
        """Lists an activation; returns its replacement if it is chosen. `place` is what the node was made of."""
        number = self.numbers[found.function] = self.numbers.get(found.function, -1) + 1
        argument, problem = found.argument, found.problem
        if not problem and argument is None:
            problem = "its input is not a plain argument"
        attribute = f"{found.function}_expansion_{number}"
        index = len(self.found)
        place = node if place is None else place
        found = replace(
            found, attribute=attribute, line=node.lineno, method=self.method.name, problem=problem, place=place
        )
        self.found.append(found if self.chosen else self._with_surroundings(node, found))
        edited: ast.expr = node
        if attribute in self.chosen and argument is not None:
            edited = ast.copy_location(self._expanded(self.chosen[attribute], argument, found.in_place), node)
        elif found.kind == "formula" and argument is not None:
            self.visit(argument)
        else:
            self.generic_visit(node)
        # Python evaluates calls inside the arguments first. They have been visited and counted by now.
        self.found[index] = replace(self.found[index], order=self._evaluated)
        self._evaluated += 1
        return edited

    def _expanded(self, attribute: str, argument: ast.expr, in_place: ast.expr | None) -> ast.Call:
        fresh = isinstance(argument, ast.BinOp) and isinstance(argument.op, _FRESH)
        if in_place is None or fresh:
            return ast.Call(self._of_self(attribute), [self.visit(argument)], [])
        name = ast.Constant(attribute)
        return ast.Call(self._of_self(IN_PLACE), [name, self.visit(argument), self.visit(in_place)], [])

    def _with_surroundings(self, node: ast.expr, found: Call) -> Call:
        """A call with what it is to be left for that is not in the call itself."""
        guard, asked = self.reader.asking(
            lambda: guard_of(
                found.function, uses_of(node, self.method), of_margin=of_margin(found.argument, self.method)
            )
        )
        return replace(
            found,
            problem=found.problem or self.method.owner_problem(node),
            guard=guard,
            constants=found.constants | (asked if guard else frozenset()),
            tensors=self.reader.tensors_in(found.argument),
        )


def _is_store(node: ast.Name) -> bool:
    return isinstance(node.ctx, ast.Store)
