"""Replaces a call in a module's code by an expansion, for one module instance, and puts the call back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from ortho_fx.passes.source.classes import rewrite_class, set_class, set_class_for_children, source_of
from ortho_fx.passes.vocabulary.expansions import Replaced, Substitute, remember


def call_in(
    owner: nn.Module, attribute: str, split: frozenset[str] = frozenset(), sharing: Iterable[str] = ()
) -> Substitute:
    """Replaces a call in the source of the module's class, and those that share it, for this instance only."""
    shared = frozenset((other, attribute) for other in sharing)

    def put(expansion: nn.Module) -> None:
        source = source_of(owner, split)
        replaced = source.replaced | {attribute}
        rewritten = rewrite_class(replace(source, replaced=replaced, shared=source.shared | shared))
        remember(expansion, Replaced("call"))
        # Past an add_module or a __getattr__ of the owner's.
        owner._modules[attribute] = expansion
        set_class(owner, rewritten)

    return put


def restore_call(owner: nn.Module, key: str) -> None:
    """Puts the call that an expansion replaced back into the module's code."""
    del owner._modules[key]
    source = source_of(owner)
    shared = frozenset((call, expansion) for call, expansion in source.shared if expansion != key)
    left = replace(source, replaced=source.replaced - {key}, shared=shared)
    set_class(owner, rewrite_class(left))
    set_class_for_children(owner)
