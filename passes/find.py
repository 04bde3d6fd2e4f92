"""Finds the activations of a model: child modules, functions kept as attributes, calls in source, nodes of FX graphs.

What is found is an `Occurrence`: the site as the user sees it, and the function that replaces it. Every kind is looked
up in the one table of `targets`, and activations that the chosen targets leave out are found as well, with that as the
reason. Nothing is changed; of the model's code only copies of leaf modules without parameters are run, to see whether
they are activations.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from ortho_fx.passes import substitute
from ortho_fx.passes.expansions import Expansion
from ortho_fx.passes.graph.matches import Match
from ortho_fx.passes.graph.pairs import holds_backward, with_derivatives
from ortho_fx.passes.recognise import OWN_ATTRIBUTES, computes_unknown_function, recognise, recognise_module
from ortho_fx.passes.sites import Site
from ortho_fx.passes.source import find_calls, may_activate, source_of
from ortho_fx.passes.targets import BY_NAME, EVERY_TARGET, Reference, TargetTable


@dataclass(frozen=True)
class Occurrence:
    """A site, the module that its expansion is placed beside, and what puts an expansion there.

    `reference` is the scalar function that is computed there, None where that is known only when it runs. `match` is
    what a graph holds of it, and `backward` its backward in the same graph, which is replaced with it.
    """

    site: Site
    owner: nn.Module
    substitute: substitute.Substitute
    reference: Reference | None = None
    places: tuple[tuple[nn.Module, str], ...] = ()
    match: Match | None = None
    backward: fx.Node | None = None


def find_occurrences(model: nn.Module, table: TargetTable, *, share: bool = True) -> list[Occurrence]:
    """Every activation of the model, in the order of `model.named_modules()`; those not of the table with that reason.

    With `share`, a module that stands in several places or is called several times is one occurrence; without, each
    place and each call is.
    """
    found = list_occurrences(model, share=share)
    reasons = [occurrence.site.reason or reason_not_chosen(occurrence.site, table) for occurrence in found]
    return [
        replace(occurrence, site=replace(occurrence.site, reason=reason)) if reason else occurrence
        for occurrence, reason in zip(found, reasons, strict=True)
    ]


def list_occurrences(model: nn.Module, *, share: bool = True) -> list[Occurrence]:
    """Every activation of the model, whether or not it is a target."""
    found = list(_find(model, share))
    return _merge_shared(found) if share else found


_NOT_CHOSEN = {"prelu": "it learns parameters of its own, and stays unless it is named as a target"}


def reason_not_chosen(site: Site, table: TargetTable) -> str:
    """Why the targets leave a site out; empty where they do not."""
    if site.function in table.names:
        return ""
    if not BY_NAME[site.function].gate:
        return "it is not among the targets"
    return _NOT_CHOSEN.get(site.function, "it is a gate unless it is named as a target")


def _find(model: nn.Module, share: bool) -> Iterator[Occurrence]:
    target = EVERY_TARGET.modules.get(type(model))
    if target is not None:
        site = Site("", "module", target.name, reason="the model itself is the activation, and nothing holds it")
        yield Occurrence(site, model, substitute.module_in(()))
        return
    modules = list(model.named_modules())
    backwards = [owner for _, owner in modules if isinstance(owner, fx.GraphModule) and holds_backward(owner.graph)]
    for prefix, owner in modules:
        if isinstance(owner, Expansion) or (owner is not model and _function_of(owner) is not None):
            continue
        if isinstance(owner, torch.jit.ScriptModule):
            yield from _scripted(prefix, owner)
            continue
        calls = _nodes(prefix, owner, backwards) if isinstance(owner, fx.GraphModule) else _calls(prefix, owner)
        yield from (*_attributes(prefix, owner), *calls, *_children(prefix, owner, share))


def _function_of(module: nn.Module) -> str | None:
    """The name of the activation function that a module is."""
    target = EVERY_TARGET.modules.get(type(module))
    if target is not None:
        return target.name
    reference = recognise_module(module)
    return reference.target if reference is not None else None


def _children(prefix: str, owner: nn.Module, share: bool) -> Iterator[Occurrence]:
    for key, child in owner._modules.items():
        if child is None or isinstance(child, Expansion):
            continue
        name, function, places = _join(prefix, key), _function_of(child), ((owner, key),)
        if function is not None:
            calls = () if share else _calls_of_child(prefix, owner, key)
            if calls:
                yield from calls
                continue
            site = Site(name, "module", function)
            yield Occurrence(site, owner, substitute.module_in(places), recognise_module(child), places)
        elif computes_unknown_function(child) and not any(_inside(child)):
            trait = "learns parameters of its own" if any(True for _ in child.parameters()) else "is in no table"
            site = Site(name, "module", type(child).__name__, reason=f"its function {trait}")
            yield Occurrence(site, owner, substitute.module_in(places), places=places)


def _inside(module: nn.Module) -> Iterator[Occurrence]:
    """The activations of a module's own that are no gates, and are listed under its name."""
    for occurrence in (*_attributes("", module), *_calls("", module)):
        target = BY_NAME.get(occurrence.site.function)
        if target is not None and not target.gate:
            yield occurrence


def _calls_of_child(prefix: str, owner: nn.Module, key: str) -> tuple[Occurrence, ...]:
    """The calls of a child in the source of its owner, where these are several."""
    split = frozenset((key,))
    calls = [call for call in find_calls(source_of(owner, split)) if call.function == key]
    child = owner._modules[key]
    function = _function_of(child) if child is not None else None
    if len(calls) < 2 or child is None or function is None:
        return ()
    return tuple(
        Occurrence(
            Site(_join(prefix, call.attribute), "call", function, location=call.location, reason=call.problem),
            owner,
            substitute.call_in(owner, call.attribute, split),
            recognise_module(child),
        )
        for call in calls
    )


def _merge_shared(occurrences: list[Occurrence]) -> list[Occurrence]:
    """One occurrence for a module that stands in several places, under its first name."""
    merged: dict[int, Occurrence] = {}
    for occurrence in occurrences:
        owner, key = occurrence.places[0] if occurrence.places else (occurrence.owner, None)
        identity = id(occurrence) if key is None else id(owner._modules[key])
        first = merged.get(identity)
        if first is None:
            merged[identity] = occurrence
        else:
            places = (*first.places, *occurrence.places)
            site = replace(first.site, aliases=(*first.site.aliases, occurrence.site.name))
            merged[identity] = replace(first, site=site, substitute=substitute.module_in(places), places=places)
    return list(merged.values())


def _may_compute_one(kept: object) -> bool:
    """Whether what a module keeps as an attribute is a function, or is called like one, and may hold activations."""
    code = kept if isinstance(kept, types.FunctionType) else type(kept).__dict__.get("__call__")
    return not isinstance(kept, nn.Module | type) and isinstance(code, types.FunctionType) and may_activate(code)


_KEPT = (types.BuiltinFunctionType, types.FunctionType, functools.partial, torch.jit.ScriptFunction, nn.Module)


def _attributes(prefix: str, owner: nn.Module) -> Iterator[Occurrence]:
    for key, value in vars(owner).items():
        if key in OWN_ATTRIBUTES:
            continue
        if isinstance(value, _KEPT):
            reference = recognise(value)
            if reference is not None:
                site = Site(_join(prefix, key), "attribute", reference.target)
                yield Occurrence(site, owner, substitute.attribute_of(owner, key), reference)
                continue
        if _may_compute_one(value):
            reason = "it is kept as a function or an object that is more than an activation, or no module"
            yield Occurrence(
                Site(_join(prefix, key), "attribute", "activation", reason=reason), owner, substitute.module_in(())
            )
        elif isinstance(value, list | tuple | dict):
            for item, kept in value.items() if isinstance(value, dict) else enumerate(value):
                function = _function_of(kept) if isinstance(kept, nn.Module) else None
                registered = any(kept is child for child in owner._modules.values())
                if function is not None and not (registered and isinstance(value, list)):
                    reason = (
                        f"PyTorch does not see a module in a {type(value).__name__}: use nn.ModuleList or nn.ModuleDict"
                    )
                    site = Site(f"{_join(prefix, key)}[{item!r}]", "attribute", function, reason=reason)
                    yield Occurrence(site, owner, substitute.module_in(()))


def _calls(prefix: str, owner: nn.Module) -> Iterator[Occurrence]:
    source = source_of(owner)
    for call in find_calls(source):
        if call.attribute in source.replaced or call.function in source.split:
            continue
        reason = call.problem
        if "forward" in vars(owner):
            reason = "the instance has a forward of its own, which is not the class'"
        elif _holds(owner, call.attribute):
            reason = f"the module has a {call.attribute} of its own"
        name = _join(prefix, call.attribute)
        site = Site(name, call.kind, call.function, location=call.location, reason=reason)
        yield Occurrence(site, owner, substitute.call_in(owner, call.attribute), call.reference)


def _holds(owner: nn.Module, name: str) -> bool:
    """As `hasattr`, which takes long on a module that has no such attribute."""
    own = (vars(owner), owner._modules, owner._parameters, owner._buffers)
    return any(name in names for names in own) or hasattr(type(owner), name)


def _nodes(prefix: str, owner: fx.GraphModule, backwards: Sequence[fx.GraphModule]) -> Iterator[Occurrence]:
    beside_backward = any(other is not owner for other in backwards)
    for match, derivative in with_derivatives(owner.graph, beside_backward=beside_backward):
        name = f"{match.node.name}_expansion"
        reason = derivative.reason if match.argument is not None else "its input is no tensor of the graph"
        site = Site(_join(prefix, name), match.kind, match.function, f"node {match.node.name}", reason=reason)
        put = substitute.node_in(owner, match, name)
        if derivative.node is not None:
            put = substitute.pair_in(owner, match, derivative.node, name)
        yield Occurrence(site, owner, put, match.reference, match=match, backward=derivative.node)


def _scripted(prefix: str, owner: torch.jit.ScriptModule) -> Iterator[Occurrence]:
    """What a scripted module calls; its children are listed by themselves."""
    try:
        code = owner.graph
    except Exception:  # a container has no forward
        return
    for node in _script_nodes(code.nodes()):
        function = node.kind().removeprefix("aten::").removesuffix("_")
        if node.kind().startswith("aten::") and function in BY_NAME:
            site = Site(_join(prefix, function), "scripted", function, reason="scripted code cannot be rewritten")
            yield Occurrence(site, owner, substitute.module_in(()))


def _script_nodes(nodes: Iterable[Any]) -> Iterator[Any]:
    for node in nodes:
        yield node
        for block in node.blocks():
            yield from _script_nodes(block.nodes())


def _join(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key
