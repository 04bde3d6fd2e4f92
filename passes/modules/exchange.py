"""Exchanges a child module, or a function that a module keeps as an attribute, for an expansion, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import nn

from ortho_fx.passes.vocabulary.expansions import Replaced, Substitute, remember


def module_in(places: Sequence[tuple[nn.Module, str]]) -> Substitute:
    """Replaces a child module in every place that holds it, so that a shared activation stays shared."""

    def put(expansion: nn.Module) -> None:
        for owner, key in places:
            remember(expansion, Replaced("module", owner._modules[key]))
            _exchange(owner, key, expansion)
            _leave_fast_path(owner)

    return put


def attribute_of(owner: nn.Module, key: str) -> Substitute:
    """Replaces a function that the module keeps as an attribute (`self.activation = F.gelu`) by a child module."""

    def put(expansion: nn.Module) -> None:
        remember(expansion, Replaced("attribute", vars(owner)[key]))
        # Past a __delattr__ or __setattr__ of the owner's, which may refuse.
        del vars(owner)[key]
        owner._modules[key] = expansion
        _leave_fast_path(owner)

    return put


def restore_module(owner: nn.Module, key: str, replaced: nn.Module) -> None:
    """Puts the module that an expansion replaced back in one place that holds it."""
    _exchange(owner, key, replaced.train(owner._modules[key].training))  # type: ignore[union-attr]
    _enter_fast_path(owner, key)


def restore_attribute(owner: nn.Module, key: str, replaced: object) -> None:
    """Puts the function that an expansion replaced back."""
    del owner._modules[key]
    # Past nn.Module, which would register a module that the owner did not.
    vars(owner)[key] = replaced
    _enter_fast_path(owner, key)


def _exchange(owner: nn.Module, key: str, new: nn.Module) -> None:
    """Puts a child in the place of another, in the lists as well in which the owner keeps its children."""
    old = owner._modules[key]
    for kept in vars(owner).values():
        if isinstance(kept, list):
            kept[:] = [new if item is old else item for item in kept]
    owner._modules[key] = new


def _leave_fast_path(owner: nn.Module) -> None:
    # In eval, nn.TransformerEncoderLayer runs a fused kernel with the activation that this flag names, whatever its
    # `activation` is; 0 names none.
    if isinstance(owner, nn.TransformerEncoderLayer):
        owner.activation_relu_or_gelu = 0


def _enter_fast_path(owner: nn.Module, key: str) -> None:
    if isinstance(owner, nn.TransformerEncoderLayer) and key == "activation":
        owner.activation_relu_or_gelu = _fast_path_of(owner.activation)


def _fast_path_of(activation: object) -> int:
    if activation is F.relu or isinstance(activation, nn.ReLU):
        return 1
    return 2 if activation is F.gelu or isinstance(activation, nn.GELU) else 0
