"""What the names in a piece of code stand for now, read without running any code of its author's.

Analyses of code are cached, and a name may mean something else the next time: a global is set anew, a function is
defined again. So a cache is keyed on the objects that the names stand for, `meaning`, and never on the code alone.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import functools
import inspect
import types
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Generic, TypeVar

from ortho_fx.passes.vocabulary.targets import PACKET, cached_elsewhere

UNRESOLVED: Any = object()
# Their code is run where a name has to be looked up in a lazy module, or a map has to build its item.
LIBRARIES = ("torch", "transformers", "timm")
# No function of these holds an activation of a model's, apart from those in the table of targets.
_PLAIN = ("torch", "numpy", "builtins", "typing", "functools", "math", "collections", "abc", "enum", "warnings")
_MOST_ITEMS = 256
_DEEPEST = 3


def root_of(thing: object) -> str:
    """The top package of a class or a function."""
    return (getattr(thing, "__module__", None) or "").split(".")[0]


def is_of_library(thing: object) -> bool:
    """Whether a class or a function comes from one of `LIBRARIES`."""
    return root_of(thing) in LIBRARIES


def is_plain(thing: object) -> bool:
    """Whether a class or a function is PyTorch's or of a package without activations."""
    return root_of(thing) in _PLAIN


def attribute(base: object, name: str) -> Any:
    """`base.name` of a module or a class; UNRESOLVED where there is none, or where only code of theirs could tell."""
    if isinstance(base, types.ModuleType):
        if name in vars(base):
            return vars(base)[name]
        return _asked(base, name) if vars(base).get("__name__", "").split(".")[0] == "torch" else UNRESOLVED
    if isinstance(base, PACKET):
        return _asked(base, name)
    if not isinstance(base, type):
        return UNRESOLVED
    value = inspect.getattr_static(base, name, UNRESOLVED)
    if isinstance(value, staticmethod):
        return value.__func__
    if isinstance(value, classmethod | types.BuiltinFunctionType | types.ClassMethodDescriptorType):
        return _asked(base, name)
    runs = hasattr(type(value), "__get__") and not isinstance(value, types.FunctionType | types.MethodDescriptorType)
    return UNRESOLVED if runs else value


def _asked(base: object, name: str) -> Any:
    try:
        return getattr(base, name, UNRESOLVED)
    except Exception:  # torch.classes raises a RuntimeError
        return UNRESOLVED


@functools.lru_cache(maxsize=16384)
def names_in(code: types.CodeType) -> tuple[str, ...]:
    """The names of globals and attributes that a function uses, inner functions included."""
    inner = (name for part in code.co_consts if isinstance(part, types.CodeType) for name in names_in(part))
    return tuple(dict.fromkeys((*code.co_names, *inner)))


def contents(cell: types.CellType) -> object:
    """What a closure's cell holds."""
    try:
        return cell.cell_contents
    except ValueError:  # an empty cell
        return UNRESOLVED


def unwrapped(function: types.FunctionType) -> types.FunctionType:
    """The function inside of its wrappers that keep it as `__wrapped__`; itself where there is none."""
    seen = set()
    inner: Any = function
    while isinstance(inner, types.FunctionType) and "__wrapped__" in vars(inner) and id(inner) not in seen:
        seen.add(id(inner))
        inner = vars(inner)["__wrapped__"]
    return inner if isinstance(inner, types.FunctionType) else function


class _Meaning:
    """Collects the identities of objects, and keeps these alive."""

    def __init__(self) -> None:
        self.key: list[Hashable] = []
        self.kept: list[object] = []
        self._seen: set[int] = set()

    def add(self, value: object) -> None:
        self.key.append(id(value))
        self.kept.append(value)

    def value(self, value: object, names: tuple[str, ...], depth: int) -> None:
        self.add(value)
        if isinstance(value, types.FunctionType):
            self.function(value, depth - 1)
        elif isinstance(value, types.ModuleType | type) and not is_plain_holder(value):
            held = vars(value)
            for name in names:
                if name in held:
                    self.add(held[name])
        elif type(value) in (dict, list, tuple, collections.OrderedDict) and len(value) <= _MOST_ITEMS:  # type: ignore[arg-type]
            for item in value.values() if isinstance(value, dict) else value:  # type: ignore[attr-defined]
                self.add(item)

    def function(self, function: types.FunctionType, depth: int) -> None:
        if id(function) in self._seen or depth < 0:
            return
        self._seen.add(id(function))
        self.add(function)
        self.add(function.__code__)
        inner = unwrapped(function)
        if inner is not function:
            self.function(inner, depth)
        if is_plain(function) and inner is function:
            return
        names = names_in(function.__code__)
        for name in names:
            if name in function.__globals__:
                self.value(function.__globals__[name], names, depth)
        for cell in function.__closure__ or ():
            self.value(contents(cell), names, depth)
        for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self.add(default)

    def cls(self, cls: type) -> None:
        for base in cls.__mro__:
            if is_plain(base):
                continue
            self.add(base)
            for value in vars(base).values():
                self.add(value)
                for function in functions_of(value):
                    self.function(function, _DEEPEST)


def is_plain_holder(holder: object) -> bool:
    """Whether the attributes of a module or a class are known not to change."""
    name = holder.__name__ if isinstance(holder, types.ModuleType) else getattr(holder, "__module__", "")
    return (name or "").split(".")[0] in _PLAIN


def functions_of(member: object) -> tuple[types.FunctionType, ...]:
    """The Python functions that a member of a class runs: itself, or that of a property or a class method."""
    if isinstance(member, types.FunctionType):
        return (member,)
    inside: tuple[object, ...] = ()
    if isinstance(member, property):
        inside = (member.fget,)
    elif isinstance(member, staticmethod | classmethod):
        inside = (member.__func__,)
    elif isinstance(member, functools.cached_property | functools.partialmethod):
        inside = (member.func,)
    return tuple(function for function in inside if isinstance(function, types.FunctionType))


def own_classes(cls: type) -> Iterator[type]:
    """The classes of an MRO that are no plain ones."""
    return (base for base in cls.__mro__ if not is_plain(base))


_Key = tuple[tuple[Hashable, ...], list[object]]
_look: contextvars.ContextVar[dict[object, _Key] | None] = contextvars.ContextVar("look", default=None)


@contextlib.contextmanager
def one_look() -> Iterator[None]:
    """Within it, what names mean is taken not to change: each function and each class is looked at once."""
    if _look.get() is not None:  # one look inside of another is the same
        yield
        return
    token = _look.set({})
    try:
        yield
    finally:
        _look.reset(token)


def meaning(thing: types.FunctionType | type) -> _Key:
    """A key that changes where a function's or a class' code, or what it names, does; and what has to live as long."""
    known = _look.get()
    if known is None:
        return _meaning(thing)
    if thing not in known:
        known[thing] = _meaning(thing)
    return known[thing]


def _meaning(thing: types.FunctionType | type) -> _Key:
    found = _Meaning()
    if isinstance(thing, type):
        found.cls(thing)
    else:
        found.function(thing, _DEEPEST)
    return tuple(found.key), found.kept


_Function = TypeVar("_Function", bound=Callable[..., Any])


class _ByMeaning(Generic[_Function]):
    """A function's results, kept by its arguments and by what the first one means."""

    def __init__(self, function: _Function, of: Callable[[Any], types.FunctionType | type], maxsize: int) -> None:
        functools.update_wrapper(self, function)
        self._function, self._of, self._maxsize = function, of, maxsize
        self._kept: collections.OrderedDict[Hashable, tuple[Any, object]] = collections.OrderedDict()

    def __call__(self, first: Any, *others: Any) -> Any:
        key, alive = meaning(self._of(first))
        full = (first, others, key)
        if full in self._kept:
            return self._kept[full][0]
        result = self._function(first, *others)
        self._kept[full] = (result, alive)
        if len(self._kept) > self._maxsize:
            self._kept.popitem(last=False)
        return result

    def cache_clear(self) -> None:
        self._kept.clear()


def cached_by_meaning(
    maxsize: int, of: Callable[[Any], types.FunctionType | type] = lambda first: first
) -> Callable[[_Function], _Function]:
    """As `cached`, for a function whose first argument is code: `of(first)` is the function or the class to look at."""

    def decorate(function: _Function) -> _Function:
        kept: Any = _ByMeaning(function, of, maxsize)
        cached_elsewhere(kept)
        return kept

    return decorate
