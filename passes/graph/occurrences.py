"""Finds the activations that are nodes of a graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import fx

from ortho_fx.passes.graph.nodes import node_in, pair_in
from ortho_fx.passes.graph.pairs import with_derivatives
from ortho_fx.passes.graph.uses import guard_of_match
from ortho_fx.passes.occurrence import Occurrence
from ortho_fx.passes.vocabulary.sites import Site, join


def nodes(prefix: str, owner: fx.GraphModule, backwards: Sequence[fx.GraphModule]) -> Iterator[Occurrence]:
    beside_backward = any(other is not owner for other in backwards)
    for match, derivative in with_derivatives(owner.graph, beside_backward=beside_backward):
        name = f"{match.node.name}_expansion"
        reason = derivative.reason if match.argument is not None else "its input is no tensor of the graph"
        site = Site(join(prefix, name), match.kind, match.function, f"node {match.node.name}", reason=reason)
        put = node_in(owner, match, name)
        if derivative.node is not None:
            put = pair_in(owner, match, derivative.node, name)
        yield Occurrence(
            site, owner, put, match.reference, match=match, backward=derivative.node, guard=guard_of_match(match)
        )
