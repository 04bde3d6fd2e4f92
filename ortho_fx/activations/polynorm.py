"""`PolyNormActivation`: a sum of normalised powers. Each output depends on all of a row, so it is no expansion."""

from __future__ import annotations

import math

import torch
from numpy.polynomial import Polynomial
from torch import Tensor, nn

from ortho_fx.arguments import is_integer, is_number
from ortho_fx.bases import HERMITE
from ortho_fx.config import DEPTH, depth_of
from ortho_fx.errors import OrthoFxError

_DEGREES = range(1, 9)


class PolyNormActivation(nn.Module):
    r"""y = sum_{i=1..n} w_i x^i / rms(x^i) + b, with rms(v) = sqrt(mean(v^2) + eps) over one dimension.

    The weights w and the bias b learn. The result does not depend on the scale of x, up to eps, and powers do not grow
    from layer to layer. It is no function of one number: `rewrite_` puts it nowhere, and models are built with it.

    Shape: x `(*)`, floating point, with at least one dimension; output `(*)` with x's dtype. Half precision is computed
    in float32. `weight` has shape `(degree,)` and `bias` `(1,)`.

    Args:
        degree: n, from 1 to 8.
        init: "stable" (equal weights such that the output has the mean square 1 for x of N(0, 1)), "paper" (1 / n), or
            "depth:L" (for a plain network of L layers: over many features the polynomial of the Hermite expansion with
            that init). The bias starts at 0, and with "depth:L" at the constant of that polynomial.
        dim: the dimension that is normalised, the features.
        eps: what is added to mean squares; above zero.

    Raises:
        OrthoFxError: a wrong setting; at the call, an input that is not floating point or has no such dimension.

    Source: Zhuo et al., "Polynomial composition activations", arXiv 2411.03884.

    Examples:
        >>> PolyNormActivation()(torch.randn(4, 16)).shape
        torch.Size([4, 16])
    """

    def __init__(
        self,
        degree: int = 3,
        init: str = "stable",
        *,
        dim: int = -1,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not is_integer(degree) or degree not in _DEGREES:
            raise OrthoFxError(f"degree of PolyNorm must be an integer from 1 to {_DEGREES[-1]}; got {degree!r}")
        depth = depth_of(init) if isinstance(init, str) and init.startswith(DEPTH) else None
        if depth is None and init not in ("stable", "paper"):
            raise OrthoFxError(f"init of PolyNorm must be stable, paper or depth:L; got {init!r}")
        if not is_integer(dim):
            raise OrthoFxError(f"dim must be an integer; got {dim!r}")
        if not is_number(eps) or eps <= 0:
            raise OrthoFxError(f"eps must be a finite number above zero; got {eps!r}")
        self.degree, self.dim, self.eps = degree, dim, float(eps)
        if depth is None:
            bias, *weight = 0.0, *[_unit_weight(degree) if init == "stable" else 1 / degree] * degree
        else:
            bias, *weight = _deep_weights(degree, depth)
        self.weight = nn.Parameter(torch.tensor(weight, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.tensor([bias], device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """The sum of normalised powers."""
        if not x.is_floating_point() or not -x.dim() <= self.dim < x.dim():
            raise OrthoFxError(
                f"PolyNorm takes a floating-point tensor with a dimension {self.dim}; got {x.dtype} of shape "
                f"{tuple(x.shape)}"
            )
        z = x.double() if x.dtype == torch.float64 else x.float()
        # The powers of x / max|x| do not overflow, and have the same directions.
        largest = z.detach().abs().amax(self.dim, keepdim=True) if x.numel() else torch.ones_like(z)
        scale = torch.where(largest > 0, largest, 1.0)
        unit, y = z / scale, self.bias.to(z.dtype)
        power = torch.ones_like(unit)
        for i in range(self.degree):
            power = power * unit
            eps = self.eps / scale ** (2 * (i + 1))
            y = y + self.weight[i].to(z.dtype) * power * torch.rsqrt(power.square().mean(self.dim, True) + eps)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"degree={self.degree}, dim={self.dim}"


def _moment(order: int) -> float:
    """E[x^order] for x of N(0, 1): (order - 1)!! for an even order."""
    return 0.0 if order % 2 else float(math.prod(range(1, order, 2)))


def _unit_weight(degree: int) -> float:
    """1 / sqrt(sum_ij E[x^(i+j)] / sqrt(E[x^2i] E[x^2j])) for x of N(0, 1)."""
    orders = range(1, degree + 1)
    total = math.fsum(_moment(i + j) / math.sqrt(_moment(2 * i) * _moment(2 * j)) for i in orders for j in orders)
    return 1 / math.sqrt(total)


def _deep_weights(degree: int, depth: int) -> list[float]:
    """The bias and the weights whose powers sum up to the Hermite start for `depth` layers, for x of N(0, 1)."""
    polynomial = HERMITE.series(HERMITE.deep_start(degree, depth)).convert(kind=Polynomial).coef
    return [float(c) * math.sqrt(_moment(2 * i)) for i, c in enumerate(polynomial)]
