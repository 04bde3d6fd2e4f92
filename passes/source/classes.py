"""Finds activation calls in the source of a module's own methods, and makes subclasses that call expansions instead.

A module may call `F.gelu(x)`, `x.relu()`, `ACT2FN["silu"](x)` or `x * torch.sigmoid(1.702 * x)` in its forward. In the
method's syntax tree, `self.<expansion>(x)` replaces that call. The edited methods are compiled into a subclass, which
becomes the class of the module instance. The rest of the method does not change. Unlike tracing, this keeps branches on
`self.training`, optional arguments and loops, and needs no example input. Calls inside child modules are never touched,
and Dynamo traces the result like any other code.

A function outside of the class that a method calls by its name is read in the same way, and becomes a method of the
subclass where it holds an activation. Where a method cannot be rebuilt for certain (no source, source that is not what
runs, an unknown kind of wrapper, a `self` that is another variable), its calls are reported with the reason and left.
"""

from __future__ import annotations

import abc
import copyreg
import functools
import inspect
import linecache
import types
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ortho_fx.errors import OrthoFxError
from ortho_fx.passes.source.analysis import Source, analyse
from ortho_fx.passes.source.editor import IN_PLACE, CallEditor
from ortho_fx.passes.source.methods import Scalar
from ortho_fx.passes.source.reader import Call
from ortho_fx.passes.vocabulary.expansions import Expansion
from ortho_fx.passes.vocabulary.guards import POSITIVE, guard_of
from ortho_fx.passes.vocabulary.meaning import UNRESOLVED, cached_by_meaning, own_classes

_SOURCE = "_ortho_fx_source"
# Metaclasses that do nothing of their author's when a class is made.
_METACLASSES = ("builtins", "abc", "typing", "typing_extensions")


def source_of(module: nn.Module, split: frozenset[str] = frozenset()) -> Source:
    """The source of a module, rewritten or not."""
    cls = _underlying(module)
    known = cls.__dict__.get(_SOURCE)
    if known is not None:
        return replace(known, split=known.split | split) if split else known
    plain = Source(cls, split=split)
    asked = analyse(plain).asked
    if not asked:
        return plain
    values = ((name, _value(module, name)) for name in asked)
    # Plain values only: a source is hashed, to look up its rewritten class.
    constants = frozenset((name, value) for name, value in values if isinstance(value, Scalar))
    source = Source(cls, constants, split)
    used = analyse(source).used
    return Source(cls, frozenset((name, value) for name, value in constants if name in used), split)


def set_class(module: nn.Module, cls: type) -> None:
    """Puts another class in the place of that which the module's methods come from."""
    # Past a __setattr__ of the module's own, which may refuse.
    object.__setattr__(module, "__class__", _with_base(type(module), _underlying(module), cls))


# Those that leave children alone.
_HARMLESS = (nn.Module.__setstate__, nn.TransformerEncoderLayer.__setstate__)


def keep_in_copies(owner: nn.Module) -> None:
    """Has copies and pickles of a module keep the expansions that are its children.

    A `__setstate__` of the class' own may look for an activation among the attributes, find none since a child is no
    attribute, and put the old one there, which then hides the child. So the module gets a subclass of its class.
    """
    cls = type(owner)
    plain = copies_by_state(owner) and cls.__reduce_ex__ is not _reduce
    if plain and cls.__setstate__ not in _HARMLESS:
        set_class(owner, rewrite_class(source_of(owner)))


def copies_by_state(module: nn.Module) -> bool:
    """Whether copies and pickles of a module are made first, and then get its attributes."""
    cls = type(module)
    return cls.__reduce_ex__ in (object.__reduce_ex__, _reduce) and cls.__reduce__ is object.__reduce__


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
    return _made(cls, bases, members)


def _made(cls: type, bases: tuple[type, ...], members: Mapping[str, Any]) -> type:
    """A class like `cls` with these bases; no `__init_subclass__` and no metaclass of somebody's hears of it."""
    meta: Any = abc.ABCMeta if isinstance(cls, abc.ABCMeta) else type
    heard = any("__init_subclass__" in vars(base) for base in own_classes(cls))
    own = type(cls) if meta is abc.ABCMeta else type
    made = meta.__new__(own, cls.__name__, (nn.Module,) if heard else bases, dict(members))
    if heard:
        made.__bases__ = bases
    return made


@functools.lru_cache(maxsize=4096)
def class_problem(cls: type) -> str:
    """Why a class can have no subclass of ours; empty where it can."""
    meta = type(cls)
    if meta.__module__ not in _METACLASSES:
        return f"{cls.__qualname__} has a metaclass of its own, {meta.__qualname__}"
    try:
        _made(cls, (cls,), {})
    except TypeError as error:
        return f"{cls.__qualname__} admits no subclass: {error}"
    return ""


def _value(module: nn.Module, dotted: str) -> object:
    """What an attribute of the module holds, read without running a property or a `__getattr__` of somebody's."""
    value: Any = module
    for name in dotted.split(".")[1:]:
        try:
            own = object.__getattribute__(value, "__dict__")
        except AttributeError:
            own = {}
        if name in own:
            value = own[name]
            continue
        children = own.get("_modules", {}) if isinstance(value, nn.Module) else {}
        if name in children:
            value = children[name]
            continue
        held = inspect.getattr_static(type(value), name, UNRESOLVED)
        if isinstance(held, types.MemberDescriptorType) or type(held).__name__ == "_tuplegetter":
            held = held.__get__(value)
        elif hasattr(type(held), "__get__"):
            return UNRESOLVED
        if held is UNRESOLVED:
            return UNRESOLVED
        value = held
    return value


def find_calls(source: Source) -> tuple[Call, ...]:
    """Every activation call in the methods of the class and in the functions that these call; gates are included."""
    return analyse(source).calls


def guard_of_child(source: Source, key: str, function: str) -> str:
    """Why what the module keeps under a name is no activation where it calls it; empty where it is one."""
    calls = (call for call in analyse(source).children if call.key == key)
    guards = (guard_of(function, call.uses, of_margin=call.of_margin) for call in calls)
    return next((guard for guard in guards if guard), "")


def asked_in_place(source: Source, key: str) -> bool:
    """Whether what the module keeps under a name is asked to write to its input, `self.act(x, inplace=True)`."""
    return any(call.in_place for call in analyse(source).children if call.key == key)


def reads_changed_input(source: Source, key: str) -> str:
    """Why the code may read the input of a child that changes it in place; empty where no call of it stands alone."""
    analysis = analyse(source)
    if any(call.discarded for call in analysis.children if call.key == key):
        return "it is called to change its input, and nothing takes its result"
    if any(call.reread for call in analysis.children if call.key == key):
        return "it changes its input in place, and that is read again"
    methods = (method for method, _ in analysis.methods if method.cls is not None)
    if any(not (method.available and method.self_name) for method in methods):
        return f"it changes its input in place, and whether {source.cls.__name__} reads that again cannot be seen"
    return ""


def guards_parameter(module: nn.Module, call: Call) -> bool:
    """Whether the input of a call is made of parameters and buffers of the module alone."""
    if call.function not in POSITIVE or not call.tensors:
        return False
    return all(_is_tensor(module, name) for name in call.tensors)


def _is_tensor(module: nn.Module, dotted: str) -> bool:
    owner: Any = module
    *path, last = dotted.split(".")[1:]
    for name in path:
        owner = owner._modules.get(name) if isinstance(owner, nn.Module) else None
    if not isinstance(owner, nn.Module):
        return False
    listed = isinstance(owner._modules.get(last), nn.ParameterList | nn.ParameterDict)
    return listed or last in owner._parameters or last in owner._buffers


def rewrite_class(source: Source) -> type:
    """A subclass of `source.cls` that calls `self.<attribute>` in the place of each replaced activation call."""
    return _rewritten(source)


@cached_by_meaning(maxsize=4096, of=lambda source: source.cls)
def _rewritten(source: Source) -> type:
    cls, analysis, expansions = source.cls, analyse(source.plain), source.expansions()
    unknown = expansions.keys() - {call.attribute for call in analysis.calls}
    if unknown:
        missing = ", ".join(sorted(unknown))
        raise OrthoFxError(f"the source of {cls.__qualname__} has no activation call {missing}; has it changed?")
    # Helpers that hold a replaced call, or that call such a helper.
    helpers: dict[types.FunctionType, str] = {}
    for method, calls in reversed(analysis.methods):
        chosen = [call for call in calls if call.attribute in expansions]
        for call in chosen:
            if call.problem:
                raise OrthoFxError(f"{call.attribute} of {cls.__qualname__} cannot be replaced: {call.problem}")
        if method.unreachable or method.cls is not None:
            continue
        if chosen or any(h in helpers for h in analysis.helpers[method.outer]):
            helpers[method.outer] = f"_{method.name}_with_expansions"
    namespace: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": _reduce,
        "__setstate__": _set_state,
        IN_PLACE: _expand_in_place,
        _SOURCE: source,
    }
    for method, calls in analysis.methods:
        if method.unreachable:
            continue
        edits = any(call.attribute in expansions for call in calls)
        if edits or any(helper in helpers for helper in analysis.helpers[method.outer]):
            numbers: dict[str, int] = {}
            for call in reversed(calls):
                numbers[call.function] = int(call.attribute.rpartition("_")[2]) - 1
            editor = CallEditor(method, numbers, source.split, expansions, helpers)
            namespace[helpers.get(method.outer, method.name)] = method.rebuild(editor.visit)
    return _made(cls, (cls,), namespace)


def _expand_in_place(self: nn.Module, name: str, x: Tensor, inplace: bool | str) -> Tensor:
    """Calls an expansion, and writes what it returns to its input: whoever holds that tensor sees it changed.

    `inplace` says whether to write, or is the name of the child that says so.
    """
    expansion = getattr(self, name)
    if isinstance(inplace, str):
        inplace = getattr(getattr(self, inplace), "inplace", False)
    if not inplace:
        return expansion(x)
    # What the expansion keeps for its backward must not be written to.
    return x.copy_(expansion(x.clone() if torch.is_grad_enabled() else x))


def _reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
    # A rewritten class has no importable name, so a pickle names the original class and the replaced calls.
    source: Source = type(self).__dict__[_SOURCE]
    reduced = super(type(self), self).__reduce_ex__(max(protocol, 2))
    if not isinstance(reduced, tuple) or reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
        raise OrthoFxError(
            f"{source.cls.__qualname__} has a pickling of its own, so its rewritten form cannot be copied"
        )
    return (_restore, (source, _texts(source)), *reduced[2:])


def _set_state(self: nn.Module, state: dict[str, Any]) -> None:
    cls: type = next(cls for cls in type(self).__mro__ if _SOURCE in cls.__dict__)
    ours = {key: child for key, child in state["_modules"].items() if isinstance(child, Expansion)}
    super(cls, self).__setstate__(state)  # type: ignore[arg-type]
    for key, expansion in ours.items():
        vars(self).pop(key, None)
        self._modules[key] = expansion


def _texts(source: Source) -> dict[str, str]:
    """The files of a source that another process may not find: notebooks' cells, and the script that runs."""
    functions = (method.function for method, _ in analyse(source.plain).methods)
    names = {function.__code__.co_filename for function in functions}
    missing = {name for name in names if source.cls.__module__ == "__main__" or not Path(name).exists()}
    return {name: text for name in sorted(missing) if (text := "".join(linecache.getlines(name)))}


def _restore(source: Source, texts: Mapping[str, str] = types.MappingProxyType({})) -> nn.Module:
    for name, text in texts.items():
        if not linecache.getlines(name):
            # Without a time, for the file not to be looked for again.
            linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    return nn.Module.__new__(rewrite_class(source))
