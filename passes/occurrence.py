"""`Occurrence`: the record of one activation, which the passes fill in one after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
    """The inputs that one activation received: their histogram, and the channels' number and dimension (last call).

    `problem` says why the site cannot have one expansion per channel; it is empty if the site can.
    """

    inputs: Histogram
    channels: int | None = None
    channel_dim: int | None = None
    problem: str = "example_inputs do not reach it"


def merged_observation(parts: Sequence[Observation]) -> Observation:
    """What one activation got in several processes."""
    reached = [part for part in parts if part.channels is not None or part.inputs.samples]
    if not reached:
        return parts[0]
    first, problem = reached[0], next((part.problem for part in reached if part.problem), "")
    for part in reached:
        if not problem and (part.channels, part.channel_dim) != (first.channels, first.channel_dim):
            problem = "processes call it with different channels, or with channels in different dimensions"
    return Observation(Histogram.merged([part.inputs for part in parts]), first.channels, first.channel_dim, problem)


@dataclass(eq=False)
class Occurrence:
    """One activation of a model: how it was found, and what each pass decides about it.

    Attributes:
        site: the description for the user.
        owner: the module that gets the expansion as a child.
        substitute: the function that puts an expansion in this place.
        reference: the scalar function of the activation; None if it is known only at run time.
        places: the modules that hold the activation as a child, each with the child's name.
        match: the nodes of the activation in a graph.
        backward: the backward node of the activation in the same graph; it is replaced together with the activation.
        nodes: the graph nodes that carry the site as a note.
        advice: what a user of the rewritten model has to know of it besides; empty if nothing.
        guard: why it is no activation unless the targets name it; empty where it is one.
        config: the chosen config; None before `choose`, and for a site that is left.
        seen: the inputs measured in a copy of the model; None if no config needs them.
        expansion: the module that replaces the activation.
        decided: whether `choose` has handled the occurrence.
        started: whether `initialise` has handled it.
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
    advice: str = ""
    config: ExpansionConfig | None = None
    seen: Observation | None = None
    expansion: LearnableExpansion | None = None
    decided: bool = False
    started: bool = False

    def note(self) -> int:
        """Writes the site on its nodes; returns how many nodes changed."""
        changed = 0
        for node in self.nodes:
            changed += node.meta.get(NOTE) != self.site
            node.meta[NOTE] = self.site
        return changed

    def describe(self, **changes: Any) -> None:
        """Changes fields of the site."""
        if any(getattr(self.site, name) != value for name, value in changes.items()):
            self.site = Site(**{**vars(self.site), **changes})  # `dataclasses.replace` takes half as long again
