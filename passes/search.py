"""Finds the activations of a model: child modules, functions kept as attributes, calls in source, nodes of FX graphs.

What is found is an `Occurrence`: the site as the user sees it, and the function that replaces it. Every kind is looked
up in the one table of `targets`, and activations that the chosen targets leave out are found as well, with that as the
reason. Nothing is changed. Of code that is not PyTorch's or that of `meaning.LIBRARIES`, only copies of leaf modules
without parameters and functions that are nothing but tensor arithmetic are run, to see whether they are activations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import fx, nn

from ortho_fx.passes.graph.occurrences import nodes
from ortho_fx.passes.graph.pairs import holds_backward
from ortho_fx.passes.modules.exchange import module_in
from ortho_fx.passes.modules.fused import fused, scripted
from ortho_fx.passes.modules.occurrences import attributes, children
from ortho_fx.passes.occurrence import Occurrence
from ortho_fx.passes.source import source_of, tested_classes
from ortho_fx.passes.source.occurrences import calls
from ortho_fx.passes.vocabulary.expansions import Expansion, Kept
from ortho_fx.passes.vocabulary.meaning import one_look
from ortho_fx.passes.vocabulary.recognise import function_of
from ortho_fx.passes.vocabulary.sites import Site
from ortho_fx.passes.vocabulary.targets import BY_NAME, EVERY_TARGET, TargetTable


def find_occurrences(model: nn.Module, table: TargetTable, *, sharing: str = "instance") -> list[Occurrence]:
    """Every activation of the model, in the order of `model.named_modules()`.

    An activation outside of the table has that as its reason. `sharing` says what is one occurrence, as in
    `ortho_fx.rewrite_`.
    """
    found = list_occurrences(model, sharing=sharing)
    for occurrence in found:
        occurrence.describe(reason=occurrence.site.reason or reason_not_chosen(occurrence, table))
    return found


def list_occurrences(model: nn.Module, *, sharing: str = "instance") -> list[Occurrence]:
    """Every activation of the model, whether or not it is a target."""
    with one_look():
        found = list(_find(model, sharing))
    return found if sharing == "site" else _merge_shared(found)


_NOT_CHOSEN = {"prelu": "it learns parameters of its own, and stays unless it is named as a target"}


def reason_not_chosen(occurrence: Occurrence, table: TargetTable) -> str:
    """Why the targets leave a site out; empty where they do not."""
    function = occurrence.site.function
    if function in table.names:
        return "" if table.named else occurrence.guard
    if not BY_NAME[function].gate:
        return "it is not among the targets"
    return _NOT_CHOSEN.get(function, "it is a gate unless it is named as a target")


def _find(model: nn.Module, sharing: str) -> Iterator[Occurrence]:
    target = EVERY_TARGET.modules.get(type(model))
    if target is not None:
        site = Site("", "module", target.name, reason="the model itself is the activation, and nothing holds it")
        yield Occurrence(site, model, module_in(()))
        return
    modules = list(model.named_modules())
    backwards = [owner for _, owner in modules if isinstance(owner, fx.GraphModule) and holds_backward(owner.graph)]
    scripts: list[str] = []
    tests: list[_Test] = []
    for prefix, owner in modules:
        if isinstance(owner, Expansion | Kept) or (owner is not model and function_of(owner) is not None):
            continue
        if isinstance(owner, torch.jit.ScriptModule):
            if not any(prefix.startswith(f"{outer}.") for outer in scripts if outer) and "" not in scripts:
                yield from scripted(prefix, owner)
            scripts.append(prefix)
            continue
        inside = nodes(prefix, owner, backwards) if isinstance(owner, fx.GraphModule) else calls(prefix, owner, sharing)
        tests += _tests(prefix, owner)
        for occurrence in (
            *attributes(prefix, owner),
            *inside,
            *fused(prefix, owner),
            *children(prefix, owner, sharing),
        ):
            if not _is_named(model, occurrence.site.name) and not occurrence.site.reason:
                occurrence.describe(reason="a name on the way to it is empty or has a dot, by which nothing finds it")
            elif occurrence.places and not occurrence.site.reason:
                occurrence.describe(reason=_tested(occurrence, tests))
            yield occurrence


@dataclass(frozen=True)
class _Test:
    """A module whose code tests whether others, in it, are of a class."""

    prefix: str
    owner: str
    cls: type


def _tests(prefix: str, owner: nn.Module) -> list[_Test]:
    if isinstance(owner, fx.GraphModule):
        return []
    return [_Test(prefix, type(owner).__name__, cls) for cls in tested_classes(source_of(owner))]


def _tested(occurrence: Occurrence, tests: list[_Test]) -> str:
    """Why the code of a module above would take an expansion for something else; empty where it would not."""
    owner, key = occurrence.places[0]
    for test in tests:
        above = not test.prefix or occurrence.site.name.startswith(f"{test.prefix}.")
        if above and isinstance(owner._modules[key], test.cls):
            return f"the code of {test.owner} tests whether it is a {test.cls.__name__}"
    return ""


def _is_named(model: nn.Module, name: str) -> bool:
    """Whether the modules above a site are found by its qualified name, and its own name holds no dot."""
    *path, last = name.split(".")
    owner: nn.Module | None = model
    for key in path:
        owner = None if owner is None else owner._modules.get(key)
    return owner is not None and bool(last)


def _merge_shared(occurrences: list[Occurrence]) -> list[Occurrence]:
    """Makes one occurrence of a module that stands in several places, under its first name."""
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
            merged[identity] = replace(first, site=site, substitute=module_in(places), places=places)
    return list(merged.values())
