"""`GatedExpansion`: an expansion as the gate of a gated linear unit, expansion(a) * b."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ortho_fx.activations.expansion import ExpansionActivation, make_activation
from ortho_fx.config import ExpansionConfig
from ortho_fx.errors import OrthoFxError


class GatedExpansion(nn.Module):
    r"""y = f(a) b, elementwise, with a learnable expansion f in the place of SwiGLU's SiLU or GeGLU's GELU.

    It takes a and b as two tensors, or one tensor whose halves they are. `torch.compile` makes one kernel of it in the
    forward pass. In the backward pass on a GPU one kernel computes both inputs' gradients and the sums of the
    coefficients'. Halves of one tensor take one kernel each there. On a CPU, large tensors take one kernel for each
    input, and the gradients of halves are copied once more.

    Gains: for independent a and b of N(0, 1), E[y^2] = E[f^2], and the gradients grow by E[f'^2] to a and by E[f^2] to
    b. With init "stable" all three are 1. `gains(module)` has the forward gain, and the mean of both backward gains.
    Its slope is above 1, as that of any product: a plain stack of products needs normalisation.

    Shape: a and b `(*)` of one shape, or one tensor with twice as many elements in dimension `dim`; output `(*)`.

    Args:
        config: the expansion, as an `ExpansionConfig` or a short form ("hermite3"); it becomes a gated one.
        dim: the dimension whose halves a single input has.
        gate_last: whether the second half, or the second input, is a.
        channels, channel_dim, reference, device, dtype: of the expansion, as in `ExpansionActivation`.

    Raises:
        OrthoFxError: a wrong setting; at the call, two tensors of different shapes, or an odd number of elements.

    Source: Shazeer, "GLU variants improve transformer", arXiv 2002.05202.

    Examples:
        >>> gate = GatedExpansion("hermite3")
        >>> gate(torch.randn(4, 16)).shape
        torch.Size([4, 8])
    """

    def __init__(
        self,
        config: ExpansionConfig | str | None = None,
        *,
        dim: int = -1,
        gate_last: bool = False,
        channels: int | None = None,
        channel_dim: int | None = None,
        reference: Callable[[Tensor], Tensor] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.gate_last = dim, gate_last
        described = replace(ExpansionConfig.of(config if config is not None else ExpansionConfig()), gated=True)
        settings: dict[str, Any] = {"channels": channels, "channel_dim": channel_dim, "reference": reference}
        self.expansion: ExpansionActivation = make_activation(described, **settings, device=device, dtype=dtype)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """f(a) b."""
        if other is None:
            if not isinstance(x, fx.Proxy) and (x.dim() == 0 or x.shape[self.dim] % 2):
                raise OrthoFxError(
                    f"GatedExpansion splits dimension {self.dim} into halves; got shape {tuple(x.shape)}, with an odd "
                    "number of elements there: pass two tensors of one shape, or an even number"
                )
            x, other = x.chunk(2, self.dim)
        elif not isinstance(x, fx.Proxy) and x.shape != other.shape:
            raise OrthoFxError(
                f"GatedExpansion multiplies tensors of one shape; got {tuple(x.shape)} and {tuple(other.shape)}"
            )
        gate, value = (other, x) if self.gate_last else (x, other)
        return self.expansion(gate) * value

    def extra_repr(self) -> str:
        return f"dim={self.dim}" + ", gate_last=True" * self.gate_last
