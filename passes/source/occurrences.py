"""Finds the activations that are calls in the code of a module's methods."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ortho_fx.passes.occurrence import Occurrence
from ortho_fx.passes.source.alternatives import beside_children, groups_of
from ortho_fx.passes.source.analysis import Source
from ortho_fx.passes.source.calls import call_in
from ortho_fx.passes.source.children import goes_through_children
from ortho_fx.passes.source.classes import class_problem, find_calls, guard_of_child, guards_parameter, source_of
from ortho_fx.passes.source.reader import Call
from ortho_fx.passes.vocabulary.guards import guard_of
from ortho_fx.passes.vocabulary.recognise import function_of, recognise_module
from ortho_fx.passes.vocabulary.sites import Site, join


def calls(prefix: str, owner: nn.Module, sharing: str = "instance") -> Iterator[Occurrence]:
    """The calls in the code of a module; alternatives of one another are one occurrence where instances share."""
    source = source_of(owner)
    replaced = source.expansions()
    found = [c for c in find_calls(source) if c.attribute not in replaced and c.function not in source.split]
    shared = goes_through_children(owner, source) if found else ""
    reasons = {c.attribute: _own_problem(owner, c) or c.problem or class_problem(source.cls) or shared for c in found}
    guards = {c.attribute: _guard(owner, c) for c in found}
    groups = [[c] for c in found if reasons[c.attribute]]
    notes: dict[str, str] = {}
    for guarded in (False, True):
        members = [c for c in found if not reasons[c.attribute] and bool(guards[c.attribute]) is guarded]
        together, apart = groups_of(owner, source, members, share=sharing == "instance")
        groups += together
        notes |= _notes(source, apart)
    notes |= _notes(source, _with_children(owner, source, [c for c in found if not reasons[c.attribute]]))
    for call, *others in sorted(groups, key=lambda group: found.index(group[0])):
        name = call.attribute
        site = Site(
            join(prefix, name),
            call.kind,
            call.function,
            location=", ".join(one.location for one in (call, *others)),
            reason=reasons[name],
        )
        put = call_in(owner, name, sharing=[other.attribute for other in others])
        yield Occurrence(site, owner, put, call.reference, guard=guards[name], advice=notes.get(name, ""))


def _with_children(owner: nn.Module, source: Source, found: list[Call]) -> list[list[str]]:
    """The calls whose other branch calls a child that computes the same, after the names of these children."""
    called = {call.function for call in found}
    children = owner._modules.items() if called else ()
    functions = {key: function_of(child) for key, child in children if child is not None}
    same = {key: function for key, function in functions.items() if function in called}
    beside = beside_children(owner, source, same) if same else {}
    return [[*keys, call] for call, keys in beside.items()]


def _guard(owner: nn.Module, call: Call) -> str:
    if not call.guard and guards_parameter(owner, call):
        return guard_of(call.function, (), of_parameter=True)
    return call.guard


def _notes(source: Source, apart: list[list[str]]) -> dict[str, str]:
    """What has to be known of calls that exclude each other and do not share an expansion, by their names."""
    found = {}
    for names in apart:
        note = (
            f"{source.cls.__name__} calls {' and '.join(names)} in branches that exclude each other. Each learns only "
            "where its branch runs, so a model that trains in one branch and runs in the other computes another "
            "function there: train both, or copy the parameters"
        )
        found.update(dict.fromkeys(names, note))
    return found


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
    source = source_of(owner, split)
    calls = [call for call in find_calls(source) if call.function == key]
    child = owner._modules[key]
    function = function_of(child) if child is not None else None
    if len(calls) < 2 or child is None or function is None:
        return ()
    guard = guard_of_child(source_of(owner), key, function)
    _, apart = groups_of(owner, source, [call for call in calls if not call.problem], share=False)
    notes = _notes(source, apart)
    return tuple(
        Occurrence(
            Site(join(prefix, call.attribute), "call", function, location=call.location, reason=call.problem),
            owner,
            call_in(owner, call.attribute, split),
            recognise_module(child),
            guard=guard,
            advice=notes.get(call.attribute, ""),
        )
        for call in calls
    )
