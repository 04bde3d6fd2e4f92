"""Activations that a module keeps where nothing can be exchanged: in containers, in objects, in functions, as classes.

They are listed with that reason. Containers and objects are read without running a method of theirs.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator

from torch import nn

from ortho_fx.passes.vocabulary.activates import activations_in, is_activation, items_of, read_by
from ortho_fx.passes.vocabulary.expansions import REPLACED
from ortho_fx.passes.vocabulary.meaning import functions_of, is_plain, own_classes
from ortho_fx.passes.vocabulary.recognise import OWN_ATTRIBUTES, function_of

_CONTAINERS = (dict, list, tuple, set, frozenset, types.SimpleNamespace)
_FUNCTION = "it is kept as a function or an object that is more than an activation, or no module"
_CLASS = "it is a class, and where its instances are made is not known"
_KEPT_IN = "it is kept in a {}, in which nothing is exchanged"
_UNSEEN = "PyTorch does not see a module in a {}: use nn.ModuleList or nn.ModuleDict"
_DEEPEST = 2
_NOT_THEIRS = OWN_ATTRIBUTES | {REPLACED}


def kept_elsewhere(owner: nn.Module, key: str, value: object) -> Iterator[tuple[str, str, str]]:
    """What an attribute of a module holds of activations, each as its name, its function and why it is left."""
    if isinstance(value, type):
        names = is_activation(value) if read_by(type(owner), key) else ()
        yield from _told(key, names, _CLASS)
        return
    if isinstance(value, nn.Module):
        return
    if isinstance(value, _CONTAINERS) or _is_object(value):
        yield from _in_container(owner, key, key, value, _DEEPEST)
    yield from _told(key, _called(owner, value), _FUNCTION)


def kept_by_class(owner: nn.Module) -> Iterator[tuple[str, str, str]]:
    """What containers hold that are attributes of the module's class."""
    seen: set[str] = set()
    for base in own_classes(type(owner)):
        for key, value in vars(base).items():
            if key in seen or key.startswith("__") or key in vars(owner) or not isinstance(value, _CONTAINERS):
                continue
            seen.add(key)
            if read_by(type(owner), key):
                yield from _in_container(owner, key, key, value, _DEEPEST)


def kept_by_hooks(owner: nn.Module) -> Iterator[tuple[str, str, str]]:
    """What the hooks of a module call."""
    for kind in ("_forward_pre_hooks", "_forward_hooks"):
        for number, hook in enumerate(vars(owner)[kind].values()):
            yield from _told(f"{kind}[{number}]", _called(owner, hook), "it is called by a hook of the module")


def _told(name: str, functions: tuple[str, ...], reason: str) -> Iterator[tuple[str, str, str]]:
    for function in functions:
        yield (name if len(functions) == 1 else f"{name}[{function}]"), function, reason


def _is_object(value: object) -> bool:
    """Whether a value is an object of a class of somebody's, such as a config."""
    return (
        not is_plain(type(value))
        and not isinstance(value, types.FunctionType | types.ModuleType | types.MethodType | nn.Module)
        and type(value).__dictoffset__ != 0
    )


def _named_items(value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        yield from ((f"[{name!r}]", item) for name, item in list(dict.items(value))[:256])
    elif isinstance(value, list | tuple | set | frozenset):
        yield from ((f"[{index}]", item) for index, item in enumerate(items_of(value)))
    if not isinstance(value, dict | list | tuple | set | frozenset) or _is_object(value):
        own = object.__getattribute__(value, "__dict__") if type(value).__dictoffset__ else {}
        yield from ((f".{name}", item) for name, item in list(own.items())[:256])


def _in_container(
    owner: nn.Module, key: str, name: str, container: object, depth: int
) -> Iterator[tuple[str, str, str]]:
    kind = type(container).__name__
    for part, item in _named_items(container):
        place = f"{name}{part}"
        if isinstance(item, nn.Module):
            function = function_of(item)
            registered = any(item is child for child in owner._modules.values())
            if function is not None and not (registered and isinstance(container, list)):
                yield place, function, _UNSEEN.format(kind)
        elif isinstance(item, _CONTAINERS):
            if depth:
                yield from _in_container(owner, key, place, item, depth - 1)
        elif not isinstance(item, type) or read_by(type(owner), key):
            yield from _told(place, is_activation(item) or _called(owner, item), _KEPT_IN.format(kind))


def _called(owner: nn.Module, value: object) -> tuple[str, ...]:
    """The activations of a function, or of an object that is called like one, that the module keeps."""
    if isinstance(value, functools.partial):
        return _called(owner, value.func)
    if isinstance(value, types.MethodType):
        if value.__self__ is owner and _is_own(owner, value.__func__):
            return ()
        value = value.__func__
    if isinstance(value, types.FunctionType):
        return activations_in(value)
    if isinstance(value, nn.Module | type):
        return ()
    call = type(value).__dict__.get("__call__")
    return activations_in(call) if isinstance(call, types.FunctionType) else ()


def _is_own(owner: nn.Module, function: object) -> bool:
    members = (member for base in own_classes(type(owner)) for member in vars(base).values())
    return any(function in functions_of(member) for member in members)


def attributes_of(owner: nn.Module) -> Iterator[tuple[str, object]]:
    """The attributes of a module that are not those of every module, nor ours."""
    yield from ((key, value) for key, value in list(vars(owner).items()) if key not in _NOT_THEIRS)
