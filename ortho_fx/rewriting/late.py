"""Warns of an optimizer that does not train the new parameters: it was made before the rewrite, or adapters froze them.

Nothing tells a rewrite which optimizers exist. So it waits for the first step of one that has parameters of the model,
by a hook of PyTorch's for the steps of all optimizers, which is gone after that step.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from ortho_fx.passes.vocabulary.expansions import Expansion
from ortho_fx.rewriting.adapters import adapters_that_freeze

_Pending = tuple["weakref.ref[nn.Module]", tuple["weakref.ref[Expansion]", ...]]
_pending: list[_Pending] = []
_hooks: list[RemovableHandle] = []


def watch_optimizers(model: nn.Module, new: Sequence[Expansion]) -> None:
    """Warns at the first step of an optimizer of the model if none has the new parameters."""
    if new:
        _pending[:] = [pending for pending in _pending if pending[0]() is not None]
        _pending.append((weakref.ref(model), tuple(weakref.ref(expansion) for expansion in new)))
        if not _hooks:
            _hooks.append(register_optimizer_step_pre_hook(_before_step))


def _before_step(optimizer: Optimizer, *_: Any) -> None:
    if torch.compiler.is_compiling():
        return
    has = _parameters(optimizer)
    for pending in tuple(_pending):
        model, expansions = pending[0](), [one for ref in pending[1] if (one := ref()) is not None]
        new = {id(parameter) for one in expansions for parameter in one.parameters() if parameter.requires_grad}
        if model is None or not expansions:
            _pending.remove(pending)
        elif not has.isdisjoint(id(parameter) for parameter in model.parameters()):
            _pending.remove(pending)
            if not new:
                for sentence in adapters_that_freeze(model, expansions):
                    warnings.warn(f"ortho_fx: {sentence}", stacklevel=3)
            elif new.isdisjoint(has) and not any(new & _parameters(other) for other in _optimizers()):
                warnings.warn(
                    f"ortho_fx: the optimizer {type(optimizer).__name__} trains the {type(model).__name__} but not its "
                    "expansions, and no other optimizer has them: make it after rewrite_, and before the wrapper of a "
                    "trainer",
                    stacklevel=3,
                )
    if not _pending:
        for hook in _hooks:
            hook.remove()
        _hooks.clear()


def _parameters(optimizer: Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _optimizers() -> list[Optimizer]:
    return [found for found in gc.get_objects() if issubclass(type(found), Optimizer)]
