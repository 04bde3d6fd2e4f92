"""Finds activation calls in the source of a module's own methods, and makes subclasses that call expansions instead.

A module may call `F.gelu(x)`, `x.relu()`, `ACT2FN["silu"](x)` or `x * torch.sigmoid(1.702 * x)` in its forward. In the
method's syntax tree, `self.<expansion>(x)` replaces that call. The edited methods are compiled into a subclass, which
becomes the class of the module instance. The rest of the method does not change. Unlike tracing, this keeps branches on
`self.training`, optional arguments and loops, and needs no example input. Calls inside child modules are never touched,
and Dynamo traces the result like any other code.

A function outside of the class that a method calls by its name is read in the same way. If it holds an activation, it
becomes a method of the subclass. Some methods cannot be rebuilt with certainty: no source, source that differs from the
running code, or an unknown kind of wrapper. Their calls are reported with the reason and left.
"""

from __future__ import annotations

import ast
import copyreg
import functools
import inspect
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from ortho_fx.errors import OrthoFxError
from ortho_fx.passes.source.editor import Call, CallEditor
from ortho_fx.passes.source.methods import UNRESOLVED, Method, Scalar
from ortho_fx.passes.vocabulary.elementwise import bends
from ortho_fx.passes.vocabulary.expansions import Expansion
from ortho_fx.passes.vocabulary.recognise import recognise
from ortho_fx.passes.vocabulary.targets import EVERY_TARGET, cached

_SOURCE = "_ortho_fx_source"


@dataclass(frozen=True)
class Source:
    """The code that a module runs: its class, and the attribute values that decide which activations the code calls.

    Attributes:
        cls: the original class.
        constants: plain values of attributes that choose an activation, such as `self.config.hidden_act`.
        split: children for which each call in the source is a separate site.
        replaced: the replaced calls, by the names of their expansions.
    """

    cls: type
    constants: frozenset[tuple[str, Scalar]] = frozenset()
    split: frozenset[str] = frozenset()
    replaced: frozenset[str] = frozenset()


def source_of(module: nn.Module, split: frozenset[str] = frozenset()) -> Source:
    """The source of a module, rewritten or not."""
    cls = _underlying(module)
    known = cls.__dict__.get(_SOURCE)
    if known is not None:
        return replace(known, split=known.split | split)
    asked = _analyse(Source(cls, split=split)).asked
    values = ((name, _value(module, name)) for name in asked)
    # Plain values only: a source is hashed, to look up its rewritten class.
    constants = frozenset((name, value) for name, value in values if isinstance(value, Scalar))
    source = Source(cls, constants, split)
    used = _analyse(source).used
    return replace(source, constants=frozenset((name, value) for name, value in constants if name in used))


def set_class(module: nn.Module, cls: type) -> None:
    """Replaces the class from which the module's methods come."""
    module.__class__ = _with_base(type(module), _underlying(module), cls)


# Those that leave children alone.
_HARMLESS = (nn.Module.__setstate__, nn.TransformerEncoderLayer.__setstate__)


def keep_in_copies(owner: nn.Module) -> None:
    """Has copies and pickles of a module keep the expansions that are its children.

    A `__setstate__` of the class' own may look for an activation among the attributes, find none since a child is no
    attribute, and put the old one there, which then hides the child. So the module gets a subclass of its class.
    """
    cls = type(owner)
    plain = cls.__reduce_ex__ is object.__reduce_ex__ and cls.__reduce__ is object.__reduce__
    if plain and cls.__setstate__ not in _HARMLESS:
        set_class(owner, rewrite_class(source_of(owner)))


def set_class_for_children(owner: nn.Module) -> None:
    """Puts the written class back where neither calls are replaced nor expansions left."""
    source = source_of(owner)
    holds = any(isinstance(child, Expansion) for child in owner._modules.values())
    if not source.replaced and not holds and _SOURCE in _underlying(owner).__dict__:
        set_class(owner, source.cls)


def _underlying(module: nn.Module) -> type:
    """The original or rewritten class of a module, without the subclasses that parametrize and FSDP make of it."""
    bases = [cls for cls in type(module).__mro__ if issubclass(cls, nn.Module)]
    written = [cls for cls in bases if _SOURCE in cls.__dict__] or [cls for cls in bases if not _is_pytorchs(cls)]
    return written[0] if written else type(module)


def _is_pytorchs(cls: type) -> bool:
    return cls.__module__.split(".")[0] == "torch"


def _with_base(cls: type, old: type, new: type) -> type:
    """The class with `new` instead of `old` among its bases; `new` if the class is `old` itself."""
    if old not in cls.__mro__ or cls is old:
        return new if cls is old else cls
    bases = tuple(_with_base(base, old, new) for base in cls.__bases__)
    members = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return types.new_class(cls.__name__, bases, {}, lambda body: body.update(members))


def _value(module: nn.Module, dotted: str) -> object:
    value: Any = module
    for name in dotted.split(".")[1:]:
        try:
            value = vars(value)[name] if isinstance(value, nn.Module) and name in vars(value) else getattr(value, name)
        except Exception:  # a property may raise anything
            return UNRESOLVED
    return value


def find_calls(source: Source) -> tuple[Call, ...]:
    """Every activation call in `forward`, in the methods that it calls on `self`, and in the functions that these call.

    Gates are included.
    """
    return _analyse(source).calls


@functools.lru_cache(maxsize=4096)
def rewrite_class(source: Source) -> type:
    """A subclass of `source.cls` that calls `self.<attribute>` instead of each replaced activation call."""
    cls, analysis = source.cls, _analyse(replace(source, replaced=frozenset()))
    known = {call.attribute for call in analysis.calls}
    if not source.replaced <= known:
        missing = ", ".join(sorted(source.replaced - known))
        raise OrthoFxError(f"the source of {cls.__qualname__} has no activation call {missing}; has it changed?")
    # Helpers that hold a replaced call, or that call such a helper.
    helpers: dict[types.FunctionType, str] = {}
    for method, calls in reversed(analysis.methods):
        chosen = [call for call in calls if call.attribute in source.replaced]
        for call in chosen:
            if call.problem:
                raise OrthoFxError(f"{call.attribute} of {cls.__qualname__} cannot be replaced: {call.problem}")
        if method.cls is None and (chosen or any(h in helpers for h in analysis.helpers[method.outer])):
            helpers[method.outer] = f"_{method.name}_with_expansions"
    namespace: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": _reduce,
        "__setstate__": _set_state,
        _SOURCE: source,
    }
    for method, calls in analysis.methods:
        edits = any(call.attribute in source.replaced for call in calls)
        if edits or any(helper in helpers for helper in analysis.helpers[method.outer]):
            numbers: dict[str, int] = {}
            for call in reversed(calls):
                numbers[call.function] = int(call.attribute.rpartition("_")[2]) - 1
            editor = CallEditor(method, numbers, source.split, source.replaced, helpers)
            namespace[helpers.get(method.outer, method.name)] = method.rebuild(editor.visit)
    return types.new_class(cls.__name__, (cls,), {}, lambda body: body.update(namespace))


def _reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
    # A rewritten class has no importable name, so a pickle names the original class and the replaced calls.
    source: Source = type(self).__dict__[_SOURCE]
    reduced = super(type(self), self).__reduce_ex__(max(protocol, 2))
    if not isinstance(reduced, tuple) or reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
        raise OrthoFxError(
            f"{source.cls.__qualname__} has a pickling of its own, so its rewritten form cannot be copied"
        )
    return (_restore, (source,), *reduced[2:])


def _set_state(self: nn.Module, state: dict[str, Any]) -> None:
    cls: type = next(cls for cls in type(self).__mro__ if _SOURCE in cls.__dict__)
    ours = {key: child for key, child in state["_modules"].items() if isinstance(child, Expansion)}
    super(cls, self).__setstate__(state)  # type: ignore[arg-type]
    for key, expansion in ours.items():
        vars(self).pop(key, None)
        self._modules[key] = expansion


def _restore(source: Source) -> nn.Module:
    return nn.Module.__new__(rewrite_class(source))


@dataclass
class _Analysis:
    """The methods and helpers of a source, with the calls of each, in the order of the search."""

    methods: list[tuple[Method, list[Call]]] = field(default_factory=list)
    helpers: dict[types.FunctionType, list[types.FunctionType]] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)
    used: set[str] = field(default_factory=set)

    @property
    def calls(self) -> tuple[Call, ...]:
        return tuple(call for _, calls in self.methods for call in calls)


@cached(maxsize=4096)
def _analyse(source: Source) -> _Analysis:
    analysis, numbers = _Analysis(), dict[str, int]()
    constants = dict(source.constants)
    waiting: list[tuple[str, type | None]] = [("forward", None)]
    seen = set(waiting)
    while waiting:
        name, below = waiting.pop(0)
        bases = source.cls.__mro__[source.cls.__mro__.index(below) + 1 :] if below else source.cls.__mro__
        base = next((base for base in bases if name in base.__dict__), object)
        function = base.__dict__.get(name)
        if not isinstance(function, types.FunctionType) or _is_torchs(function):
            continue
        # A subclass cannot override a method that only super() reaches. Its calls are still read, to report them.
        unreachable = "" if below is None else f"{name} is called through super()"
        method = Method(name, function, constants, cls=source.cls, unreachable=unreachable)
        _read(analysis, method, numbers, source.split)
        for node in ast.walk(method.definition):
            if isinstance(node, ast.Attribute):
                by_super = isinstance(node.value, ast.Call) and method.is_super(node.value)
                reached = (node.attr, base if by_super else None)
                if (by_super or method.is_self(node.value)) and reached not in seen:
                    seen.add(reached)
                    waiting.append(reached)
    return analysis


def _read(analysis: _Analysis, method: Method, numbers: dict[str, int], split: frozenset[str]) -> None:
    """Adds the calls of a method, and then those of the helpers that it calls."""
    analysis.helpers[method.outer] = []
    calls = list(_calls_of(method, numbers, split, analysis))
    analysis.methods.append((method, calls))
    method.asked.clear()
    helpers = _helpers_of(method)
    passed = set(method.asked)
    analysis.asked |= passed
    for helper, constants in helpers.items():
        analysis.helpers[method.outer].append(helper)
        if helper not in analysis.helpers:
            inner = Method(helper.__name__, helper, constants, cls=None, unreachable=method.unreachable)
            _read(analysis, inner, numbers, frozenset())
        if any(calls for read, calls in analysis.methods if read.outer is helper):
            analysis.used |= passed


def _calls_of(method: Method, numbers: dict[str, int], split: frozenset[str], analysis: _Analysis) -> Iterator[Call]:
    if not method.available:
        yield from _suspects(method, numbers)
        return
    editor = CallEditor(method, numbers, split)
    for statement in method.definition.body:
        editor.visit(statement)
    analysis.asked |= method.asked
    problem = method.problem() if editor.found else ""
    for found in editor.found:
        analysis.used |= found.constants
        yield replace(found, problem=found.problem or problem)


def _suspects(method: Method, numbers: dict[str, int]) -> Iterator[Call]:
    """The calls in a method without source that may be activations, judged by the names in its code object."""
    by_name = {function.__name__: target for function, target in EVERY_TARGET.functions.items()}  # type: ignore[attr-defined]
    code = method.function.__code__
    for name in code.co_names:
        if name in by_name:
            function = by_name[name].name
            number = numbers[function] = numbers.get(function, -1) + 1
            attribute = f"{function}_expansion_{number}"
            problem = method.problem()
            yield Call(
                function,
                "function",
                code,
                None,
                None,
                problem=problem,
                attribute=attribute,
                line=code.co_firstlineno,
            )


def _helpers_of(method: Method) -> dict[types.FunctionType, Mapping[str, Scalar]]:
    """The functions that a method calls by name and that may hold activations, each with its constant arguments."""
    found: dict[types.FunctionType, dict[str, object]] = {}
    for node in ast.walk(method.definition) if method.available else ():
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name | ast.Attribute):
            continue
        helper = method.resolve(node.func)
        if not isinstance(helper, types.FunctionType) or recognise(helper) is not None or not may_activate(helper):
            continue
        given = _arguments(method, node, helper)
        earlier = found.setdefault(helper, given)
        found[helper] = {name: value for name, value in earlier.items() if given.get(name, UNRESOLVED) == value}
    return {
        helper: {name: value for name, value in given.items() if isinstance(value, Scalar)}
        for helper, given in found.items()
    }


def _arguments(method: Method, call: ast.Call, helper: types.FunctionType) -> dict[str, object]:
    """The known values of a helper's parameters in one call."""
    if any(isinstance(argument, ast.Starred) for argument in call.args):
        return {}
    function = inspect.unwrap(helper)
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    defaults = function.__defaults__ or ()
    given = {name: method.constant(value) for name, value in zip(names, call.args, strict=False)}
    given |= {keyword.arg: method.constant(keyword.value) for keyword in call.keywords if keyword.arg is not None}
    if any(keyword.arg is None for keyword in call.keywords):  # **kwargs may hold any other argument
        return given
    return (
        dict(zip(names[len(names) - len(defaults) :], defaults, strict=True)) | (function.__kwdefaults__ or {}) | given
    )


_TORCHS_OWN = ("torch", "numpy", "builtins", "typing", "functools", "math")


def _is_torchs(function: types.FunctionType) -> bool:
    return (function.__module__ or "").split(".")[0] in _TORCHS_OWN


@cached(maxsize=4096)
def may_activate(function: types.FunctionType, depth: int = 3) -> bool:
    """Whether a function from outside of PyTorch may call an activation, directly or indirectly, judged by names."""
    if _is_torchs(function) or depth == 0:
        return False
    inner = inspect.unwrap(function)
    for name in inner.__code__.co_names:
        value = inner.__globals__.get(name)
        known = EVERY_TARGET.of_function(value) is not None
        if known or bends(name) or isinstance(value, Mapping) or isinstance(value, nn.Module):
            return True
        if isinstance(value, types.FunctionType) and value is not function and may_activate(value, depth - 1):
            return True
    return False
