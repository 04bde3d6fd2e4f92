"""The operators `torch.ops.ortho_fx.<basis>(x, *parameters, channel_dim)`: one node in a graph, with its own backward.

Each basis gets two operators, `<basis>` and `<basis>_backward`, which save only the input and the parameters. In eager
mode they run in blocks that stay in the cache (`eager`). In a graph there are three cases:

- Inductor lowers them to kernels of our own (`lowering`); the first trace with such an operator imports that module.
- If that is not possible, Inductor gets plain tensor operations that it fuses well (`decomposition`).
- Any other trace below autograd (`torch.export`'s `run_decompositions`, other backends) gets the differentiable
  formulas (`formulas`).

`support` decides between the first two and tells the user; `registration` has autograd and `vmap`.

Parameters of shape (size,) make one expansion for the whole tensor. Those of shape (size, groups) make one for each
group of neighbouring channels: the input's dimension `channel_dim` is split into groups, and gradients are summed over
everything else.

Arithmetic runs in float32 for half-precision inputs and in the input's dtype otherwise. The output has the input's
dtype; in float16 it is clamped to the largest finite number. Under autocast an operator keeps the dtype of its input,
as `F.gelu` does.
"""

from __future__ import annotations

from torch import Tensor

from ortho_fx.bases import Basis
from ortho_fx.operators.registration import CHANNEL_DIM, by_position, operator

__all__ = ["by_position", "expand", "operator"]


def expand(basis: Basis, x: Tensor, *parameters: Tensor, channel_dim: int = CHANNEL_DIM) -> Tensor:
    """y(x), computed by the operator of the basis."""
    return operator(basis)(x, *parameters, channel_dim)
