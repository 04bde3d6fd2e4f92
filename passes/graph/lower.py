"""lower: replaces every call of an expansion by the operator of its basis.

A backend that takes the graph as it is then sees one node, `torch.ops.ortho_fx.<basis>(x, *parameters)`. Whatever
needs the module (hooks, `freeze_`, `calibrate_`) must run before this pass; `revert_` first puts the calls back. A call
stays if the expansion has hooks, or if it computes more than its operator, for example a clamp.
"""

from __future__ import annotations

from torch import nn

from ortho_fx.passes.context import Context
from ortho_fx.passes.graph.operators import lower_calls


def lower(model: nn.Module, context: Context) -> int:
    """Puts operators in the place of the calls of expansions, those of earlier runs as well; returns how many."""
    return sum(map(lower_calls, context.graphs))
