"""lower: puts the operator of its basis in the place of every call of an expansion.

A backend that takes the graph as it is then sees one node, `torch.ops.ortho_fx.<basis>(x, *parameters)`. What reaches
for the module (hooks, `freeze_`, `calibrate_`) has to come before; `revert_` puts the calls back first. A call stays
where the expansion has hooks, or does more than its operator, as with a clamp.
"""

from __future__ import annotations

from torch import nn

from ortho_fx.passes.context import Context
from ortho_fx.passes.graph.operators import lower_calls


def lower(model: nn.Module, context: Context) -> int:
    """Puts operators in the place of the calls of expansions, those of earlier runs as well; how many."""
    return sum(map(lower_calls, context.graphs))
