"""Finds the activations that are child modules, or functions that a module keeps as attributes."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterable, Iterator

import torch
from torch import fx, nn

from ortho_fx.passes.graph.uses import guard_of_called
from ortho_fx.passes.modules.exchange import attribute_of, module_in
from ortho_fx.passes.modules.kept import attributes_of, kept_by_class, kept_by_hooks, kept_elsewhere
from ortho_fx.passes.occurrence import Occurrence
from ortho_fx.passes.source import asked_in_place, guard_of_child, reads_changed_input, source_of
from ortho_fx.passes.source.occurrences import calls, calls_of_child
from ortho_fx.passes.vocabulary.expansions import Expansion, Kept
from ortho_fx.passes.vocabulary.guards import guard_of
from ortho_fx.passes.vocabulary.meaning import UNRESOLVED, functions_of, own_classes
from ortho_fx.passes.vocabulary.recognise import (
    changes_input,
    computes_unknown_function,
    function_of,
    recognise,
    recognise_module,
)
from ortho_fx.passes.vocabulary.sites import Site, join
from ortho_fx.passes.vocabulary.targets import BY_NAME


def children(prefix: str, owner: nn.Module, sharing: str) -> Iterator[Occurrence]:
    for key, child in owner._modules.items():
        if child is None or isinstance(child, Expansion | Kept):
            continue
        name, function, places = join(prefix, key), function_of(child), ((owner, key),)
        if function is not None:
            calls = calls_of_child(prefix, owner, key) if sharing == "site" else ()
            if calls:
                yield from calls
                continue
            reason = _more_than_forward(child) or _missed(owner, key, child)
            site = Site(name, "module", function, reason=reason)
            guard = _guard(owner, key, function)
            yield Occurrence(site, owner, module_in(places), recognise_module(child), places, guard=guard)
        elif computes_unknown_function(child) and not any(_inside(child)):
            trait = "learns parameters of its own" if any(True for _ in child.parameters()) else "is in no table"
            site = Site(name, "module", type(child).__name__, reason=f"its function {trait}")
            yield Occurrence(site, owner, module_in(places), places=places)


def _missed(owner: nn.Module, key: str, child: nn.Module) -> str:
    """Why the code of the owner would miss what a child did; empty where it would not."""
    if isinstance(owner, fx.GraphModule) or not getattr(child, "inplace", False):
        return ""
    return reads_changed_input(source_of(owner), key)


def _more_than_forward(child: nn.Module) -> str:
    """Why a module cannot be exchanged that has other methods to call than forward; empty where it has none."""
    known = {"forward", "extra_repr"}
    for base in own_classes(type(child)):
        for name, member in vars(base).items():
            if not name.startswith("_") and name not in known and not hasattr(nn.Module, name) and functions_of(member):
                return f"it also has {name}, which an expansion in its place would not have"
    return ""


def _guard(owner: nn.Module, key: str, function: str) -> str:
    if isinstance(owner, fx.GraphModule):
        return guard_of_called(owner.graph, key, function)
    if isinstance(owner, nn.utils.parametrize.ParametrizationList):
        return guard_of(function, (), of_parameter=True)
    return guard_of_child(source_of(owner), key, function)


def _inside(module: nn.Module) -> Iterator[Occurrence]:
    """The activations, without gates, that are attributes of a module or calls in its own code."""
    for occurrence in (*attributes("", module), *calls("", module)):
        target = BY_NAME.get(occurrence.site.function)
        if target is not None and not target.gate:
            yield occurrence


_KEPT = (types.BuiltinFunctionType, types.FunctionType, functools.partial, torch.jit.ScriptFunction, nn.Module)


def attributes(prefix: str, owner: nn.Module) -> Iterator[Occurrence]:
    for key, value in attributes_of(owner):
        reference = recognise(value) if isinstance(value, _KEPT) else None
        if reference is not None:
            site = Site(join(prefix, key), "attribute", reference.target, reason=_attribute_problem(owner, key, value))
            guard = _guard(owner, key, reference.target)
            yield Occurrence(site, owner, attribute_of(owner, key), reference, guard=guard)
        else:
            yield from _left(prefix, owner, kept_elsewhere(owner, key, value))
    yield from _left(prefix, owner, kept_by_hooks(owner))
    if not isinstance(owner, fx.GraphModule):
        yield from _left(prefix, owner, kept_by_class(owner))


def _attribute_problem(owner: nn.Module, key: str, value: object) -> str:
    """Why a function that a module keeps cannot become a child of that name; empty where it can."""
    if inspect.getattr_static(type(owner), key, UNRESOLVED) is not UNRESOLVED:
        return f"{type(owner).__name__} has an attribute {key} as well, which would hide a child of that name"
    asked = not isinstance(owner, fx.GraphModule) and asked_in_place(source_of(owner), key)
    if changes_input(value) or (asked and callable(value) and changes_input(functools.partial(value, inplace=True))):
        return "it may write to its input, and an expansion in its place would not"
    return ""


def _left(prefix: str, owner: nn.Module, found: Iterable[tuple[str, str, str]]) -> Iterator[Occurrence]:
    for name, function, reason in found:
        yield Occurrence(Site(join(prefix, name), "attribute", function, reason=reason), owner, module_in(()))
