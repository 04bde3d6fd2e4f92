"""`Context`: what a run of the passes is asked for, and the record that they keep of every site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from ortho_fx.batches import Batch
from ortho_fx.config import ExpansionConfig
from ortho_fx.errors import OrthoFxError
from ortho_fx.passes.expansions import Calibrate, Factory, LearnableExpansion
from ortho_fx.passes.find import Occurrence
from ortho_fx.passes.observe import Observation
from ortho_fx.passes.sites import NOTE, Site
from ortho_fx.passes.targets import TargetTable

ConfigMap = Mapping[str, ExpansionConfig | None]


def shares(sharing: str) -> bool:
    """Whether an activation that several places share stays one.

    Raises:
        OrthoFxError: a word that says neither.
    """
    if sharing not in ("instance", "site"):
        raise OrthoFxError(f"sharing must be instance or site; got {sharing!r}")
    return sharing == "instance"


@dataclass(eq=False)
class Entry:
    """One site on its way through the passes: each pass fills in what it decides.

    Attributes:
        occurrence: how it was found, and what replaces it.
        site: what the user reads of it.
        nodes: the nodes of graphs that carry it as a note.
        config: the expansion that was chosen; None until then, and for a site that is left.
        seen: what reached it in a copy of the model, where a config asks for that.
        expansion: the module that replaces it.
        decided, started: whether `choose` and `initialise` have been over it.
    """

    occurrence: Occurrence
    site: Site
    nodes: tuple[fx.Node, ...] = ()
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
        self.site = Site(**{**vars(self.site), **changes})


@dataclass(eq=False)
class Context:
    """What one run of the passes is asked for, and what it has found and made.

    Attributes:
        config: one config, or a map from patterns of site names to configs.
        table: the activation functions to replace.
        share: whether an activation that several places share stays one.
        example_inputs: what to run a copy of the model with; None where no config asks for it.
        factory, calibrate: how expansions are made, and started for measured inputs.
        replaces: whether the run comes to `substitute`; if so, a model with nothing to replace is an error.
        graphs: the graph modules in the model: itself, and those of regions such as checkpointed ones.
        entries: the sites, in the order of the model's modules and of the nodes of a graph.
        earlier: how many expansions the model held before.
        unchanged: a copy of the model from before the first edit, where inputs have to be measured.
    """

    config: ExpansionConfig | ConfigMap | None
    table: TargetTable
    share: bool
    example_inputs: Batch | None
    factory: Factory
    calibrate: Calibrate
    replaces: bool = True
    graphs: tuple[fx.GraphModule, ...] = ()
    entries: list[Entry] = field(default_factory=list)
    earlier: int = 0
    unchanged: nn.Module | None = None
