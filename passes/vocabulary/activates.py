"""Whether code may call an activation, by the names in it: which functions are worth reading, or have to be listed.

A name counts by what it stands for. Nothing is run, and no source is read.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ortho_fx.passes.vocabulary.elementwise import bends
from ortho_fx.passes.vocabulary.meaning import (
    cached_by_meaning,
    contents,
    functions_of,
    is_plain,
    names_in,
    own_classes,
    unwrapped,
)
from ortho_fx.passes.vocabulary.recognise import function_of, recognise
from ortho_fx.passes.vocabulary.targets import BY_NAME, EVERY_TARGET

_DEEPEST = 3
_MOST_ITEMS = 256
# In bytes of bytecode: a GELU spelled out has 200.
_LONGEST_FORWARD = 300
_CONTAINERS = (dict, list, tuple, set, frozenset, types.SimpleNamespace)


def activates(code: types.FunctionType | type, *, made: bool = False) -> bool:
    """Whether a function, or a method of a class, may call an activation; with `made`, or may make one."""
    return bool(activations_in(code)) or (made and isinstance(code, types.FunctionType) and _made_in(code))


def activations_in(code: types.FunctionType | type) -> tuple[str, ...]:
    """The activations that a function, or a class' methods, may call, by their names in the table; "activation" for one
    that is not known."""
    if isinstance(code, type):
        functions = (f for base in own_classes(code) for member in vars(base).values() for f in functions_of(member))
        return tuple(dict.fromkeys(name for function in functions for name in _in_function(function)))
    return _in_function(code)


@cached_by_meaning(maxsize=8192)
def _in_function(function: types.FunctionType, depth: int = _DEEPEST) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_names(function, depth)))


@cached_by_meaning(maxsize=2048)
def _made_in(function: types.FunctionType) -> bool:
    classes = {cls.__name__ for cls in EVERY_TARGET.modules}
    return any(name in classes or "activation" in held_in(value) for name, value in _meant(function))


def _names(function: types.FunctionType, depth: int) -> Iterator[str]:
    inner = unwrapped(function)
    if inner is not function:
        yield from _names(inner, depth)
    if is_plain(inner) or depth == 0:
        return
    classes = {cls.__name__: target for cls, target in EVERY_TARGET.modules.items()}
    for name, value in _meant(inner):
        target = EVERY_TARGET.of_function(value)
        if target is not None:
            yield target.name
        elif name in EVERY_TARGET.methods:
            yield EVERY_TARGET.methods[name].name
        elif name in classes:
            yield classes[name].name
        elif bends(name):
            # An attribute of a module, as in F.gelu, or a part of a formula.
            yield name.rstrip("_") if name.rstrip("_") in BY_NAME else "activation"
        elif isinstance(value, types.FunctionType) and value is not inner and value is not function:
            yield from _in_function(value, depth - 1)
        else:
            yield from held_in(value)
    names = names_in(inner.__code__)
    if "getattr" in names and any(inner.__globals__.get(name) in (F, nn) for name in names):
        yield "activation"


def _meant(function: types.FunctionType) -> Iterator[tuple[str, object]]:
    """The names that a function uses, with what the globals and the cells among them stand for."""
    names = dict.fromkeys(names_in(function.__code__))
    modules = [function.__globals__[n] for n in names if isinstance(function.__globals__.get(n), types.ModuleType)]
    for name in names:
        value = function.__globals__.get(name)
        if value is None:
            within = (vars(module)[name] for module in modules if name in vars(module))
            value = next((one for one in within if isinstance(one, types.FunctionType) and not is_plain(one)), None)
        yield name, value
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        yield name, contents(cell)


def held_in(value: object, depth: int = 2) -> tuple[str, ...]:
    """The activations that a container, a module or an object of somebody's holds or is; none for any other value."""
    if isinstance(value, nn.Module):
        found = (function_of(module) for module in value.modules())
        return tuple(dict.fromkeys(name for name in found if name is not None))
    if depth and isinstance(value, Mapping) and not isinstance(value, dict):
        return ()
    if depth and isinstance(value, _CONTAINERS):
        return tuple(dict.fromkeys(name for item in items_of(value) for name in is_activation(item, depth - 1)))
    return ()


def items_of(container: object) -> Iterator[object]:
    """The items of a container, without running a method of somebody's."""
    items: object
    if isinstance(container, dict):
        items = list(dict.values(container))
    elif isinstance(container, types.SimpleNamespace):
        items = list(vars(container).values())
    else:
        base = next(kind for kind in (list, tuple, set, frozenset) if isinstance(container, kind))
        items = list(base.__iter__(container))  # type: ignore[arg-type]
    assert isinstance(items, list)
    yield from items[:_MOST_ITEMS]


def is_activation(value: object, depth: int = 0) -> tuple[str, ...]:
    """The activations that a value is as a function, as a class or as a module; of a container, those in it."""
    target = EVERY_TARGET.of_function(value)
    if target is None and isinstance(value, type):
        target = EVERY_TARGET.modules.get(value)
        if target is None and issubclass(value, nn.Module) and not is_plain(value):
            return _in_forward(value)
    if target is not None:
        return (target.name,)
    if isinstance(value, functools.partial):
        return is_activation(value.func, depth)
    if isinstance(value, (nn.Module, *_CONTAINERS)):
        return held_in(value, depth)
    if isinstance(value, types.FunctionType | torch.jit.ScriptFunction):
        reference = recognise(value)
        return () if reference is None else (reference.target,)
    return ()


def _in_forward(cls: type) -> tuple[str, ...]:
    """The activations that a module's class calls in a short forward, as an activation's own class does."""
    forward = next((vars(base)["forward"] for base in own_classes(cls) if "forward" in vars(base)), None)
    short = isinstance(forward, types.FunctionType) and len(forward.__code__.co_code) < _LONGEST_FORWARD
    return activations_in(forward) if short else ()  # type: ignore[arg-type]


def scripted_in(graph: Any) -> Iterator[str]:
    """The activations that a scripted graph calls, by their names in the table."""
    for node in graph.nodes():
        name = node.kind().removeprefix("aten::").removesuffix("_")
        if node.kind().startswith("aten::") and name in BY_NAME:
            yield name
        for block in node.blocks():
            yield from scripted_in(block)


def read_by(cls: type, name: str) -> bool:
    """Whether some method of a class but `__init__` names this attribute."""
    functions = (
        function
        for base in own_classes(cls)
        for key, member in vars(base).items()
        if key != "__init__"
        for function in functions_of(member)
    )
    return any(name in names_in(unwrapped(function).__code__) for function in functions)
