"""find: lists the activations, and notes each on the nodes that compute it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx, nn

from ortho_fx.passes.context import Context
from ortho_fx.passes.occurrence import Occurrence
from ortho_fx.passes.search import list_occurrences
from ortho_fx.passes.vocabulary.sites import NOTE


def find(model: nn.Module, context: Context) -> int:
    """Lists every activation, gates included, and notes its `Site` on its nodes; returns the number of new notes."""
    known = {one.site.name for one in context.occurrences}
    calls = _calls_of_modules(context.graphs)
    edits = 0
    for one in list_occurrences(model, sharing=context.sharing):
        if one.site.name not in known:
            one.nodes = _nodes_of(one, calls)
            context.occurrences.append(one)
            if any(_is_unknown(node, one) for node in one.nodes):
                edits += one.note()
    return edits


def _is_unknown(node: fx.Node, one: Occurrence) -> bool:
    note = node.meta.get(NOTE)
    return note is None or (note.name, note.function) != (one.site.name, one.site.function)


def _calls_of_modules(graphs: Iterable[fx.GraphModule]) -> dict[int, list[fx.Node]]:
    """The nodes that call each child, by the `id` of the child."""
    calls: dict[int, list[fx.Node]] = {}
    for owner in graphs:
        for node in owner.graph.nodes:
            if node.op == "call_module":
                calls.setdefault(id(owner.get_submodule(str(node.target))), []).append(node)
    return calls


def _nodes_of(one: Occurrence, calls: dict[int, list[fx.Node]]) -> tuple[fx.Node, ...]:
    if one.match is not None:
        return (one.match.node,)
    children = {id(owner._modules[key]) for owner, key in one.places}
    return tuple(node for child in children for node in calls.get(child, ()))
