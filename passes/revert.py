"""Puts back the activations that expansions replaced, for every kind of site."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx, nn

from ortho_fx.errors import OrthoFxError
from ortho_fx.passes.graph.nodes import restore_nodes
from ortho_fx.passes.graph.operators import raise_calls
from ortho_fx.passes.modules.exchange import is_forgotten, restore_attribute, restore_module, set_nested_paths
from ortho_fx.passes.modules.undecayed import set_no_weight_decay
from ortho_fx.passes.source.calls import restore_call
from ortho_fx.passes.source.classes import source_of
from ortho_fx.passes.vocabulary.expansions import Expansion, Substitute


def revert_expansions(model: nn.Module, chosen: Callable[[nn.Module], bool]) -> tuple[str, ...]:
    """Puts back the activations that the chosen expansions replaced; returns the names of these expansions."""
    places = [
        (f"{prefix}.{key}" if prefix else key, owner, key)
        for prefix, owner in model.named_modules()
        for key, child in owner._modules.items()
        if child is not None and "_replaced" in vars(child) and chosen(child) and _is_in_place(owner, key, child)
    ]
    for name, owner, key in places:
        expansion = owner._modules[key]
        (replaced,) = vars(expansion)["_replaced"]
        if replaced.kind == "pair":
            raise OrthoFxError(f"{name} stands in a graph that holds its backward, which cannot be put back")
        assert isinstance(expansion, Expansion)
        if expansion.config.granularity == "model" and is_forgotten(owner, key, replaced.value):
            kind = type(replaced.value).__name__
            raise OrthoFxError(
                f"{name}: the copy of a graph or of a container does not know which {kind} stood there: call revert_ "
                "on the model that was rewritten, and copy it afterwards"
            )
    for owner in model.modules():
        if isinstance(owner, fx.GraphModule):
            raise_calls(owner, lambda module: "_replaced" in vars(module) and chosen(module))
    given: set[nn.Module] = set()
    for _, owner, key in places:
        expansion = owner._modules[key]
        assert isinstance(expansion, Expansion)
        # Sites that shared an expansion by its config had an activation each.
        restore(owner, key, copied=expansion.config.granularity == "model" and expansion in given)
        given.add(expansion)
    set_nested_paths(model)
    set_no_weight_decay(model)
    return tuple(name for name, _, _ in places)


def _is_in_place(owner: nn.Module, key: str, expansion: nn.Module) -> bool:
    # A library of adapters holds expansions in modules of its own, whose code calls nothing else.
    return vars(expansion)["_replaced"][0].kind != "call" or key in source_of(owner).replaced


def restore(owner: nn.Module, key: str, *, copied: bool = False) -> None:
    """Puts the replaced activation, or a copy of it, back in one place that holds its expansion."""
    (replaced,) = vars(owner._modules[key])["_replaced"]
    if replaced.kind == "module":
        restore_module(owner, key, replaced.value, copied)
    elif replaced.kind == "attribute":
        restore_attribute(owner, key, replaced.value, copied)
    elif replaced.kind == "call":
        restore_call(owner, key)
    else:
        assert isinstance(owner, fx.GraphModule)
        restore_nodes(owner, key, replaced.value)


def put_in_copy(put: Substitute, expansion: nn.Module) -> None:
    """Puts an expansion of a model also into a copy of the model. `restore` still puts back the model's activation."""
    replaced = expansion._replaced
    put(expansion)
    expansion._replaced = replaced
