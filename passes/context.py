"""`Context`: what a run of the passes is asked for, and the activations that it has found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import fx, nn

from ortho_fx.batches import Batch
from ortho_fx.config import ExpansionConfig
from ortho_fx.errors import OrthoFxError
from ortho_fx.passes.occurrence import Occurrence
from ortho_fx.passes.vocabulary.expansions import Maker
from ortho_fx.passes.vocabulary.targets import TargetTable

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

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
class Context:
    """What one run of the passes is asked for, and what it has found and made.

    Attributes:
        config: one config, or a map from patterns of site names to configs.
        table: the activation functions to replace.
        share: whether an activation that several places share stays one.
        example_inputs: what to run a copy of the model with; None where no config asks for it.
        maker: how expansions are made, and started for measured inputs.
        replaces: whether the run comes to `substitute`; if so, a model with nothing to replace is an error.
        graphs: the graph modules in the model: itself, and those of regions such as checkpointed ones.
        occurrences: the sites, in the order of the model's modules and of the nodes of a graph.
        earlier: how many expansions the model held before.
        process_group: the processes whose example_inputs count; all of them for None, "alone" for this one only.
        unchanged: a copy of the model from before the first edit, where inputs have to be measured.
    """

    config: ExpansionConfig | ConfigMap | None
    table: TargetTable
    share: bool
    example_inputs: Batch | None
    maker: Maker
    replaces: bool = True
    graphs: tuple[fx.GraphModule, ...] = ()
    occurrences: list[Occurrence] = field(default_factory=list)
    earlier: int = 0
    process_group: ProcessGroup | str | None = None
    unchanged: nn.Module | None = None
