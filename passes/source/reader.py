"""Reads one expression of a method: whether it is an activation, which one, and why it may have to stay."""

from __future__ import annotations

import ast
import functools
import inspect
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ortho_fx.passes.source.formulas import formula_of, written_on_the_way
from ortho_fx.passes.source.methods import Method, is_getattr
from ortho_fx.passes.vocabulary.activates import activates, held_in, scripted_in
from ortho_fx.passes.vocabulary.elementwise import bends
from ortho_fx.passes.vocabulary.formula import Formula
from ortho_fx.passes.vocabulary.guards import POSITIVE, Use, number
from ortho_fx.passes.vocabulary.meaning import UNRESOLVED, is_plain
from ortho_fx.passes.vocabulary.recognise import changes_input, recognise
from ortho_fx.passes.vocabulary.targets import BY_NAME, EVERY_TARGET, OPERATOR, PACKET, Reference, Target, overloads_of

CHOSEN_LATER = "which activation it calls is known only when it runs"
HANDED_ON = "it is handed on as a function, and where that is called is not known"
_BY_NAME = "it is called by getattr, whose object is not known"
_OF_OTHERS = "it is built where it is called, and only activations of PyTorch are built to see what they compute"
_NO_CHILD = "it is a part of an object that is no child of the module"
_SCRIPTED = "scripted code cannot be rewritten"
_OUT = "it writes to the tensor that out= names"
_ON_THE_WAY = "it changes its input in place on the way to its result"
_YES = ast.Constant(True)


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
        return f"{_file_name(self.code.co_filename)}:{self.line}"


@functools.lru_cache(maxsize=4096)
def _file_name(path: str) -> str:
    return Path(path).name


@dataclass(frozen=True)
class ChildCall:
    """One call of something that the module keeps, `self.act(x)`: what takes its result, whether `inplace` may be
    asked for, the attributes of self that are constants in it, whether nothing takes the result, whether the input
    is read again by a name of its own, and whether the input is a sum or a difference with a constant."""

    key: str
    uses: tuple[Use, ...]
    in_place: bool
    constants: frozenset[str]
    discarded: bool = False
    reread: bool = False
    of_margin: bool = False


class Reader:
    """Says what an expression of a method is.

    Args:
        method: the method.
        split: children whose calls are activations too.
        functions_inside: the names of the activations inside of an expression, without the expression itself.
    """

    def __init__(
        self, method: Method, split: frozenset[str], functions_inside: Callable[[ast.expr], Iterable[str]]
    ) -> None:
        self.method, self.split, self._functions_inside = method, split, functions_inside

    def call(self, node: ast.Call) -> Call | None:
        """A call of one activation function, whatever stands in the place of the function."""
        self.method.held.clear()
        function, constants = self.asking(lambda: self.method.called(node.func))
        target = EVERY_TARGET.of_function(function) if function is not UNRESOLVED else None
        if target is not None:
            (reference, in_place), further = self.asking(
                lambda: (self._reference(target, node), self._in_place(node, function))
            )
            problem = _OUT if any(keyword.arg == "out" for keyword in node.keywords) else ""
            argument = first_argument(node)
            return self.made(target.name, "function", argument, reference, in_place, problem, constants | further)
        if function is not UNRESOLVED:
            return self._of_object(node, function, constants)
        return self._unknown(node) or self._method(node)

    def formula(self, node: ast.expr) -> Call | None:
        if not any(_bends(part) for part in ast.walk(node)):
            return None
        self.method.held.clear()
        formula, constants = self.asking(lambda: formula_of(node, self.method))
        if formula is None:
            return None
        reference = formula.reference() or self._gated(node, formula)
        if reference is None or (reference.target in POSITIVE and self._adds_constant(node)):
            return None
        written = written_on_the_way(node, formula.argument, self.method)
        problem = _ON_THE_WAY if written is None else ""
        in_place = _YES if written or self._is_augmented(node) else None
        return self.made(reference.target, "formula", formula.argument, reference, in_place, problem, constants)

    def made(
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

    def asking(self, look: Callable[[], Any]) -> tuple[Any, frozenset[str]]:
        """What `look` returns, and the attributes of self that it asked for."""
        asked = set(self.method.asked)
        self.method.asked.clear()
        result = look()
        constants = frozenset(self.method.asked)
        self.method.asked |= asked
        return result, constants

    def tensors_in(self, node: ast.expr | None) -> frozenset[str]:
        """The attributes of self that an expression is made of, if it is made of nothing else that varies."""
        if node is None:
            return frozenset()
        dotted = self.method.dotted(node) if isinstance(node, ast.Attribute) else None
        if dotted is not None:
            return frozenset((dotted,))
        if isinstance(node, ast.BinOp):
            sides = [side for side in (node.left, node.right) if self.method.constant(side) is UNRESOLVED]
            parts = [self.tensors_in(side) for side in sides]
            return frozenset[str]().union(*parts) if all(parts) else frozenset()
        if isinstance(node, ast.UnaryOp):
            return self.tensors_in(node.operand)
        if isinstance(node, ast.Name):
            binding = self.method.scopes.only_binding(node)
            return self.tensors_in(None if binding is None else binding.value)
        if isinstance(node, ast.Subscript):
            return self.tensors_in(node.value)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            of_tensor = self.method.resolve(node.func) is UNRESOLVED
            return self.tensors_in(node.func.value if of_tensor else node.args[0] if node.args else None)
        return frozenset()

    def may_be(self, node: ast.expr) -> bool:
        """Whether a condition is not known to be false."""
        return not isinstance(node, ast.Constant) or bool(node.value)

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
            return asked[0] if self.may_be(asked[0]) else None
        return _YES if changes_input(function) else None

    def _of_object(self, node: ast.Call, function: Any, constants: frozenset[str]) -> Call | None:
        """A call of a module that is no child, or of a function of somebody's."""
        argument = first_argument(node)
        if isinstance(function, type):
            return None
        reference = recognise(function)
        if reference is not None:
            built = isinstance(function, nn.Module) and not isinstance(node.func, ast.Name)
            kind = "built in forward" if built else "function"
            in_place = self._in_place(node, function)
            return self.made(reference.target, kind, argument, reference, in_place, constants=constants)
        bound = isinstance(function, types.MethodType | types.BuiltinFunctionType)
        of = function.__self__ if bound else function
        if isinstance(function, nn.Module) and held_in(function):
            return self.made("activation", "function", argument, None, problem=_NO_CHILD)
        if isinstance(function, torch.jit.ScriptFunction):
            called = next((name for name in scripted_in(function.inlined_graph)), None)
            return None if called is None else self.made(called, "scripted", argument, None, problem=_SCRIPTED)
        if isinstance(function, types.FunctionType | nn.Module) or isinstance(of, types.ModuleType | None):
            return None
        cls = of if isinstance(of, type) else type(of)
        if not is_plain(cls) and activates(cls):
            return self.made("activation", "function", argument, None, problem=_NO_CHILD)
        return None

    def _unknown(self, node: ast.Call) -> Call | None:
        """A call of an activation of which it is known only when it runs which one it is."""
        if self._is_chosen_later(node.func):
            return self.made("activation", "function", first_argument(node), None, problem=CHOSEN_LATER)
        if isinstance(node.func, ast.Call):
            maker = self.method.called(node.func.func)
            if isinstance(maker, type) and not is_plain(maker) and issubclass(maker, nn.Module) and activates(maker):
                return self.made("activation", "built in forward", first_argument(node), None, problem=_OF_OTHERS)
        if isinstance(node.func, ast.Name):
            binding = self.method.scopes.only_binding(node.func)
            if binding is not None and isinstance(binding.value, ast.Call | ast.Subscript):
                made = _replace_func(node, binding.value)
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
            return self.made(target.name, "method", None, None, problem=_BY_NAME) if target and unknown else None
        if not isinstance(node.func, ast.Attribute):
            return None
        receiver, name = node.func.value, node.func.attr
        if self.method.is_self(receiver):
            if name in self.split:
                # Named, for the child to say when it runs whether it works in place.
                return self.made(name, "call", first_argument(node), None, ast.Constant(name))
            return None
        target = EVERY_TARGET.methods.get(name)
        if target is None or node.args or node.keywords or self.method.resolve(receiver) is not UNRESOLVED:
            return None
        in_place = _YES if name.endswith("_") else None
        return self.made(target.name, "method", receiver, target.reference(), in_place)

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
        names = self._functions_inside(node)
        return reference if all(name in BY_NAME and BY_NAME[name].gate for name in names) else None


def _replace_func(node: ast.Call, function: ast.expr) -> ast.Call:
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


def first_argument(node: ast.Call) -> ast.expr | None:
    if node.args:
        return None if isinstance(node.args[0], ast.Starred) else node.args[0]
    if len(node.keywords) == 1 and node.keywords[0].arg is not None:
        return node.keywords[0].value
    return next((keyword.value for keyword in node.keywords if keyword.arg == "input"), None)
