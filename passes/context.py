"""`Context`: the settings of one run of the passes, and the activations that the run has found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import fx, nn

from ortho_fx.batches import Batch
from ortho_fx.config import ExpansionConfig, SiteConfig
from ortho_fx.errors import OrthoFxError
from ortho_fx.passes.occurrence import Occurrence
from ortho_fx.passes.vocabulary.expansions import Maker
from ortho_fx.passes.vocabulary.targets import TargetTable

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ConfigMap = Mapping[str, ExpansionConfig | None]


SHARINGS = ("instance", "call", "site")


def checked_sharing(sharing: str) -> str:
    """The argument `sharing` of `ortho_fx.rewrite_`.

    Raises:
        OrthoFxError: it is none of `SHARINGS`.
    """
    if sharing not in SHARINGS:
        raise OrthoFxError(f"sharing must be instance, call or site; got {sharing!r}")
    return sharing


@dataclass(eq=False)
class Context:
    """The settings of one run of the passes, and the sites and expansions that the run has found and made.

    Attributes:
        config: one config, or a map from patterns of site names to configs.
        table: the activation functions to replace.
        sharing: which places share an expansion, as in `ortho_fx.rewrite_`.
        example_inputs: the inputs for a run of a copy of the model; None if no config needs them.
        maker: makes expansions, and initialises them for measured inputs.
        replaces: whether the run includes `substitute`; a model with nothing to replace is then an error.
        graphs: the graph modules of the model: the model itself, and inner ones such as checkpointed regions.
        occurrences: the sites, in the order of the model's modules and of the nodes of a graph.
        earlier: how many expansions the model held before.
        process_group: the processes whose example_inputs count; all of them for None, "alone" for this one only.
        known: what is known of sites before any run, by name: their channels need no example_inputs.
        unchanged: a copy of the model from before the first edit; None if no inputs have to be measured.
    """

    config: ExpansionConfig | ConfigMap | None
    table: TargetTable
    sharing: str
    example_inputs: Batch | None
    maker: Maker
    replaces: bool = True
    graphs: tuple[fx.GraphModule, ...] = ()
    occurrences: list[Occurrence] = field(default_factory=list)
    earlier: int = 0
    process_group: ProcessGroup | str | None = None
    known: Mapping[str, SiteConfig] = field(default_factory=dict)
    unchanged: nn.Module | None = None
