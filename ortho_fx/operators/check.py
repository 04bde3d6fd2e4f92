"""`python -m ortho_fx.operators.check BASIS DEVICE`: does the lowering work on this release of PyTorch?

Compiles expansions of one basis, one for a whole tensor and one per channel, forward and backward, with the lowering
and in plain tensor operations. The lowering works if values and gradients agree with eager float64, and if it takes
hardly more kernels. `support` runs this once per installation, on a release on which the lowering was not tested. The
last line of the standard output is a JSON object: `wrong` describes the failure, or is null.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import Tensor

from ortho_fx.bases import Basis, basis_named
from ortho_fx.config import ExpansionConfig
from ortho_fx.numerics.initialisation import initial_parameters
from ortho_fx.operators import formulas, generated_code, support
from ortho_fx.operators.registration import operator

_SHAPE = (64, 48)
# For whole tensors both forms take the same number of kernels, up to one that prepares a parameter. A lowering that no
# longer fuses takes one more kernel for each sum.
_MORE_KERNELS = 1.25


def wrong(basis: Basis, device: str) -> str | None:
    """What is wrong with the lowering of a basis; None if it works."""
    cases = [_case(basis, device, groups) for groups in (None, _SHAPE[1])]
    try:
        values, kernels = _compiled(basis, cases)
    except Exception as error:
        (line, *_) = str(error).strip().splitlines() or [""]
        return f"on PyTorch {torch.__version__} the fused lowering raised {type(error).__name__}: {line}"
    if support.reason(basis) is not None:
        return support.reason(basis)
    for actual, expected in zip(values, _exact(basis, cases), strict=True):
        off = (actual.double() - expected).norm() / expected.norm()
        if not off < 1e-4:
            return f"on PyTorch {torch.__version__} the fused lowering computes another number: off by {off:.1e}"
    with support.without_lowering():
        _, plain = _compiled(basis, cases)
    if kernels > _MORE_KERNELS * plain:
        return f"on PyTorch {torch.__version__} the fused lowering takes {kernels} kernels, without it {plain}"
    return None


def _case(basis: Basis, device: str, groups: int | None) -> list[Tensor]:
    """An input, the gradient of the output, and parameters that differ between groups."""
    start = initial_parameters(ExpansionConfig(basis.name))
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(_SHAPE, generator=generator) for _ in range(2)]
    for parameter in basis.parameters:
        value = torch.from_numpy(start[parameter.name]).float()
        value = value if groups is None else value.unsqueeze(1).expand(-1, groups)
        tensors.append(value + 0.1 * torch.randn(value.shape, generator=generator))
    return [tensor.to(device) for tensor in tensors]


def _compiled(basis: Basis, cases: list[list[Tensor]]) -> tuple[list[Tensor], int]:
    """Values and gradients, and the number of kernels."""
    torch.compiler.reset()
    inputs = [[x.clone().requires_grad_(), *(p.clone().requires_grad_() for p in rest)] for x, _, *rest in cases]
    with generated_code.generated_code() as codes:
        compiled = torch.compile(lambda *cases: [operator(basis)(*case, 1) for case in cases])
        ys = compiled(*inputs)
        torch.autograd.backward(ys, [case[1] for case in cases])
    kernels = sum(generated_code.count_kernels(codes).values())
    results: list[Any] = []
    for y, tensors in zip(ys, inputs, strict=True):
        learned = [t.grad for t, p in zip(tensors[1:], basis.parameters, strict=True) if p.learnable]
        results += [y.detach(), tensors[0].grad, *learned]
    return results, kernels


def _exact(basis: Basis, cases: list[list[Tensor]]) -> list[Tensor]:
    """Values and gradients in float64, by the formulas."""
    results = []
    for case in cases:
        x, grad, *parameters = (tensor.double() for tensor in case)
        results.append(formulas.forward_formula(basis)(x, *parameters, channel_dim=1))
        results += formulas.backward_formula(basis)(grad, x, *parameters, channel_dim=1)
    return results


if __name__ == "__main__":
    print(json.dumps({"wrong": wrong(basis_named(sys.argv[1]), sys.argv[2])}))
