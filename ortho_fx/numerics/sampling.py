"""Evaluates a user's elementwise function and its derivative at points, and checks the results."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ortho_fx.errors import OrthoFxError


def name_of(function: Callable[[Tensor], Tensor]) -> str:
    """The name of a function in messages."""
    if isinstance(function, nn.Module):
        return type(function).__name__
    return getattr(function, "__name__", None) or str(function)


def differentiated(function: Callable[[Tensor], Tensor], points: Tensor) -> tuple[Tensor, Tensor]:
    """The values and, by autograd, the derivatives of a function at points (float64, one dimension).

    Raises:
        OrthoFxError: a function that returns another shape, NaN, or a tensor without a gradient.
    """
    name = name_of(function)
    with torch.inference_mode(False), torch.enable_grad():  # the caller may be in any mode
        x = points.clone().requires_grad_()
        y = function(x)
        if not isinstance(y, Tensor) or y.shape != x.shape:
            got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise OrthoFxError(f"{name} must return a tensor of its input's shape {tuple(x.shape)}; got {got}")
        if not y.is_floating_point():
            raise OrthoFxError(f"{name} must return real floating-point numbers; got {y.dtype}")
        if y.isnan().any():
            raise OrthoFxError(f"{name} returns NaN at x = {x.detach()[y.isnan()][0].item():g}")
        if not y.requires_grad:
            raise OrthoFxError(f"{name} returns a tensor without a gradient")
        (slope,) = torch.autograd.grad(y.sum(), x)
    return y.detach(), slope
