"""Finds the activations that are child modules, or functions that a module keeps as attributes."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator

import torch
from torch import nn

from ortho_fx.passes.modules.exchange import attribute_of, module_in
from ortho_fx.passes.occurrence import Occurrence
from ortho_fx.passes.source.classes import may_activate
from ortho_fx.passes.source.occurrences import calls, calls_of_child
from ortho_fx.passes.vocabulary.expansions import Expansion
from ortho_fx.passes.vocabulary.recognise import (
    OWN_ATTRIBUTES,
    computes_unknown_function,
    function_of,
    recognise,
    recognise_module,
)
from ortho_fx.passes.vocabulary.sites import Site, join
from ortho_fx.passes.vocabulary.targets import BY_NAME


def children(prefix: str, owner: nn.Module, share: bool) -> Iterator[Occurrence]:
    for key, child in owner._modules.items():
        if child is None or isinstance(child, Expansion):
            continue
        name, function, places = join(prefix, key), function_of(child), ((owner, key),)
        if function is not None:
            calls = () if share else calls_of_child(prefix, owner, key)
            if calls:
                yield from calls
                continue
            site = Site(name, "module", function)
            yield Occurrence(site, owner, module_in(places), recognise_module(child), places)
        elif computes_unknown_function(child) and not any(_inside(child)):
            trait = "learns parameters of its own" if any(True for _ in child.parameters()) else "is in no table"
            site = Site(name, "module", type(child).__name__, reason=f"its function {trait}")
            yield Occurrence(site, owner, module_in(places), places=places)


def _inside(module: nn.Module) -> Iterator[Occurrence]:
    """The activations, without gates, that are attributes of a module or calls in its own code."""
    for occurrence in (*attributes("", module), *calls("", module)):
        target = BY_NAME.get(occurrence.site.function)
        if target is not None and not target.gate:
            yield occurrence


def _may_compute_one(kept: object) -> bool:
    """Whether an attribute of a module is a function or another callable that may hold activations."""
    code = kept if isinstance(kept, types.FunctionType) else type(kept).__dict__.get("__call__")
    return not isinstance(kept, nn.Module | type) and isinstance(code, types.FunctionType) and may_activate(code)


_KEPT = (types.BuiltinFunctionType, types.FunctionType, functools.partial, torch.jit.ScriptFunction, nn.Module)


def attributes(prefix: str, owner: nn.Module) -> Iterator[Occurrence]:
    for key, value in vars(owner).items():
        if key in OWN_ATTRIBUTES:
            continue
        if isinstance(value, _KEPT):
            reference = recognise(value)
            if reference is not None:
                site = Site(join(prefix, key), "attribute", reference.target)
                yield Occurrence(site, owner, attribute_of(owner, key), reference)
                continue
        if _may_compute_one(value):
            reason = "it is kept as a function or an object that is more than an activation, or no module"
            yield Occurrence(Site(join(prefix, key), "attribute", "activation", reason=reason), owner, module_in(()))
        elif isinstance(value, list | tuple | dict):
            for item, kept in value.items() if isinstance(value, dict) else enumerate(value):
                function = function_of(kept) if isinstance(kept, nn.Module) else None
                registered = any(kept is child for child in owner._modules.values())
                if function is not None and not (registered and isinstance(value, list)):
                    reason = (
                        f"PyTorch does not see a module in a {type(value).__name__}: use nn.ModuleList or nn.ModuleDict"
                    )
                    site = Site(f"{join(prefix, key)}[{item!r}]", "attribute", function, reason=reason)
                    yield Occurrence(site, owner, module_in(()))
