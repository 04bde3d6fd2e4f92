"""Replaces a child module, or a function kept as an attribute, by an expansion, and puts it back.

An expansion remembers what it replaced, and so goes on doing where a library moves it to modules of its own. One that
stands in several places remembers only one of them, so each owner also keeps what stood in its own.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ortho_fx.passes.source.classes import keep_in_copies, set_class_for_children
from ortho_fx.passes.vocabulary.expansions import REPLACED, Replaced, Substitute, remember


def module_in(places: Sequence[tuple[nn.Module, str]]) -> Substitute:
    """Replaces a child module in every place that holds it, so that a shared activation stays shared."""

    def put(expansion: nn.Module) -> None:
        for owner, key in places:
            _remember(expansion, owner, key, Replaced("module", owner._modules[key]))
            move_hooks(owner._modules[key], expansion)
            exchange(owner, key, expansion)
            keep_in_copies(owner)
            _leave_fast_path(owner)

    return put


# Where a module keeps what is called when it runs.
_HOOKS = (
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs"),
    *("_forward_hooks_always_called", "_backward_pre_hooks", "_backward_hooks", "_is_full_backward_hook"),
)


def hooked(module: nn.Module | None) -> bool:
    """Whether something is called when the module runs."""
    return any(vars(module).get(name) for name in _HOOKS)


def move_hooks(old: nn.Module | None, new: nn.Module) -> None:
    """Has a module call the hooks of the one that it replaces.

    Both hold the same dictionaries, so the handles of the hooks still remove them.
    """
    for name in _HOOKS:
        if vars(old).get(name):
            vars(new)[name] = vars(old)[name]


def attribute_of(owner: nn.Module, key: str) -> Substitute:
    """Replaces a function that the module keeps as an attribute (`self.activation = F.gelu`) by a child module."""

    def put(expansion: nn.Module) -> None:
        _remember(expansion, owner, key, Replaced("attribute", vars(owner)[key]))
        # Past a __delattr__ or __setattr__ of the owner's, which may refuse.
        del vars(owner)[key]
        owner._modules[key] = expansion
        keep_in_copies(owner)
        _leave_fast_path(owner)

    return put


def _remember(expansion: nn.Module, owner: nn.Module, key: str, replaced: Replaced) -> None:
    remember(expansion, replaced)
    vars(owner).setdefault(REPLACED, {})[key] = (replaced.value, _device_and_dtype(expansion))


def _replaced(owner: nn.Module, key: str, known: Any, copied: bool) -> Any:
    """What stood in a place; where its owner does not know, what the expansion there remembers, or a copy of it."""
    kept = vars(owner).get(REPLACED, {})
    if key not in kept:
        return copy.deepcopy(known) if copied else known
    value, before = kept.pop(key)
    if not kept:
        del vars(owner)[REPLACED]  # past a __delattr__ of the owner, which may refuse
    now = _device_and_dtype(owner._modules[key])
    if isinstance(value, nn.Module) and before is not None and now is not None and before != now:
        value.to(*now)
    return value


def is_forgotten(owner: nn.Module, key: str, known: Any) -> bool:
    """Whether an owner does not know what stood in a place, and what the expansion remembers has numbers of its own."""
    return key not in vars(owner).get(REPLACED, {}) and isinstance(known, nn.Module) and bool(known.state_dict())


def _device_and_dtype(expansion: nn.Module | None) -> tuple[torch.device, torch.dtype] | None:
    """Those of its parameters; None if it has none, or none with values."""
    first = None if expansion is None else next(expansion.parameters(), None)
    return None if first is None or first.is_meta else (first.device, first.dtype)


def restore_module(owner: nn.Module, key: str, known: nn.Module, copied: bool) -> None:
    """Puts the module that an expansion replaced back in one place that holds the expansion.

    Args:
        owner, key: the place.
        known: what the expansion remembers to have replaced.
        copied: whether that stands in another place already.
    """
    expansion, replaced = owner._modules[key], _replaced(owner, key, known, copied)
    assert expansion is not None
    move_hooks(expansion, replaced)
    exchange(owner, key, replaced.train(expansion.training))
    set_class_for_children(owner)
    _enter_fast_path(owner, key)


def restore_attribute(owner: nn.Module, key: str, known: object, copied: bool) -> None:
    """Puts the function that an expansion replaced back; the arguments are those of `restore_module`."""
    replaced = _replaced(owner, key, known, copied)
    del owner._modules[key]
    # Not nn.Module.__setattr__: it would register a module that the owner kept unregistered.
    vars(owner)[key] = replaced
    set_class_for_children(owner)
    _enter_fast_path(owner, key)


def exchange(owner: nn.Module, key: str, new: nn.Module) -> None:
    """Replaces a child module, also inside the lists in which the owner keeps its children."""
    old = owner._modules[key]
    for kept in vars(owner).values():
        if isinstance(kept, list):
            kept[:] = [new if item is old else item for item in kept]
    owner._modules[key] = new


def _leave_fast_path(owner: nn.Module) -> None:
    # In eval mode nn.TransformerEncoderLayer runs a fused kernel with the activation that this flag names, and ignores
    # its `activation`. 0 names no activation, and so turns the fused kernel off.
    if isinstance(owner, nn.TransformerEncoderLayer):
        owner.activation_relu_or_gelu = 0


def _enter_fast_path(owner: nn.Module, key: str) -> None:
    if isinstance(owner, nn.TransformerEncoderLayer) and key == "activation":
        owner.activation_relu_or_gelu = _fast_path_of(owner.activation)


# On an encoder that was taken off nested tensors.
_WAS_NESTED = "_nested_before_expansions"


def set_nested_paths(model: nn.Module) -> None:
    """Takes encoders off nested tensors where their layers hold something else than they were made for, and back.

    In eval, nn.TransformerEncoder turns padded input into nested tensors for the fused kernel of its layers, which
    those that hold an expansion leave. What it decided when it was made, it asks no more.
    """
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and isinstance(encoder.layers, nn.ModuleList):
            fused = all(getattr(layer, "activation_relu_or_gelu", 0) for layer in encoder.layers)
            if not fused and getattr(encoder, "use_nested_tensor", False):
                encoder.use_nested_tensor = False
                setattr(encoder, _WAS_NESTED, True)
            elif fused and vars(encoder).pop(_WAS_NESTED, False):
                encoder.use_nested_tensor = True


def _fast_path_of(activation: object) -> int:
    if activation is F.relu or isinstance(activation, nn.ReLU):
        return 1
    return 2 if activation is F.gelu or isinstance(activation, nn.GELU) else 0
