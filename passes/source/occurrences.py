"""Finds the activations that are calls in the code of a module's methods."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ortho_fx.passes.occurrence import Occurrence
from ortho_fx.passes.source.calls import call_in
from ortho_fx.passes.source.children import goes_through_children
from ortho_fx.passes.source.classes import class_problem, find_calls, guard_of_child, guards_parameter, source_of
from ortho_fx.passes.source.editor import Call
from ortho_fx.passes.vocabulary.guards import guard_of
from ortho_fx.passes.vocabulary.recognise import function_of, recognise_module
from ortho_fx.passes.vocabulary.sites import Site, join


def calls(prefix: str, owner: nn.Module) -> Iterator[Occurrence]:
    source = source_of(owner)
    found = find_calls(source)
    shared = goes_through_children(owner, source) if found else ""
    for call in found:
        if call.attribute in source.replaced or call.function in source.split:
            continue
        reason = _own_problem(owner, call) or call.problem or class_problem(source.cls) or shared
        name = join(prefix, call.attribute)
        site = Site(name, call.kind, call.function, location=call.location, reason=reason)
        guard = call.guard
        if not guard and guards_parameter(owner, call):
            guard = guard_of(call.function, (), of_parameter=True)
        yield Occurrence(site, owner, call_in(owner, call.attribute), call.reference, guard=guard)


def _own_problem(owner: nn.Module, call: Call) -> str:
    """What of the instance is in the way of a call's replacement; empty where nothing is."""
    own = vars(owner)
    if "forward" in own:
        return "the instance has a forward of its own, which is not the class'"
    if call.method in own:
        return f"the instance has an attribute {call.method} of its own, which is not the class'"
    hidden = sorted(call.held & own.keys())
    if hidden:
        return f"the instance has an attribute {hidden[0]} of its own, which is not the class'"
    if _holds(owner, call.attribute):
        return f"the module has a {call.attribute} of its own"
    return ""


def _holds(owner: nn.Module, name: str) -> bool:
    """Like `hasattr`, but fast: `hasattr` is slow on a module without the attribute."""
    own = (vars(owner), owner._modules, owner._parameters, owner._buffers)
    return any(name in names for names in own) or hasattr(type(owner), name)


def calls_of_child(prefix: str, owner: nn.Module, key: str) -> tuple[Occurrence, ...]:
    """The calls of a child in the source of its owner, if there are several; empty otherwise."""
    split = frozenset((key,))
    calls = [call for call in find_calls(source_of(owner, split)) if call.function == key]
    child = owner._modules[key]
    function = function_of(child) if child is not None else None
    if len(calls) < 2 or child is None or function is None:
        return ()
    guard = guard_of_child(source_of(owner), key, function)
    return tuple(
        Occurrence(
            Site(join(prefix, call.attribute), "call", function, location=call.location, reason=call.problem),
            owner,
            call_in(owner, call.attribute, split),
            recognise_module(child),
            guard=guard,
        )
        for call in calls
    )
