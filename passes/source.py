"""Activation calls in the source of a module's own methods, and classes in which some of them are learnable.

A module that writes `F.gelu(x)`, `x.relu()` or `nn.SiLU()(x)` in its forward is rewritten where the call stands: the
method's syntax tree gets `self.<expansion>(x)` in the place of the call, and the module instance gets a subclass of its
class with the methods so compiled. Everything else of the method stays what it was: branches on `self.training`,
optional arguments and loops are not frozen as they would be by tracing, calls inside child modules are out of reach by
construction, no example input is needed, and Dynamo traces the result like any other code.

Decorators are not run again: each wrapper is copied with the new function in the place of the one that it closes over.
Where a method cannot be rebuilt for certain (no source, source that is not what runs, an unknown kind of wrapper), its
calls are reported with the reason and left alone.
"""

from __future__ import annotations

import ast
import copy
import copyreg
import functools
import inspect
import types
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ortho_fx.errors import OrthoFxError
from ortho_fx.passes.targets import TARGETS, Reference, Target, TargetTable

_EVERY_TARGET = TargetTable(TARGETS)
_UNRESOLVED = object()
_ORIGIN = "_ortho_fx_origin"


@dataclass(frozen=True)
class Call:
    """One activation call in the source of a module class.

    `attribute` names the expansion on the instance: the function, then its number among the class' calls of that
    function, so that the name does not depend on what else is rewritten. `code` is the code object that runs the call,
    `order` the number of the call in the order of evaluation. `reference` is the scalar function that the call
    computes, None where its arguments are no constants. `problem` says why it cannot be replaced.
    """

    attribute: str
    function: str
    kind: str
    code: types.CodeType
    line: int
    order: int = 0
    reference: Reference | None = None
    problem: str = ""

    @property
    def location(self) -> str:
        return f"{Path(self.code.co_filename).name}:{self.line}"


@functools.lru_cache(maxsize=1024)
def find_calls(cls: type) -> tuple[Call, ...]:
    """Every activation call in `forward` and the methods that it reaches through `self`; gates are included."""
    return tuple(call for _, calls in _methods_with_calls(cls) for call in calls)


@functools.lru_cache(maxsize=1024)
def rewrite_class(cls: type, attributes: frozenset[str]) -> type:
    """A subclass of `cls` that calls `self.<attribute>` in the place of each of these activation calls."""
    known = {call.attribute for call in find_calls(cls)}
    if not attributes <= known:
        missing = ", ".join(sorted(attributes - known))
        raise OrthoFxError(f"the source of {cls.__qualname__} has no activation call {missing}; has it changed?")
    methods: dict[str, Any] = {}
    for method, calls in _methods_with_calls(cls):
        chosen = [call for call in calls if call.attribute in attributes]
        for call in chosen:
            if call.problem:
                raise OrthoFxError(f"{call.attribute} of {cls.__qualname__} cannot be replaced: {call.problem}")
        if chosen:
            methods[method.name] = method.rebuild(calls, attributes)
    namespace = {
        **methods,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": _reduce,
        _ORIGIN: (cls, attributes),
    }
    return types.new_class(cls.__name__, (cls,), {}, lambda body: body.update(namespace))


def origin(cls: type) -> tuple[type, frozenset[str]]:
    """The class that a rewritten class was made from, and its replaced calls; any other class itself, and none."""
    return cls.__dict__.get(_ORIGIN, (cls, frozenset()))


def _reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
    # A rewritten class has no importable name: a pickle names the original class and the calls that were replaced.
    cls, attributes = origin(type(self))
    reduced = super(type(self), self).__reduce_ex__(max(protocol, 2))
    if not isinstance(reduced, tuple) or reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
        raise OrthoFxError(f"{cls.__qualname__} has a pickling of its own, so its rewritten form cannot be copied")
    return (_restore, (cls, tuple(sorted(attributes))), *reduced[2:])


def _restore(cls: type, attributes: tuple[str, ...]) -> nn.Module:
    rewritten = rewrite_class(cls, frozenset(attributes))
    return nn.Module.__new__(rewritten)


def _methods_with_calls(cls: type) -> Iterator[tuple[_Method, list[Call]]]:
    """Each method of the class that makes activation calls, with these, numbered through the class."""
    numbers: dict[str, int] = {}
    for method in _reachable_methods(cls):
        if method.excerpt.body:
            editor = _CallEditor(method, numbers)
            editor.visit(method.definition)
            problem = method.problem() if editor.calls else ""
            calls = [replace(call, problem=problem or call.problem) for call in editor.calls]
        else:
            calls = list(_suspects(method, numbers))
        if calls:
            yield method, calls


def _suspects(method: _Method, numbers: dict[str, int]) -> Iterator[Call]:
    """What may be activation calls in a method without source: names in its code that an activation function has."""
    by_name = {function.__name__: target for function, target in _EVERY_TARGET.functions.items()}  # type: ignore[attr-defined]
    code = method.function.__code__
    problem = f"the source of {method.name} is not available"
    for name in code.co_names:
        if name in by_name:
            function = by_name[name].name
            yield Call(_attribute(function, numbers), function, "function", code, code.co_firstlineno, problem=problem)


def _attribute(function: str, numbers: dict[str, int]) -> str:
    """The name of the next expansion of this function, which is counted."""
    number = numbers.get(function, 0)
    numbers[function] = number + 1
    return f"{function}_expansion_{number}"


def _reachable_methods(cls: type) -> Iterator[_Method]:
    """`forward`, and each plain method that one of these names through `self` or `super()`.

    PyTorch's own classes have none. A method that only `super()` reaches cannot be overridden in a subclass: it is
    listed, for its calls to be reported.
    """
    waiting: list[tuple[str, type | None]] = [("forward", None)]
    seen = set(waiting)
    while waiting:
        name, below = waiting.pop(0)
        bases = cls.__mro__[cls.__mro__.index(below) + 1 :] if below else cls.__mro__
        base = next((base for base in bases if name in base.__dict__), object)
        function = base.__dict__.get(name)
        if not isinstance(function, types.FunctionType) or (function.__module__ or "").split(".")[0] == "torch":
            continue
        method = _Method(name, function, inherited=below is not None)
        yield method
        for node in ast.walk(method.definition):
            if isinstance(node, ast.Attribute):
                by_super = isinstance(node.value, ast.Call) and method.is_super(node.value)
                reached = (node.attr, base if by_super else None)
                if (by_super or method.is_self(node.value)) and reached not in seen:
                    seen.add(reached)
                    waiting.append(reached)


class _Method:
    """A method as its source: the syntax tree of its definition, what its names mean, and how to compile it anew.

    The tree is compiled inside an excerpt of its file, the module's imports and the one statement that holds the
    definition, which gives private names, closures and the compiler's choices the context that they had.
    """

    def __init__(self, name: str, function: types.FunctionType, *, inherited: bool) -> None:
        self.name = name
        self.inherited = inherited
        self.outer = function
        self.function: types.FunctionType = inspect.unwrap(function)
        self.cells = dict(zip(self.function.__code__.co_freevars, self.function.__closure__ or (), strict=True))
        self.excerpt, self.definition = _excerpt(self.function.__code__)
        arguments = (*self.definition.args.posonlyargs, *self.definition.args.args)
        self.self_name = arguments[0].arg if arguments else ""
        inside = list(ast.walk(self.definition))
        self._locals = {
            *(node.arg for node in inside if isinstance(node, ast.arg)),
            *(node.id for node in inside if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)),
            *(
                (alias.asname or alias.name).split(".")[0]
                for node in inside
                if isinstance(node, ast.Import | ast.ImportFrom)
                for alias in node.names
            ),
        }

    def is_self(self, node: ast.AST) -> bool:
        return isinstance(node, ast.Name) and bool(self.self_name) and node.id == self.self_name

    def is_super(self, node: ast.Call) -> bool:
        return isinstance(node.func, ast.Name) and node.func.id == "super"

    def resolve(self, node: ast.expr) -> object:
        """The object that a dotted name stands for, as far as it is fixed: modules, classes and their attributes."""
        if isinstance(node, ast.Name):
            if node.id in self._locals:
                return _UNRESOLVED
            if node.id in self.cells:
                return _contents(self.cells[node.id])
            return self.function.__globals__.get(node.id, _UNRESOLVED)
        if isinstance(node, ast.Attribute):
            base = self.resolve(node.value)
            if isinstance(base, types.ModuleType | type):
                return getattr(base, node.attr, _UNRESOLVED)
        return _UNRESOLVED

    def problem(self) -> str:
        """Why the method cannot be compiled anew; empty where it can."""
        if self.inherited:
            return f"{self.name} is called through super()"
        if not self.self_name:
            return f"{self.name} takes no self"
        compiled, running = self._compile(self.excerpt), self.function.__code__
        for part in ("co_code", "co_names", "co_varnames", "co_freevars"):
            if compiled is None or getattr(compiled, part) != getattr(running, part):
                return f"the source of {self.name} is not the code that runs"
        try:
            self._rewrap(self.outer, self.function)
        except OrthoFxError as error:
            return str(error)
        return ""

    def rebuild(self, calls: list[Call], chosen: frozenset[str]) -> types.FunctionType:
        """The method with the chosen ones of its calls replaced: same globals, closure, defaults and wrappers."""
        numbers: dict[str, int] = {}
        for call in reversed(calls):
            numbers[call.function] = int(call.attribute.rpartition("_")[2])
        excerpt = copy.deepcopy(self.excerpt)
        definition = _definition(excerpt, self.function.__code__)
        assert definition is not None
        editor = _CallEditor(self, numbers, chosen)
        definition.body = [editor.visit(statement) for statement in definition.body]
        code = self._compile(ast.fix_missing_locations(excerpt))
        assert code is not None
        closure = tuple(self.cells[name] for name in code.co_freevars)
        new = types.FunctionType(code, self.function.__globals__, self.function.__name__, None, closure)
        _copy_metadata(self.function, new)
        return self._rewrap(self.outer, new)

    def _compile(self, excerpt: ast.Module) -> types.CodeType | None:
        running = self.function.__code__
        waiting = [compile(excerpt, running.co_filename, "exec", dont_inherit=True)]
        while waiting:
            code = waiting.pop()
            if code.co_name == running.co_name and code.co_firstlineno == running.co_firstlineno:
                return code
            waiting += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        return None

    def _rewrap(self, wrapper: types.FunctionType, new: types.FunctionType) -> types.FunctionType:
        """`wrapper`, copied with `new` in the place of the function at the end of its chain of `__wrapped__`."""
        if wrapper is self.function:
            return new
        wrapped = wrapper.__wrapped__  # type: ignore[attr-defined]
        inner = self._rewrap(wrapped, new)
        cells = wrapper.__closure__ or ()
        if not any(_contents(cell) is wrapped for cell in cells):
            raise OrthoFxError(f"{self.name} is wrapped by a decorator that does not close over it")
        closure = tuple(types.CellType(inner) if _contents(cell) is wrapped else cell for cell in cells)
        copied = types.FunctionType(wrapper.__code__, wrapper.__globals__, wrapper.__name__, None, closure)
        _copy_metadata(wrapper, copied)
        copied.__wrapped__ = inner  # type: ignore[attr-defined]
        return copied


def _excerpt(code: types.CodeType) -> tuple[ast.Module, Any]:
    """The imports of the code's file with the top-level statement that defines it, and the definition in there.

    Without a source that holds it, an empty definition in an empty module.
    """
    try:
        tree = ast.parse("".join(inspect.findsource(code)[0]))
    except (OSError, SyntaxError):
        tree = ast.Module(body=[], type_ignores=[])
    scopes = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    for statement in tree.body:
        definition = _definition(statement, code)
        if definition is not None:
            # The compiler treats names that the module imports differently from others.
            outside = [other for other in tree.body if other is not statement and not isinstance(other, scopes)]
            imports = [n for other in outside for n in ast.walk(other) if isinstance(n, ast.Import | ast.ImportFrom)]
            return ast.Module(body=[*imports, statement], type_ignores=[]), definition
    empty = ast.parse("def missing(self): pass").body[0]
    return ast.Module(body=[], type_ignores=[]), empty


def _definition(tree: ast.AST, code: types.CodeType) -> Any:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == code.co_name:
            first = node.decorator_list[0].lineno if node.decorator_list else node.lineno
            if first == code.co_firstlineno:
                return node
    return None


class _CallEditor(ast.NodeTransformer):
    """Lists the activation calls of a method in the order of its text, and replaces those that are chosen."""

    def __init__(self, method: _Method, numbers: dict[str, int], chosen: frozenset[str] = frozenset()) -> None:
        self.method = method
        self.numbers = numbers
        self.chosen = chosen
        self.calls: list[Call] = []
        self._discarded: set[ast.expr] = set()
        self._evaluated = 0

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        self._discarded.add(node.value)
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        matched = self._match(node)
        if matched is None:
            return self.generic_visit(node)
        target, kind, argument, in_place, reference = matched
        problem = ""
        if argument is None:
            problem = "its input is not a plain argument"
        elif in_place and node in self._discarded and not isinstance(argument, ast.Name):
            problem = "it changes a tensor in place that has no name of its own"
        call = Call(
            attribute=_attribute(target.name, self.numbers),
            function=target.name,
            kind=kind,
            code=self.method.function.__code__,
            line=node.lineno,
            reference=reference,
            problem=problem,
        )
        index = len(self.calls)
        self.calls.append(call)
        edited = self._edit(node, call, argument, in_place)
        # Python evaluates the calls inside the arguments first, and those have been visited by now.
        self.calls[index] = replace(call, order=self._evaluated)
        self._evaluated += 1
        return edited

    def _edit(self, node: ast.Call, call: Call, argument: ast.expr | None, in_place: bool) -> ast.AST:
        if call.attribute not in self.chosen or argument is None:
            return self.generic_visit(node)
        expansion = ast.Attribute(ast.Name(self.method.self_name, ast.Load()), call.attribute, ast.Load())
        replaced: ast.expr = ast.Call(expansion, [self.visit(argument)], [])
        if in_place and isinstance(argument, ast.Name):
            # The name held the changed tensor afterwards, so it has to hold the expansion's output.
            replaced = ast.NamedExpr(ast.Name(argument.id, ast.Store()), replaced)
        return ast.copy_location(replaced, node)

    def _match(self, node: ast.Call) -> tuple[Target, str, ast.expr | None, bool, Reference | None] | None:
        """The target, the kind of call, its input (None where that is not one plain expression), if it is in place, and
        the scalar function."""
        function = self.method.resolve(node.func)
        target = _EVERY_TARGET.of_function(function) if function is not _UNRESOLVED else None
        if target is not None:
            in_place = function in _EVERY_TARGET.in_place or any(_may_be_in_place(k) for k in node.keywords)
            return target, "function", _first_argument(node), in_place, _reference(target, node.args[1:], node.keywords)
        if isinstance(node.func, ast.Call):
            built = self.method.resolve(node.func.func)
            target = _EVERY_TARGET.modules.get(built) if isinstance(built, type) else None
            if target is not None:
                in_place = any(_may_be_in_place(keyword) for keyword in node.func.keywords)
                reference = _reference(target, node.func.args, node.func.keywords)
                return target, "built in forward", _first_argument(node), in_place, reference
        if isinstance(node.func, ast.Attribute) and not node.args and not node.keywords:
            target = _EVERY_TARGET.methods.get(node.func.attr)
            receiver = node.func.value
            fixed = self.method.resolve(receiver) is not _UNRESOLVED
            if target is not None and not fixed and not self.method.is_self(receiver):
                return target, "method", receiver, node.func.attr.endswith("_"), target.reference()
        return None


def _copy_metadata(source: types.FunctionType, target: types.FunctionType) -> None:
    target.__defaults__ = source.__defaults__
    target.__kwdefaults__ = source.__kwdefaults__
    target.__annotations__ = source.__annotations__
    target.__doc__ = source.__doc__
    target.__qualname__ = source.__qualname__
    target.__module__ = source.__module__
    target.__dict__.update(source.__dict__)


def _contents(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # an empty cell
        return _UNRESOLVED


def _first_argument(node: ast.Call) -> ast.expr | None:
    if node.args:
        return None if isinstance(node.args[0], ast.Starred) else node.args[0]
    return next((keyword.value for keyword in node.keywords if keyword.arg == "input"), None)


def _reference(target: Target, values: list[ast.expr], named: list[ast.keyword]) -> Reference | None:
    """The scalar function of a call with these further arguments, if they are written as constants."""
    try:
        constants = [ast.literal_eval(value) for value in values[: len(target.settings)]]
        settings = [keyword for keyword in named if keyword.arg is None or keyword.arg in target.settings]
        return target.reference(constants, {str(k.arg): ast.literal_eval(k.value) for k in settings})
    except ValueError:
        return None


def _may_be_in_place(keyword: ast.keyword) -> bool:
    return keyword.arg == "inplace" and not (isinstance(keyword.value, ast.Constant) and not keyword.value.value)
