"""Activation modules: drop-in replacements for nn.GELU and its like, with learnable coefficients."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ortho_fx.bases import BASES, FOURIER, HERMITE, TROPICAL, TROPICAL_RATIONAL, Basis
from ortho_fx.config import ExpansionConfig
from ortho_fx.errors import OrthoFxError
from ortho_fx.initialisation import initial_parameters
from ortho_fx.moments import Values
from ortho_fx.operators import expand


class ExpansionActivation(nn.Module):
    """An elementwise activation y(x) that is learned as an expansion in a basis; the common part of all of them.

    Shape: input `(*)` of any floating dtype, output `(*)` of the same dtype. Half-precision inputs are computed in
    float32. The parameters are tensors of one dimension, and their names are those of the basis.

    Raises:
        OrthoFxError: a wrong degree or init at construction, an input that is not floating point at the call.
    """

    basis: ClassVar[Basis]

    def __init__(
        self,
        degree: int | None = None,
        init: str = "stable",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = ExpansionConfig(basis=self.basis.name, degree=degree, init=init)
        assert self.config.degree is not None
        for parameter in self.basis.parameters:
            values = torch.empty(parameter.size(self.config.degree), device=device, dtype=dtype)
            if parameter.learnable:
                self.register_parameter(parameter.name, nn.Parameter(values))
            else:
                self.register_buffer(parameter.name, values)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets every parameter to its initial value, as `config.init` says."""
        assert self.config.degree is not None
        self.set_parameters(initial_parameters(self.config.basis, self.config.degree, self.config.init))

    def set_parameters(self, values: Values) -> None:
        """Copies these values, arrays by the name of the parameter, into the parameters and buffers."""
        with torch.no_grad():
            for name, value in values.items():
                getattr(self, name).copy_(torch.from_numpy(np.asarray(value)))

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise OrthoFxError(f"{type(self).__name__} takes a floating-point tensor; got {x.dtype}")
        return expand(self.basis, x, *(getattr(self, parameter.name) for parameter in self.basis.parameters))

    def extra_repr(self) -> str:
        return f"degree={self.config.degree}, init={self.config.init!r}"


class HermiteActivation(ExpansionActivation):
    r"""y(x) = \sum_{k=0}^n a_k He_k(x) / k!, with learnable `coefficients` a_0 .. a_n.

    He_k are the probabilists' Hermite polynomials. Degrees 1 to 32; 3 by default.

    Source: Khalfaoui-Hassani and Kesselheim, arXiv 2502.01247.

    Example:
        >>> activation = HermiteActivation(degree=3)
        >>> activation(torch.randn(2, 8)).shape
        torch.Size([2, 8])
    """

    basis = HERMITE


class FourierActivation(ExpansionActivation):
    r"""y(x) = a_0 + \sum_{k=1}^n a_k cos(w_k x - p_k) / k!, with everything learnable.

    Parameters: `constant` a_0 of shape (1,); `coefficients` a_k, `frequencies` w_k (radians per unit of x, starting
    from 1 .. n) and `phases` p_k (radians, starting from pi / 4), each of shape (n,). Degrees 1 to 64; 5 by default.

    Source: Khalfaoui-Hassani and Kesselheim, arXiv 2502.01247.
    """

    basis = FOURIER


class TropicalActivation(ExpansionActivation):
    r"""y(x) = \max_{k=0}^n (s_k x + b_k), convex and piecewise linear, with learnable `offsets` b_0 .. b_n.

    The `slopes` s_0 .. s_n are a buffer: fixed, saved with the model. Degrees 1 to 64; 5 by default.

    Source: Khalfaoui-Hassani and Kesselheim, arXiv 2502.01247, whose scale * max_k (k x + b_k) this is with
    s_k = scale * k and the scale multiplied into the offsets.
    """

    basis = TROPICAL


class TropicalRationalActivation(ExpansionActivation):
    r"""y(x) = \max_k (s_k x + b_k) - \max_k (t_k x + c_k), k = 0 .. n, piecewise linear, with everything learnable.

    Parameters: `slopes` s, `offsets` b, `denominator_slopes` t and `denominator_offsets` c, each of shape (n + 1,); in
    tropical arithmetic a difference is a quotient. Degrees 1 to 64; 6 by default.

    Source: Khalfaoui-Hassani and Kesselheim, arXiv 2502.01247.
    """

    basis = TROPICAL_RATIONAL


_CLASSES: dict[str, type[ExpansionActivation]] = {
    cls.basis.name: cls
    for cls in (HermiteActivation, FourierActivation, TropicalActivation, TropicalRationalActivation)
}
assert _CLASSES.keys() == BASES.keys()


def make_activation(
    config: ExpansionConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> ExpansionActivation:
    """The activation module that a config describes."""
    return _CLASSES[config.basis](config.degree, config.init, device=device, dtype=dtype)
