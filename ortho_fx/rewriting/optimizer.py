"""`param_groups`: an optimizer's parameter groups for a model with expansions."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ortho_fx.arguments import checked_model, is_number
from ortho_fx.errors import OrthoFxError
from ortho_fx.passes.modules.undecayed import KEYWORDS, learned_parameters, names_of
from ortho_fx.passes.vocabulary.sites import join, plain_name
from ortho_fx.rewriting.depth import layers_of

_KINDS = ("decay", "no_decay", "expansions")


def param_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    expansion_lr: float | None = None,
    expansion_decay: float = 0.0,
    layer_decay: float | None = None,
) -> list[dict[str, Any]]:
    r"""Groups for `torch.optim`: weights with decay, parameters without, and expansions with their own learning rate.

    Matrices and convolution kernels decay. Biases, scales and the parameters of normalisations do not, and those of
    expansions only by `expansion_decay`: decay pulls an activation towards zero. Nor do those that the model, or a
    module inside of it, names in `no_weight_decay()` or finds by a part of the name in `no_weight_decay_keywords()`.
    Parameters that need no gradient are left out, shared parameters are listed once, and empty groups are dropped. The
    model may be wrapped by DDP, sharded by `fully_shard`, or compiled.

    With `layer_decay` the rates fall towards the input. In layer l of 0 .. L the rate is

        lr * layer_decay ** (L - l)

    and that of an expansion there is expansion_lr * layer_decay ** (L - l). The layers are those of
    `group_matcher(coarse=False)` if the model, or one module inside of it, has that method of timm's; the rates of
    weights are then those of timm. In other models the layers are the blocks of the longest nn.ModuleList or
    nn.Sequential with two or more of one class: `h` in GPT-2, `layers` in Llama, `layer1` to `layer4` in ResNet. Lists
    of one module follow each other, and those inside of a block do not count. What comes before the blocks, such as
    embeddings, is layer 0; what is between two blocks is in the layer of the second; what comes behind them, such as a
    head, is in layer L.

    Args:
        model: a model, rewritten or not.
        lr: learning rate of the model's own parameters, in layer L.
        weight_decay: decay of matrices and convolution kernels.
        expansion_lr: learning rate of the expansions, in layer L; `lr` when omitted.
        expansion_decay: decay of all parameters of the expansions.
        layer_decay: above 0 and at most 1; every layer has the same rate when omitted.

    Returns:
        Dicts with "name", "params" (a list of parameters), "lr" and "weight_decay". The names are "decay", "no_decay"
        and "expansions", and with `layer_decay` "layer_0.decay", "layer_0.no_decay" and so on.

    Raises:
        OrthoFxError: a rate or a decay out of range, a lazy module that has not been called yet, names in
            `no_weight_decay` that are not strings, parameters that FullyShardedDataParallel keeps as pieces without
            their shapes, or with `layer_decay` a model whose layers are not known.

    Source: the decay of rates by layer is that of Clark et al., arXiv 2003.10555, and of Bao et al., arXiv 2106.08254.
    """
    given = {"lr": lr, "weight_decay": weight_decay, "expansion_lr": expansion_lr, "expansion_decay": expansion_decay}
    for name, value in given.items():
        if value is not None and not (is_number(value) and value >= 0):
            raise OrthoFxError(f"{name} must be a number, zero or more; got {value!r}")
    if layer_decay is not None and not (is_number(layer_decay) and 0 < layer_decay <= 1):
        raise OrthoFxError(f"layer_decay must be a number above 0 and at most 1; got {layer_decay!r}")
    learned, named = learned_parameters(checked_model(model)), _named(model)
    _refuse_pieces(model, weight_decay)
    layers, last = ({}, 0) if layer_decay is None else layers_of(model)
    groups: dict[tuple[int, str], list[nn.Parameter]] = {}
    own = [
        (prefix, module, name, parameter)
        for prefix, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
    ]
    seen: set[int] = set()
    for prefix, module, name, parameter in own:
        if id(parameter) in seen or not parameter.requires_grad:
            continue
        if isinstance(parameter, nn.UninitializedParameter):
            raise OrthoFxError(f"{join(prefix, name)} has no shape yet: call the model once, for its lazy modules")
        seen.add(id(parameter))
        matrix = parameter.dim() > 1 and name != "bias" and "norm" not in type(module).__name__.lower()
        if id(parameter) in learned:
            kind = "expansions"
        else:
            kind = "decay" if matrix and id(parameter) not in named else "no_decay"
        groups.setdefault((layers.get(id(parameter), last), kind), []).append(parameter)
    decays = {"decay": weight_decay, "no_decay": 0.0, "expansions": expansion_decay}
    rates = {"decay": lr, "no_decay": lr, "expansions": lr if expansion_lr is None else expansion_lr}
    return [
        {
            "name": kind if layer_decay is None else f"layer_{layer}.{kind}",
            "params": groups[layer, kind],
            "lr": rates[kind] * (1.0 if layer_decay is None else layer_decay ** (last - layer)),
            "weight_decay": decays[kind],
        }
        for layer in range(last + 1)
        for kind in _KINDS
        if (layer, kind) in groups
    ]


def _named(model: nn.Module) -> set[int]:
    """The ids of the parameters that the model, or a module inside of it, names as not to be decayed.

    The names of each module count from that module, so wrappers around it do not matter. A name may be a pattern, as
    in timm.
    """
    found: set[int] = set()
    for prefix, module in model.named_modules():
        names, words = names_of(module, called=prefix), names_of(module, KEYWORDS, prefix)
        if not names and not words:
            continue
        for name, parameter in module.named_parameters(remove_duplicate=False):
            for one in (name, plain_name(name)):
                if one in names or any(word in one for word in words) or any(fnmatchcase(one, n) for n in names):
                    found.add(id(parameter))
    return found


def _refuse_pieces(model: nn.Module, weight_decay: float) -> None:
    """Raises where FullyShardedDataParallel hides which parameters are matrices, or which are those of expansions."""
    parameters = {
        name: parameter
        for module in model.modules()
        if any(cls.__name__ == "FullyShardedDataParallel" for cls in type(module).__mro__)
        for name, parameter in module.named_parameters()
    }
    if any(name.endswith("_flat_param") for name in parameters):
        raise OrthoFxError(
            "FullyShardedDataParallel keeps weights and expansions in one parameter, which has one rate and one decay: "
            "wrap the model with use_orig_params=True, or use fully_shard"
        )
    if weight_decay and parameters and all(parameter.dim() < 2 for parameter in parameters.values()):
        raise OrthoFxError(
            "FullyShardedDataParallel keeps parameters without their shapes, so a matrix looks like a bias: call "
            "param_groups inside of FullyShardedDataParallel.summon_full_params(model), or use fully_shard"
        )
