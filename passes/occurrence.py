"""`Occurrence`: one activation that was found, on its way through the passes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from ortho_fx.config import ExpansionConfig
from ortho_fx.numerics.histogram import Histogram
from ortho_fx.passes.graph.matches import Match
from ortho_fx.passes.vocabulary.expansions import LearnableExpansion, Substitute
from ortho_fx.passes.vocabulary.sites import NOTE, Site
from ortho_fx.passes.vocabulary.targets import Reference


@dataclass
class Observation:
    """What one activation got: all its inputs, and the size and the dimension of their channels (the last call's).

    `problem` says why one expansion a channel cannot be put there; empty where it can.
    """

    inputs: Histogram
    channels: int | None = None
    channel_dim: int | None = None
    problem: str = "example_inputs do not reach it"


@dataclass(eq=False)
class Occurrence:
    """One activation of a model: how it was found, and what each pass decides about it.

    Attributes:
        site: what the user reads of it.
        owner: the module that its expansion becomes a child of.
        substitute: puts an expansion there.
        reference: the scalar function that is computed there; None where that is known only when it runs.
        places: the modules that hold it as a child, with its names there.
        match: what a graph holds of it, and `backward` its backward in the same graph, which is replaced with it.
        nodes: the nodes of graphs that carry the site as a note.
        guard: why it is no activation unless the targets name it; empty where it is one.
        config: the expansion that was chosen; None until then, and for a site that is left.
        seen: what reached it in a copy of the model, where a config asks for that.
        expansion: the module that replaces it.
        decided, started: whether `choose` and `initialise` have been over it.
    """

    site: Site
    owner: nn.Module
    substitute: Substitute
    reference: Reference | None = None
    places: tuple[tuple[nn.Module, str], ...] = ()
    match: Match | None = None
    backward: fx.Node | None = None
    nodes: tuple[fx.Node, ...] = ()
    guard: str = ""
    config: ExpansionConfig | None = None
    seen: Observation | None = None
    expansion: LearnableExpansion | None = None
    decided: bool = False
    started: bool = False

    def note(self) -> int:
        """Writes the site on its nodes; on how many it was not."""
        changed = 0
        for node in self.nodes:
            changed += node.meta.get(NOTE) != self.site
            node.meta[NOTE] = self.site
        return changed

    def describe(self, **changes: Any) -> None:
        """Changes fields of the site."""
        self.site = replace(self.site, **changes)
