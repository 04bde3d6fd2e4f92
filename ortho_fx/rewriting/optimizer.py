"""`param_groups`: an optimizer's parameter groups for a model with expansions."""

from __future__ import annotations

from typing import Any

from torch import nn

from ortho_fx.activations.expansion import ExpansionActivation
from ortho_fx.arguments import checked_model, is_number
from ortho_fx.errors import OrthoFxError


def param_groups(
    model: nn.Module, *, lr: float, weight_decay: float = 0.0, expansion_lr: float | None = None
) -> list[dict[str, Any]]:
    """Groups for `torch.optim`: weights with decay, parameters without, and expansions with their own learning rate.

    Matrices and convolution kernels decay. Biases, scales, the parameters of normalisations, and all parameters of
    expansions do not: decay would pull an activation towards zero. Parameters that need no gradient are left out,
    shared parameters are listed once, and empty groups are dropped.

    Args:
        model: a model, rewritten or not.
        lr: learning rate of the model's own parameters.
        weight_decay: decay of matrices and convolution kernels.
        expansion_lr: learning rate of the expansions; `lr` when omitted.

    Returns:
        Up to three dicts with "name", "params" (a list of parameters), "lr" and "weight_decay".

    Raises:
        OrthoFxError: a rate or a decay below zero, or a lazy module that has not been called yet.
    """
    for name, value in (("lr", lr), ("weight_decay", weight_decay), ("expansion_lr", expansion_lr)):
        if value is not None and not (is_number(value) and value >= 0):
            raise OrthoFxError(f"{name} must be a number, zero or more; got {value!r}")
    groups: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": [], "expansions": []}
    # Those of a parametrization are inside of the expansion, in modules of PyTorch's.
    learned = {
        id(parameter)
        for module in checked_model(model).modules()
        if isinstance(module, ExpansionActivation)
        for parameter in module.parameters()
    }
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            if isinstance(parameter, nn.UninitializedParameter):
                raise OrthoFxError(f"{prefix}.{name} has no shape yet: call the model once, for its lazy modules")
            seen.add(id(parameter))
            if id(parameter) in learned:
                group = "expansions"
            elif name == "bias" or parameter.dim() < 2 or "norm" in type(module).__name__.lower():
                group = "no_decay"
            else:
                group = "decay"
            groups[group].append(parameter)
    rates = {"decay": lr, "no_decay": lr, "expansions": lr if expansion_lr is None else expansion_lr}
    decays = {"decay": weight_decay, "no_decay": 0.0, "expansions": 0.0}
    return [
        {"name": name, "params": parameters, "lr": rates[name], "weight_decay": decays[name]}
        for name, parameters in groups.items()
        if parameters
    ]
