"""The source of a function: the syntax tree of its definition, the meaning of the names in it, and its recompilation.

The tree is compiled inside an excerpt of its file: the module's imports, and the one statement that holds the
definition. So private names, closures and the compiler's choices have their original context. Decorators are not run
again: each wrapper is copied, and closes over the new function instead of the old one.
"""

from __future__ import annotations

import ast
import copy
import functools
import importlib.util
import inspect
import re
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import torch
from torch import nn

from ortho_fx.errors import OrthoFxError
from ortho_fx.passes.source.scopes import Binding, scopes_of
from ortho_fx.passes.vocabulary.activates import activates
from ortho_fx.passes.vocabulary.meaning import UNRESOLVED, attribute, contents, is_of_library, unwrapped
from ortho_fx.passes.vocabulary.targets import EVERY_TARGET

Scalar = bool | int | float | str | None
_OWNER = "_ortho_fx_owner"
# get_activation, create_act_layer
_MAKER = re.compile(r"(?:^|_)act(?:ivation)?(?:_|$)")
# Makers that call makers are followed so far.
_DEEPEST = 4


class Method:
    """A method of a module's class, or a function that such a method calls by its name (a helper).

    Args:
        name: what the class calls it.
        function: what runs, wrappers included.
        constants: plain values that are known, by their dotted names: `self.alpha`, or a helper's parameter.
        cls: the class, for attributes of `self` that the class holds; None for a helper.
        unreachable: why a subclass cannot override it; empty where it can.
        depth: how many makers of activations lead here.

    `asked` collects the dotted names of `self` that a caller wanted as constants, known or not, and `held` the names of
    what was found on the class.
    """

    def __init__(
        self,
        name: str,
        function: types.FunctionType,
        constants: Mapping[str, Scalar],
        *,
        cls: type | None,
        unreachable: str = "",
        depth: int = 0,
    ) -> None:
        self.name, self.outer, self.cls, self.unreachable = name, function, cls, unreachable
        self.constants, self._depth = constants, depth
        self.asked: set[str] = set()
        self.held: set[str] = set()
        self.function: types.FunctionType = unwrapped(function)
        self.cells = dict(zip(self.function.__code__.co_freevars, self.function.__closure__ or (), strict=True))
        self.excerpt, self.definition = _excerpt(self.function.__code__)
        arguments = (*self.definition.args.posonlyargs, *self.definition.args.args)
        self.self_name = _OWNER if cls is None else arguments[0].arg if arguments else ""
        self.scopes = scopes_of(self.definition)
        self._resolving: set[ast.expr] = set()

    def is_assigned(self, name: ast.Name) -> bool:
        """Whether a name that is assigned here has no other value."""
        binding = self.scopes.only_binding(name)
        return binding is not None and binding.kind == "value"

    @property
    def available(self) -> bool:
        """Whether the source is available."""
        return bool(self.excerpt.body)

    def is_self(self, node: ast.AST) -> bool:
        """Whether a name is the module: the first argument, or a variable that is assigned that alone."""
        if self.cls is None or not isinstance(node, ast.Name) or not self.self_name:
            return False
        binding = self.scopes.only_binding(node)
        if binding is None:
            return False
        if binding.kind == "parameter":
            return node.id == self.self_name and self.scopes.binder(node) is self.scopes.top
        value = binding.value
        return isinstance(value, ast.Name) and value.id != node.id and self.is_self(value)

    def owner_problem(self, node: ast.AST) -> str:
        """Why the module cannot be reached by its name where a node is evaluated; empty where it can."""
        if self.cls is None:
            return ""
        if not self.self_name:
            return f"{self.name} takes no self by a name of its own"
        if len(self.scopes.top.bindings[self.self_name]) > 1:
            return f"{self.name} sets or deletes {self.self_name}"
        if self.scopes.binder_from(self.scopes.scope_of(node), self.self_name) is not self.scopes.top:
            return f"{self.self_name} is another variable where {self.name} calls it"
        return ""

    def is_super(self, node: ast.Call) -> bool:
        return isinstance(node.func, ast.Name) and node.func.id == "super"

    def resolve(self, node: ast.expr) -> Any:
        """The object that a dotted name stands for, as far as it is fixed: modules, classes and their attributes."""
        if isinstance(node, ast.Name):
            binding = self.scopes.only_binding(node)
            if binding is not None:
                return self._bound(binding)
            if self.scopes.binder(node) is not None or node.id in self.scopes.set_globals:
                return UNRESOLVED
            if node.id in self.cells:
                return contents(self.cells[node.id])
            return self.function.__globals__.get(node.id, UNRESOLVED)
        if isinstance(node, ast.Attribute):
            return self._attribute(node.value, node.attr)
        return UNRESOLVED

    def _attribute(self, base: ast.expr, name: str) -> Any:
        if self.is_self(base):
            assert self.cls is not None
            value = _unbound(self.cls, name)
            if value is not UNRESOLVED:
                self.held.add(name)
            return value
        return attribute(self.resolve(base), name)

    def _bound(self, binding: Binding) -> Any:
        """What a variable stands for that one statement sets."""
        if binding.kind == "import":
            return _imported(binding, self.function.__globals__)
        value = binding.value
        if value is None or value in self._resolving:
            return UNRESOLVED
        self._resolving.add(value)
        try:
            return self.called(value)
        finally:
            self._resolving.discard(value)

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
        if isinstance(node, ast.Name):
            binding = self.scopes.only_binding(node)
            if binding is not None and binding.value is not None and binding.value not in self._resolving:
                self._resolving.add(binding.value)
                try:
                    return self.constant(binding.value)
                finally:
                    self._resolving.discard(binding.value)
        if isinstance(node, ast.Name | ast.Attribute):
            value = self.resolve(node)
            return value if isinstance(value, bool | int | float | str) else UNRESOLVED
        return UNRESOLVED

    def dotted(self, node: ast.expr) -> str | None:
        """`self.a.b` for an attribute of self (under any name for self), a constant parameter's name, or None."""
        if isinstance(node, ast.Name):
            binding = self.scopes.only_binding(node)
            is_parameter = binding is not None and binding.kind == "parameter"
            own = is_parameter and self.scopes.binder(node) is self.scopes.top
            return node.id if own and node.id in self.constants else None
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        return ".".join(["self", *reversed(parts)]) if parts and self.is_self(node) else None

    def called(self, node: ast.expr) -> Any:
        """The object that an expression in the place of a function stands for, where that is fixed.

        Besides names: an item of a map or a list by a constant key, `getattr(F, "gelu")`, `partial(F.elu, alpha=0.5)`,
        and what a maker of activations makes of constants. PyTorch's activations and those of `LIBRARIES` are made, and
        so are the items of a map of theirs (ACT2FN); a maker from elsewhere is read, if it is one return statement.
        """
        if isinstance(node, ast.Name | ast.Attribute):
            return self.resolve(node)
        if isinstance(node, ast.Subscript):
            return _item(self.resolve(node.value), self.constant(node.slice))
        if isinstance(node, ast.Call) and is_getattr(node):
            name = self.constant(node.args[1])
            return self._attribute(node.args[0], name) if isinstance(name, str) else UNRESOLVED
        return self._made(node) if isinstance(node, ast.Call) else UNRESOLVED

    def _made(self, node: ast.Call) -> Any:
        maker = self.called(node.func)
        if maker is UNRESOLVED or any(isinstance(value, ast.Starred) for value in node.args):
            return UNRESOLVED
        if maker is functools.partial:
            inner = self.called(node.args[0]) if node.args else UNRESOLVED
            named = {str(k.arg): self.constant(k.value) for k in node.keywords}
            fixed = callable(inner) and len(node.args) == 1 and UNRESOLVED not in named.values()
            return functools.partial(inner, **named) if fixed else UNRESOLVED
        if isinstance(maker, types.FunctionType) and not is_of_library(maker):
            return self._returned(maker, node)
        values = [self.constant(value) for value in node.args]
        named = {str(keyword.arg): self.constant(keyword.value) for keyword in node.keywords}
        if not _makes_activations(maker) or UNRESOLVED in values or UNRESOLVED in named.values():
            return UNRESOLVED
        with torch.random.fork_rng(devices=[]):
            try:
                return maker(*values, **named)
            except Exception:
                return UNRESOLVED

    def _returned(self, maker: types.FunctionType, call: ast.Call) -> Any:
        """What a function returns that is one return statement, read with the arguments of this call."""
        if self._depth >= _DEEPEST or not activates(maker, made=True):
            return UNRESOLVED
        given = self.arguments(call, maker)
        constants = {name: value for name, value in given.items() if isinstance(value, Scalar)}
        inner = Method(maker.__name__, maker, constants, cls=None, depth=self._depth + 1)
        body = [one for one in inner.definition.body if not _is_docstring(one)]
        if inner.function is not maker or inner.problem() or len(body) != 1 or not isinstance(body[0], ast.Return):
            return UNRESOLVED
        return inner.called(body[0].value) if body[0].value is not None else UNRESOLVED

    def arguments(self, call: ast.Call, helper: types.FunctionType) -> dict[str, object]:
        """What is known of a helper's parameters in one call of it."""
        if any(isinstance(argument, ast.Starred) for argument in call.args):
            return {}
        function = unwrapped(helper)
        names = function.__code__.co_varnames[: function.__code__.co_argcount]
        defaults = function.__defaults__ or ()
        given = {name: self.constant(value) for name, value in zip(names, call.args, strict=False)}
        given |= {keyword.arg: self.constant(keyword.value) for keyword in call.keywords if keyword.arg is not None}
        if any(keyword.arg is None for keyword in call.keywords):  # **kwargs may hold any other
            return given
        known = dict(zip(names[len(names) - len(defaults) :], defaults, strict=True)) | (function.__kwdefaults__ or {})
        return known | given

    def problem(self) -> str:
        """Why the function cannot be recompiled; empty if it can."""
        if self.unreachable:
            return self.unreachable
        if not self.available:
            return f"the source of {self.name} is not available"
        if not self.self_name:
            return self.owner_problem(self.definition)
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
        original, self.scopes = self.scopes, scopes_of(definition)
        definition.body = [edit(statement) for statement in definition.body]
        self.scopes = original
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
        if not any(contents(cell) is wrapped for cell in cells):
            raise OrthoFxError(f"{self.name} is wrapped by a decorator that does not close over it")
        if self.cls is None and not wrapper.__code__.co_flags & inspect.CO_VARARGS:
            raise OrthoFxError(f"{self.name} is wrapped by a decorator with arguments of its own")
        closure = tuple(types.CellType(inner) if contents(cell) is wrapped else cell for cell in cells)
        copied = types.FunctionType(wrapper.__code__, wrapper.__globals__, wrapper.__name__, None, closure)
        _copy_metadata(wrapper, copied)
        copied.__wrapped__ = inner  # type: ignore[attr-defined]
        return copied


def is_getattr(node: ast.expr) -> bool:
    """Whether an expression is `getattr(x, name)`."""
    called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr"
    return called and isinstance(node, ast.Call) and len(node.args) in (2, 3) and not node.keywords


def _unbound(cls: type, name: str) -> Any:
    """What the class holds and calls without self: a static method, a module, or a function of PyTorch's own."""
    value = inspect.getattr_static(cls, name, UNRESOLVED)
    if isinstance(value, staticmethod):
        return value.__func__
    unbound = isinstance(value, (types.BuiltinFunctionType, functools.partial, nn.Module, type))
    return value if unbound else UNRESOLVED


def _imported(binding: Binding, names: Mapping[str, Any]) -> Any:
    """What an import inside of a function binds, if its module has been imported before."""
    statement, alias = binding.statement, binding.alias
    assert alias is not None
    if isinstance(statement, ast.ImportFrom):
        try:
            package = names.get("__package__") or ""
            full = importlib.util.resolve_name("." * statement.level + (statement.module or ""), package)
        except ImportError:
            return UNRESOLVED
        found = attribute(sys.modules.get(full), alias.name)
        return found if found is not UNRESOLVED else sys.modules.get(f"{full}.{alias.name}", UNRESOLVED)
    return sys.modules.get(alias.name if alias.asname else alias.name.partition(".")[0], UNRESOLVED)


def _item(table: Any, key: object) -> Any:
    """An item of a map or a sequence by a constant key, without running a `__getitem__` of somebody's."""
    if key is UNRESOLVED:
        return UNRESOLVED
    try:
        if isinstance(table, dict) and type(table).__getitem__ is dict.__getitem__:
            return dict.get(table, key, UNRESOLVED)
        if type(table) in (list, tuple) or (isinstance(table, Mapping) and is_of_library(type(table))):
            return table[key]
    except Exception:  # no such item, or one that cannot be built
        pass
    return UNRESOLVED


def _makes_activations(maker: Any) -> TypeGuard[Callable[..., object]]:
    """Whether it is made for activations and by PyTorch or one of `LIBRARIES`: nn.GELU, get_activation."""
    if isinstance(maker, type):
        known = maker in EVERY_TARGET.modules and maker is not nn.PReLU
        return known or (issubclass(maker, nn.Module) and is_of_library(maker) and activates(maker))
    return isinstance(maker, types.FunctionType) and is_of_library(maker) and bool(_MAKER.search(maker.__name__))


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


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
