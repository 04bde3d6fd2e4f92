"""Walks the syntax tree of a method, lists its activations in source order, and replaces the chosen ones."""

from __future__ import annotations

import ast
import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ortho_fx.passes.source.formulas import formula_of, written_on_the_way
from ortho_fx.passes.source.methods import Method, is_getattr
from ortho_fx.passes.source.uses import uses_of
from ortho_fx.passes.vocabulary.activates import activates, held_in, scripted_in
from ortho_fx.passes.vocabulary.elementwise import bends
from ortho_fx.passes.vocabulary.formula import Formula
from ortho_fx.passes.vocabulary.guards import POSITIVE, Use, guard_of, number
from ortho_fx.passes.vocabulary.meaning import UNRESOLVED, is_plain
from ortho_fx.passes.vocabulary.recognise import changes_input, recognise
from ortho_fx.passes.vocabulary.targets import BY_NAME, EVERY_TARGET, OPERATOR, PACKET, Reference, Target, overloads_of

_CHOSEN_LATER = "which activation it calls is known only when it runs"
_HANDED_ON = "it is handed on as a function, and where that is called is not known"
_BY_NAME = "it is called by getattr, whose object is not known"
_OF_OTHERS = "it is built where it is called, and only activations of PyTorch are built to see what they compute"
_NO_CHILD = "it is a part of an object that is no child of the module"
_SCRIPTED = "scripted code cannot be rewritten"
_OUT = "it writes to the tensor that out= names"
_ON_THE_WAY = "it changes its input in place on the way to its result"
_YES = ast.Constant(True)
# Arithmetic of tensors makes a new one, which nobody else has.
_FRESH = ast.Add | ast.Sub | ast.Mult | ast.Div | ast.Pow | ast.MatMult
IN_PLACE = "_ortho_fx_in_place"


@dataclass(frozen=True)
class Call:
    """One activation call in the source of a module class.

    Attributes:
        function: the name of the activation function in the table of targets.
        kind: as in `Site`.
        code: the code object that runs the call.
        argument: its input; None where that is not one plain expression.
        reference: the scalar function that it computes; None where its arguments are no constants.
        in_place: what says when it runs whether it writes to its input; None where it never does.
        problem: why it cannot be replaced; empty where it can.
        constants: the attributes of self that decide which activation it is.
        held: the attributes of the class that do.
        guard: why it is no activation unless it is named as one; empty where it is.
        method: the method that it stands in, by its name in the class.
        attribute: its name, and that of its expansion on the instance where no other call shares it: the function, then
            the call's number among the class' calls of that function, so that the name does not depend on what else is
            rewritten.
        line: where it starts.
        order: its number in the order of evaluation.
        tensors: the attributes of self that its input is made of, where it is made of nothing else.
        place: the expression or statement that it is, in the tree of the method's definition; None where none was read.
    """

    function: str
    kind: str
    code: types.CodeType
    argument: ast.expr | None
    reference: Reference | None
    in_place: ast.expr | None = None
    problem: str = ""
    constants: frozenset[str] = frozenset()
    held: frozenset[str] = frozenset()
    guard: str = ""
    method: str = ""
    attribute: str = ""
    line: int = 0
    order: int = 0
    tensors: frozenset[str] = frozenset()
    place: ast.AST | None = None

    @property
    def location(self) -> str:
        return f"{Path(self.code.co_filename).name}:{self.line}"


@dataclass(frozen=True)
class ChildCall:
    """One call of something that the module keeps, `self.act(x)`: what takes its result, whether `inplace` may be
    asked for, the attributes of self that are constants in it, whether nothing takes the result, and whether the input
    is read again by a name of its own."""

    key: str
    uses: tuple[Use, ...]
    in_place: bool
    constants: frozenset[str]
    discarded: bool = False
    reread: bool = False


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
            found = self._formula(value)
            if found is not None:
                edited = self._replaced(value, found, node)
                if edited is not value:
                    return ast.copy_location(ast.Assign([node.target], edited), node)
                return node
        return self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        found = self._formula(node)
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
        name, problem = None, _HANDED_ON
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
                name, problem = "activation", _CHOSEN_LATER
            elif isinstance(node, ast.Attribute) and node.attr == "__dict__":
                is_torchs = any(self.method.resolve(node.value) is module for module in (F, torch, nn))
                name, problem = ("activation", _CHOSEN_LATER) if is_torchs else (None, "")
        if name is None:
            return self.generic_visit(node)
        return self._replaced(node, self._new(name, "function", None, None, problem=problem))

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self._known.add(node.func)
        if node in self._makers:
            return self.generic_visit(node)
        found = self._call(node)
        if found is None:
            found = self._formula(node)
        if found is not None:
            self._makers.add(node.func)
            self._known.update(ast.walk(node.func))
            return self._replaced(node, found)
        if is_getattr(node) and node not in self._known:
            base, name = self.method.resolve(node.args[0]), self.method.constant(node.args[1])
            if name is UNRESOLVED and any(base is module for module in (F, torch, nn)):
                return self._replaced(node, self._new("activation", "function", None, None, problem=_CHOSEN_LATER))
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
            in_place = any(self._may_be(keyword.value) for keyword in node.keywords if keyword.arg == "inplace")
            uses, asked = self._asking(lambda: tuple(uses_of(node, self.method)))
            decisive = any(use.other is not None for use in uses)
            discarded = isinstance(self.method.scopes.parents.get(node), ast.Expr)
            self.children.append(
                ChildCall(key, uses, in_place, asked if decisive else frozenset(), discarded, self._is_reread(node))
            )

    def _is_reread(self, call: ast.Call) -> bool:
        """Whether the code reads the input of a call afterwards, under its name or under another that it was given."""
        argument = _first_argument(call)
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

    def _new(
        self,
        function: str,
        kind: str,
        argument: ast.expr | None,
        reference: Reference | None,
        in_place: ast.expr | None = None,
        problem: str = "",
        constants: frozenset[str] = frozenset(),
    ) -> Call:
        code = self.method.function.__code__
        return Call(
            function, kind, code, argument, reference, in_place, problem, constants, frozenset(self.method.held)
        )

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
        guard, asked = self._asking(lambda: guard_of(found.function, uses_of(node, self.method)))
        return replace(
            found,
            problem=found.problem or self.method.owner_problem(node),
            guard=guard,
            constants=found.constants | (asked if guard else frozenset()),
            tensors=self._attributes_in(found.argument),
        )

    def _attributes_in(self, node: ast.expr | None) -> frozenset[str]:
        """The attributes of self that an expression is made of, if it is made of nothing else that varies."""
        if node is None:
            return frozenset()
        dotted = self.method.dotted(node) if isinstance(node, ast.Attribute) else None
        if dotted is not None:
            return frozenset((dotted,))
        if isinstance(node, ast.BinOp):
            sides = [side for side in (node.left, node.right) if self.method.constant(side) is UNRESOLVED]
            parts = [self._attributes_in(side) for side in sides]
            return frozenset[str]().union(*parts) if all(parts) else frozenset()
        if isinstance(node, ast.UnaryOp):
            return self._attributes_in(node.operand)
        if isinstance(node, ast.Name):
            binding = self.method.scopes.only_binding(node)
            return self._attributes_in(None if binding is None else binding.value)
        if isinstance(node, ast.Subscript):
            return self._attributes_in(node.value)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            of_tensor = self.method.resolve(node.func) is UNRESOLVED
            return self._attributes_in(node.func.value if of_tensor else node.args[0] if node.args else None)
        return frozenset()

    def _asking(self, look: Callable[[], Any]) -> tuple[Any, frozenset[str]]:
        """What `look` returns, and the attributes of self that it asked for."""
        asked = set(self.method.asked)
        self.method.asked.clear()
        result = look()
        constants = frozenset(self.method.asked)
        self.method.asked |= asked
        return result, constants

    def _call(self, node: ast.Call) -> Call | None:
        """A call of one activation function, whatever stands in the place of the function."""
        self.method.held.clear()
        function, constants = self._asking(lambda: self.method.called(node.func))
        target = EVERY_TARGET.of_function(function) if function is not UNRESOLVED else None
        if target is not None:
            (reference, in_place), further = self._asking(
                lambda: (self._reference(target, node), self._in_place(node, function))
            )
            problem = _OUT if any(keyword.arg == "out" for keyword in node.keywords) else ""
            argument = _first_argument(node)
            return self._new(target.name, "function", argument, reference, in_place, problem, constants | further)
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

    def _in_place(self, node: ast.Call, function: object) -> ast.expr | None:
        """What says whether a call of a function writes to its input; None where it does not."""
        operator = overloads_of(function)[0] if isinstance(function, PACKET) else function
        if function in EVERY_TARGET.in_place or (isinstance(operator, OPERATOR) and operator._schema.is_mutable):
            return _YES
        position = _position_of_inplace(function)
        asked = [keyword.value for keyword in node.keywords if keyword.arg == "inplace"]
        if position is not None and position < len(node.args):
            asked.append(node.args[position])
        if asked:
            return asked[0] if self._may_be(asked[0]) else None
        return _YES if changes_input(function) else None

    def _may_be(self, node: ast.expr) -> bool:
        """Whether a condition is not known to be false."""
        return not isinstance(node, ast.Constant) or bool(node.value)

    def _of_object(self, node: ast.Call, function: Any, constants: frozenset[str]) -> Call | None:
        """A call of a module that is no child, or of a function of somebody's."""
        argument = _first_argument(node)
        if isinstance(function, type):
            return None
        reference = recognise(function)
        if reference is not None:
            built = isinstance(function, nn.Module) and not isinstance(node.func, ast.Name)
            kind = "built in forward" if built else "function"
            in_place = self._in_place(node, function)
            return self._new(reference.target, kind, argument, reference, in_place, constants=constants)
        bound = isinstance(function, types.MethodType | types.BuiltinFunctionType)
        of = function.__self__ if bound else function
        if isinstance(function, nn.Module) and held_in(function):
            return self._new("activation", "function", argument, None, problem=_NO_CHILD)
        if isinstance(function, torch.jit.ScriptFunction):
            called = next((name for name in scripted_in(function.inlined_graph)), None)
            return None if called is None else self._new(called, "scripted", argument, None, problem=_SCRIPTED)
        if isinstance(function, types.FunctionType | nn.Module) or isinstance(of, types.ModuleType | None):
            return None
        cls = of if isinstance(of, type) else type(of)
        if not is_plain(cls) and activates(cls):
            return self._new("activation", "function", argument, None, problem=_NO_CHILD)
        return None

    def _unknown(self, node: ast.Call) -> Call | None:
        """A call of an activation of which it is known only when it runs which one it is."""
        if self._is_chosen_later(node.func):
            return self._new("activation", "function", _first_argument(node), None, problem=_CHOSEN_LATER)
        if isinstance(node.func, ast.Call):
            maker = self.method.called(node.func.func)
            if isinstance(maker, type) and not is_plain(maker) and issubclass(maker, nn.Module) and activates(maker):
                return self._new("activation", "built in forward", _first_argument(node), None, problem=_OF_OTHERS)
        if isinstance(node.func, ast.Name):
            binding = self.method.scopes.only_binding(node.func)
            if binding is not None and isinstance(binding.value, ast.Call | ast.Subscript):
                made = replace_func(node, binding.value)
                self.method.scopes.stands_for(made, node)
                return self._unknown(made)
        return None

    def _is_chosen_later(self, function: ast.expr) -> bool:
        if is_getattr(function):
            assert isinstance(function, ast.Call)
            base = self.method.resolve(function.args[0])
            return any(base is module for module in (F, torch, nn))
        if isinstance(function, ast.Subscript):
            table = self.method.resolve(function.value)
            named = isinstance(table, dict) and any(k in BY_NAME for k in dict.keys(table) if isinstance(k, str))
            return named or (not isinstance(table, nn.Module) and bool(held_in(table)))
        if isinstance(function, ast.Call):
            if self._is_chosen_later(function.func):
                return True
            maker = self.method.called(function.func)
            return isinstance(maker, types.FunctionType) and not is_plain(maker) and _makes(maker)
        return False

    def _method(self, node: ast.Call) -> Call | None:
        if is_getattr(node.func):
            assert isinstance(node.func, ast.Call)
            name = self.method.constant(node.func.args[1])
            target = EVERY_TARGET.methods.get(name) if isinstance(name, str) else None
            unknown = target is not None and not self.method.is_self(node.func.args[0]) and not node.args
            return self._new(target.name, "method", None, None, problem=_BY_NAME) if target and unknown else None
        if not isinstance(node.func, ast.Attribute):
            return None
        receiver, name = node.func.value, node.func.attr
        if self.method.is_self(receiver):
            if name in self.split:
                # Named, for the child to say when it runs whether it works in place.
                return self._new(name, "call", _first_argument(node), None, ast.Constant(name))
            return None
        target = EVERY_TARGET.methods.get(name)
        if target is None or node.args or node.keywords or self.method.resolve(receiver) is not UNRESOLVED:
            return None
        in_place = _YES if name.endswith("_") else None
        return self._new(target.name, "method", receiver, target.reference(), in_place)

    def _formula(self, node: ast.expr) -> Call | None:
        if not any(_bends(part) for part in ast.walk(node)):
            return None
        self.method.held.clear()
        formula, constants = self._asking(lambda: formula_of(node, self.method))
        if formula is None:
            return None
        reference = formula.reference() or self._gated(node, formula)
        if reference is None or (reference.target in POSITIVE and self._adds_constant(node)):
            return None
        written = written_on_the_way(node, formula.argument, self.method)
        problem = _ON_THE_WAY if written is None else ""
        in_place = _YES if written or self._is_augmented(node) else None
        return self._new(reference.target, "formula", formula.argument, reference, in_place, problem, constants)

    def _adds_constant(self, node: ast.expr) -> bool:
        """Whether an expression adds a number, as the 1e-6 of `relu(x) + 1e-6`, which hardly changes the function."""
        if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Add):
            return False
        return any(number(self.method.constant(side)) for side in (node.left, node.right))

    def _is_augmented(self, node: ast.expr) -> bool:
        """Whether an expression was made of `x *= ...`, which writes to x."""
        return isinstance(node, ast.BinOp) and node not in self.method.scopes.parents

    def _gated(self, node: ast.expr, formula: Formula) -> Reference | None:
        """The reference of a self-gated product without a name; None if it holds an activation that is no gate."""
        reference = formula.gated()
        if reference is None:
            return None
        inside = CallEditor(self.method, {}, self.split)
        inside.generic_visit(node)
        names = {found.function for found in inside.found}
        return reference if all(name in BY_NAME and BY_NAME[name].gate for name in names) else None


def replace_func(node: ast.Call, function: ast.expr) -> ast.Call:
    """A call of another function with the same arguments."""
    return ast.copy_location(ast.Call(function, node.args, node.keywords), node)


def _makes(maker: types.FunctionType) -> bool:
    """Whether a function may make an activation, rather than call one."""
    return activates(maker, made=True)


def _position_of_inplace(function: Any) -> int | None:
    """Which positional argument of a function says whether it works in place; None where none does."""
    if not isinstance(function, types.FunctionType):
        return None
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None
    return names.index("inplace") if "inplace" in names else None


def _bends(node: ast.AST) -> bool:
    return (isinstance(node, ast.Attribute) and bends(node.attr)) or (isinstance(node, ast.Name) and bends(node.id))


def _is_store(node: ast.Name) -> bool:
    return isinstance(node.ctx, ast.Store)


def _first_argument(node: ast.Call) -> ast.expr | None:
    if node.args:
        return None if isinstance(node.args[0], ast.Starred) else node.args[0]
    if len(node.keywords) == 1 and node.keywords[0].arg is not None:
        return node.keywords[0].value
    return next((keyword.value for keyword in node.keywords if keyword.arg == "input"), None)
