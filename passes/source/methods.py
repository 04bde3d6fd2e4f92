"""The source of a function: the syntax tree of its definition, the meaning of the names in it, and its recompilation.

The tree is compiled inside an excerpt of its file: the module's imports, and the one statement that holds the
definition. So private names, closures and the compiler's choices have their original context. Decorators are not run
again: each wrapper is copied, and closes over the new function instead of the old one.
"""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

from torch import nn

from ortho_fx.errors import OrthoFxError

UNRESOLVED = object()
Scalar = bool | int | float | str | None
_OWNER = "_ortho_fx_owner"


class Method:
    """A method of a module's class, or a function that such a method calls by its name (a helper).

    Args:
        name: the name in the class.
        function: the function that runs, with its wrappers.
        constants: known plain values by their dotted names, such as `self.alpha` or a helper's parameter.
        cls: the class, to look up attributes of `self` that are class attributes; None for a helper.
        unreachable: why a subclass cannot override the method; empty if it can.

    `asked` collects the dotted names of `self` that a caller asked for as constants, known or unknown.
    """

    def __init__(
        self,
        name: str,
        function: types.FunctionType,
        constants: Mapping[str, Scalar],
        *,
        cls: type | None,
        unreachable: str = "",
    ) -> None:
        self.name, self.outer, self.cls, self.unreachable = name, function, cls, unreachable
        self.asked: set[str] = set()
        self.function: types.FunctionType = inspect.unwrap(function)
        self.cells = dict(zip(self.function.__code__.co_freevars, self.function.__closure__ or (), strict=True))
        self.excerpt, self.definition = _excerpt(self.function.__code__)
        arguments = (*self.definition.args.posonlyargs, *self.definition.args.args)
        self.self_name = _OWNER if cls is None else arguments[0].arg if arguments else ""
        inside = list(ast.walk(self.definition))
        stored = [node.id for node in inside if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)]
        self.constants = {dotted: value for dotted, value in constants.items() if dotted not in stored}
        self._locals = {
            *(node.arg for node in inside if isinstance(node, ast.arg)),
            *stored,
            *(
                (alias.asname or alias.name).split(".")[0]
                for node in inside
                if isinstance(node, ast.Import | ast.ImportFrom)
                for alias in node.names
            ),
        }
        parameters = {node.arg for node in inside if isinstance(node, ast.arg)}
        # A local name with a single assignment means the assigned value: `act = nn.GELU()`.
        self._assigned = {
            node.targets[0].id: node.value
            for node in inside
            if isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and stored.count(node.targets[0].id) == 1
            and node.targets[0].id not in parameters
        }

    def is_assigned(self, name: str) -> bool:
        """Whether a local name has a single assignment, and so means the assigned value."""
        return name in self._assigned

    @property
    def available(self) -> bool:
        """Whether the source is available."""
        return bool(self.excerpt.body)

    def is_self(self, node: ast.AST) -> bool:
        return isinstance(node, ast.Name) and bool(self.self_name) and node.id == self.self_name

    def is_super(self, node: ast.Call) -> bool:
        return isinstance(node.func, ast.Name) and node.func.id == "super"

    def resolve(self, node: ast.expr) -> object:
        """The object that a dotted name means, if that is fixed: a module, a class, or one of their attributes."""
        if isinstance(node, ast.Name):
            if node.id in self._assigned:
                return self.called(self._assigned[node.id])
            if node.id in self._locals:
                return UNRESOLVED
            if node.id in self.cells:
                return _contents(self.cells[node.id])
            return self.function.__globals__.get(node.id, UNRESOLVED)
        if isinstance(node, ast.Attribute):
            if self.is_self(node.value) and self.cls is not None:
                return _unbound(self.cls, node.attr)
            base = self.resolve(node.value)
            if isinstance(base, types.ModuleType | type):
                return getattr(base, node.attr, UNRESOLVED)
        return UNRESOLVED

    def constant(self, node: ast.expr) -> object:
        """The plain value that an expression always has; UNRESOLVED if it is not known."""
        if isinstance(node, ast.Constant):
            return node.value if isinstance(node.value, Scalar) else UNRESOLVED
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            value = self.constant(node.operand)
            return -value if isinstance(value, int | float) else UNRESOLVED
        dotted = self.dotted(node)
        if dotted is not None:
            if dotted.startswith("self."):
                self.asked.add(dotted)
            if dotted in self.constants:
                return self.constants[dotted]
        if isinstance(node, ast.Name) and node.id in self._assigned:
            return self.constant(self._assigned[node.id])
        if isinstance(node, ast.Name | ast.Attribute):
            value = self.resolve(node)
            return value if isinstance(value, bool | int | float | str) else UNRESOLVED
        return UNRESOLVED

    def dotted(self, node: ast.expr) -> str | None:
        """`self.a.b` for an attribute of self (under any name for self), a constant parameter's name, or None."""
        if isinstance(node, ast.Name):
            return node.id if node.id in self.constants else None
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        return ".".join(["self", *reversed(parts)]) if parts and self.is_self(node) else None

    def called(self, node: ast.expr) -> object:
        """The object that is called, if it is fixed; `node` is the expression before the parentheses.

        Besides a name, the expression may be `nn.GELU()` or `get_activation("gelu")` (a class or a function that makes
        activations, called with constants), `ACT2FN["gelu"]` (a map with a constant key), or `getattr(F, "gelu")`.
        """
        if isinstance(node, ast.Name | ast.Attribute):
            return self.resolve(node)
        if isinstance(node, ast.Subscript):
            table, key = self.resolve(node.value), self.constant(node.slice)
            if isinstance(table, Mapping) and key is not UNRESOLVED:
                try:
                    return table[key]
                except Exception:  # a map may build its items
                    return UNRESOLVED
        if isinstance(node, ast.Call) and is_getattr(node):
            base, name = self.resolve(node.args[0]), self.constant(node.args[1])
            return (
                getattr(base, name, UNRESOLVED)
                if isinstance(base, types.ModuleType) and isinstance(name, str)
                else UNRESOLVED
            )
        if isinstance(node, ast.Call):
            maker = self.called(node.func)
            values = [self.constant(value) for value in node.args]
            named = {str(keyword.arg): self.constant(keyword.value) for keyword in node.keywords}
            if _makes_activations(maker) and UNRESOLVED not in values and UNRESOLVED not in named.values():
                try:
                    return maker(*values, **named)
                except Exception:
                    return UNRESOLVED
        return UNRESOLVED

    def problem(self) -> str:
        """Why the function cannot be recompiled; empty if it can."""
        if self.unreachable:
            return self.unreachable
        if not self.available:
            return f"the source of {self.name} is not available"
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

    def rebuild(self, edit: Callable[[ast.stmt], ast.stmt]) -> types.FunctionType:
        """A new function with edited body statements, and the same globals, closure, defaults and wrappers.

        A helper gets the module as an additional first argument, so that its new code can reach the expansions.
        """
        excerpt = copy.deepcopy(self.excerpt)
        definition = _definition(excerpt, self.function.__code__)
        assert definition is not None
        definition.body = [edit(statement) for statement in definition.body]
        if self.cls is None:
            # The new argument comes first, so before positional-only arguments if there are any.
            first = definition.args.posonlyargs or definition.args.args
            first.insert(0, ast.arg(_OWNER))
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
        """Copies `wrapper`, with `new` instead of the function at the end of its chain of `__wrapped__`."""
        if wrapper is self.function:
            return new
        wrapped = wrapper.__wrapped__  # type: ignore[attr-defined]
        inner = self._rewrap(wrapped, new)
        cells = wrapper.__closure__ or ()
        if not any(_contents(cell) is wrapped for cell in cells):
            raise OrthoFxError(f"{self.name} is wrapped by a decorator that does not close over it")
        if self.cls is None and not wrapper.__code__.co_flags & inspect.CO_VARARGS:
            raise OrthoFxError(f"{self.name} is wrapped by a decorator with arguments of its own")
        closure = tuple(types.CellType(inner) if _contents(cell) is wrapped else cell for cell in cells)
        copied = types.FunctionType(wrapper.__code__, wrapper.__globals__, wrapper.__name__, None, closure)
        _copy_metadata(wrapper, copied)
        copied.__wrapped__ = inner  # type: ignore[attr-defined]
        return copied


def is_getattr(node: ast.expr) -> bool:
    """Whether an expression is `getattr(x, name)`."""
    called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr"
    return called and isinstance(node, ast.Call) and len(node.args) == 2 and not node.keywords


def _unbound(cls: type, name: str) -> object:
    """A class attribute that is called without self: a static method, a module, or one of PyTorch's own functions."""
    value = inspect.getattr_static(cls, name, UNRESOLVED)
    if isinstance(value, staticmethod):
        return value.__func__
    unbound = isinstance(value, (types.BuiltinFunctionType, functools.partial, nn.Module, type))
    return value if unbound else UNRESOLVED


def _makes_activations(maker: object) -> TypeGuard[Callable[..., object]]:
    """Whether an object makes modules and is safe to call: a module class, or a function like get_activation."""
    if isinstance(maker, type):
        return issubclass(maker, nn.Module)
    return isinstance(maker, types.FunctionType) and "act" in maker.__name__.lower()


@functools.lru_cache(maxsize=256)
def _parsed(file: str, source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except SyntaxError:
        return ast.Module(body=[], type_ignores=[])


def _excerpt(code: types.CodeType) -> tuple[ast.Module, Any]:
    """The imports of the code's file with the top-level statement that defines the code, and the definition itself.

    If no source holds the code, the result is an empty definition in an empty module.
    """
    try:
        tree = _parsed(code.co_filename, "".join(inspect.findsource(code)[0]))
    except OSError:
        tree = ast.Module(body=[], type_ignores=[])
    scopes = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    for statement in tree.body:
        if not statement.lineno <= code.co_firstlineno <= (statement.end_lineno or 0) and not (
            isinstance(statement, scopes) and statement.decorator_list
        ):
            continue
        definition = _definition(statement, code)
        if definition is not None:
            # The compiler treats names that the module imports differently, so its imports are included.
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
        return UNRESOLVED
