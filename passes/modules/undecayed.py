"""`no_weight_decay()`: the parameters that an optimizer must not decay, by a convention of timm and others.

A model names such parameters in a method `no_weight_decay()`, and whoever makes the groups of an optimizer asks for
them. Every module that holds an expansion which replaced an activation gets an attribute of that name. It adds the
parameters of the expansions to what the module's own method says. So the groups are right for the model, and for a part
of it, such as the network inside of a training module. The names are those at the moment of the call: wrappers may
change them, and `freeze_` takes them away.

An attribute of the instance is the smallest way. A subclass of its class would change `type(model)`, and some classes
admit none; a change of the class would reach other models. The attribute refers to its module weakly, since a cycle
would keep the memory of a deleted model.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from ortho_fx.errors import OrthoFxError
from ortho_fx.passes.source.classes import copies_by_state
from ortho_fx.passes.vocabulary.expansions import Expansion, LearnableExpansion
from ortho_fx.passes.vocabulary.sites import COMPILED, join

NAME, KEYWORDS = "no_weight_decay", "no_weight_decay_keywords"


class NoWeightDecay:
    """The attribute `no_weight_decay` of a module that holds expansions.

    Args:
        module: the module.
        before: what its instance had under this name; None for the method of its class.
    """

    __slots__ = ("_before", "_module")

    def __init__(self, module: nn.Module | None, before: Callable[[], Iterable[str]] | None) -> None:
        self._module: Callable[[], nn.Module | None] = (lambda: None) if module is None else weakref.ref(module)
        self._before = before

    def __call__(self) -> set[str]:
        """The names that the module's own method gives, and those of the parameters of expansions."""
        module = self._module()
        if module is None:
            raise OrthoFxError(
                "no_weight_decay() of a shallow copy, whose original is gone: copy the model with copy.deepcopy, or "
                "make the groups with ortho_fx.param_groups"
            )
        learned = learned_parameters(module)
        ours = {name for name, parameter in module.named_parameters() if id(parameter) in learned}
        # A compiled model hands the call on to the module inside of it, but has other names than that.
        return {*names_of(module), *ours, *(join(COMPILED, name) for name in ours)}

    @property
    def before(self) -> Callable[[], Iterable[str]] | None:
        return self._before

    def __deepcopy__(self, memo: dict[int, Any]) -> NoWeightDecay:
        module = self._module()
        return type(self)(memo.get(id(module), module), copy.deepcopy(self._before, memo))

    def __getstate__(self) -> tuple[nn.Module | None, Callable[[], Iterable[str]] | None]:
        return self._module(), self._before

    def __setstate__(self, state: tuple[nn.Module | None, Callable[[], Iterable[str]] | None]) -> None:
        NoWeightDecay.__init__(self, *state)


def set_no_weight_decay(model: nn.Module) -> None:
    """Gives the modules that hold expansions their `no_weight_decay`, and takes it from those that hold none any more.

    Left are modules with something else of this name than a method, and those that copy themselves in another way than
    by their attributes, such as graph modules.
    """
    holds: dict[nn.Module, bool] = {}
    _note_holders(model, holds)
    for module, holds_one in holds.items():
        own = vars(module).get(NAME)
        if isinstance(module, Expansion):
            continue
        if not holds_one:
            if isinstance(own, NoWeightDecay):
                del vars(module)[NAME]
                if own.before is not None:
                    vars(module)[NAME] = own.before
        elif not isinstance(own, NoWeightDecay) and COMPILED not in module._modules and copies_by_state(module):
            # A compiled model hands on to the module inside of it.
            held = _held(module, NAME)
            if held is None or callable(held):
                # Past a __setattr__ of the module's own, which may refuse.
                vars(module)[NAME] = NoWeightDecay(module, own)


def _note_holders(module: nn.Module, holds: dict[nn.Module, bool]) -> bool:
    """Notes of every module in this one whether it holds an expansion that replaced an activation."""
    if module not in holds:
        holds[module] = isinstance(module, Expansion) and "_replaced" in vars(module)
        # A list: every child is to be noted.
        holds[module] |= any([_note_holders(child, holds) for child in module._modules.values() if child is not None])
    return holds[module]


def learned_parameters(model: nn.Module) -> set[int]:
    """The ids of the parameters of expansions."""
    # Those of a parametrization are inside of the expansion, in modules of PyTorch's.
    return {
        id(parameter)
        for module in model.modules()
        if isinstance(module, LearnableExpansion)
        for parameter in module.parameters()
    }


def names_of(module: nn.Module, attribute: str = NAME, called: str = "") -> set[str]:
    """What the module's own `no_weight_decay` or `no_weight_decay_keywords` gives, without what is added here.

    Raises:
        OrthoFxError: it gives something else than names.
    """
    held = _held(module, attribute)
    names = held() if callable(held) else held
    if names is None:
        return set()
    if isinstance(names, str) or not isinstance(names, Iterable) or not all(isinstance(name, str) for name in names):
        where = join(called, attribute)
        raise OrthoFxError(f"{where} of {type(module).__name__} must give names, a set or list of str; got {names!r}")
    return set(names)


def _held(module: nn.Module, attribute: str) -> Any:
    """What a module has under this name, bound to it; None without. No `__getattr__` runs, and nothing of ours."""
    held: Any = vars(module).get(attribute)
    if isinstance(held, NoWeightDecay):
        held = held.before
    if held is not None:
        return held
    held = next((vars(base)[attribute] for base in type(module).__mro__ if attribute in vars(base)), None)
    return held.__get__(module, type(module)) if hasattr(held, "__get__") else held
