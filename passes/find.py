"""Finds the activations of a model: child modules, functions kept as attributes, calls in source, nodes of FX graphs.

What is found is an `Occurrence`: the site as the user sees it, and the function that replaces it. Nothing
is run and nothing is changed. Every kind is looked up in the one table of `targets`.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import fx, nn

from ortho_fx.activations import ExpansionActivation
from ortho_fx.passes import substitute
from ortho_fx.passes.sites import Site
from ortho_fx.passes.source import find_calls, origin
from ortho_fx.passes.targets import Reference, TargetTable


@dataclass(frozen=True)
class Occurrence:
    """A site, the module that its expansion is placed beside, and what puts an expansion there.

    `reference` is the scalar function that is computed there, None where that is known only when it runs.
    """

    site: Site
    owner: nn.Module
    substitute: substitute.Substitute
    reference: Reference | None = None
    places: tuple[tuple[nn.Module, str], ...] = ()


def find_occurrences(model: nn.Module, table: TargetTable) -> list[Occurrence]:
    """Every activation of the table in the model, in the order of `model.named_modules()`."""
    target = table.of_module(model)
    if target is not None:
        site = Site("", "module", target.name, reason="the model itself is the activation, and nothing holds it")
        return [Occurrence(site, model, substitute.module_in(()))]
    occurrences: list[Occurrence] = []
    for prefix, owner in list(model.named_modules()):
        if isinstance(owner, ExpansionActivation):
            continue
        occurrences += _attributes(prefix, owner, table)
        calls = _nodes if isinstance(owner, fx.GraphModule) else _calls
        occurrences += calls(prefix, owner, table)
        occurrences += _children(prefix, owner, table)
    return _merge_shared(occurrences)


def _children(prefix: str, owner: nn.Module, table: TargetTable) -> Iterator[Occurrence]:
    for key, child in owner._modules.items():
        target = None if child is None else table.of_module(child)
        if child is not None and target is not None:
            site, places = Site(_join(prefix, key), "module", target.name), ((owner, key),)
            yield Occurrence(site, owner, substitute.module_in(places), target.reference_of(child), places)


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


def _attributes(prefix: str, owner: nn.Module, table: TargetTable) -> Iterator[Occurrence]:
    for key, value in vars(owner).items():
        target = table.of_function(value) if isinstance(value, types.BuiltinFunctionType | types.FunctionType) else None
        if target is not None:
            site = Site(_join(prefix, key), "attribute", target.name)
            yield Occurrence(site, owner, substitute.attribute_of(owner, key), target.reference())


def _calls(prefix: str, owner: nn.Module, table: TargetTable) -> Iterator[Occurrence]:
    cls, done = origin(type(owner))
    chosen = {target.name for target in table.targets}
    for call in find_calls(cls):
        if call.attribute in done or call.function not in chosen:
            continue
        reason = call.problem
        if hasattr(owner, call.attribute):
            reason = f"the module has a {call.attribute} of its own"
        name = _join(prefix, call.attribute)
        site = Site(name, call.kind, call.function, location=call.location, reason=reason)
        yield Occurrence(site, owner, substitute.call_in(owner, call.attribute), call.reference)


def _nodes(prefix: str, owner: fx.GraphModule, table: TargetTable) -> Iterator[Occurrence]:
    for node in owner.graph.nodes:
        target = table.of_node(node)
        if target is not None:
            name = f"{node.name}_expansion"
            location = f"node {node.name}"
            yield Occurrence(
                Site(_join(prefix, name), "node", target.name, location=location),
                owner,
                substitute.node_in(owner, node, name),
                target.reference(node.args[1:], node.kwargs),
            )


def _join(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key
