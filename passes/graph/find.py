"""find: lists the activations, and notes each on the nodes that compute it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx, nn

from ortho_fx.passes.context import Context, Entry
from ortho_fx.passes.find import Occurrence, list_occurrences
from ortho_fx.passes.sites import NOTE


def find(model: nn.Module, context: Context) -> int:
    """Lists every activation, gates included, and notes its `Site` on its nodes; the number of notes that are new."""
    known = {entry.site.name for entry in context.entries}
    calls = _calls_of_modules(context.graphs)
    edits = 0
    for occurrence in list_occurrences(model, share=context.share):
        if occurrence.site.name not in known:
            entry = Entry(occurrence, occurrence.site, _nodes_of(occurrence, calls))
            context.entries.append(entry)
            if any(_is_unknown(node, entry) for node in entry.nodes):
                edits += entry.note()
    return edits


def _is_unknown(node: fx.Node, entry: Entry) -> bool:
    note = node.meta.get(NOTE)
    return note is None or (note.name, note.function) != (entry.site.name, entry.site.function)


def _calls_of_modules(graphs: Iterable[fx.GraphModule]) -> dict[int, list[fx.Node]]:
    """The nodes that call a child, by the identity of that child."""
    calls: dict[int, list[fx.Node]] = {}
    for owner in graphs:
        for node in owner.graph.nodes:
            if node.op == "call_module":
                calls.setdefault(id(owner.get_submodule(str(node.target))), []).append(node)
    return calls


def _nodes_of(occurrence: Occurrence, calls: dict[int, list[fx.Node]]) -> tuple[fx.Node, ...]:
    if occurrence.match is not None:
        return (occurrence.match.node,)
    children = {id(owner._modules[key]) for owner, key in occurrence.places}
    return tuple(node for child in children for node in calls.get(child, ()))
