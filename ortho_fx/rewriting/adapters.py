"""Adapters of other libraries, such as LoRA, in a model that gets new expansions: who trains and saves these?

A library of adapters saves what it knows of, and drops new parameters without a word. Its integration registers a
function by `on_rewrite`, which makes the library know of new expansions. Without one the report of the rewrite says
what is missing. Libraries are told by the names of their modules' classes, so none is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence

from torch import nn

from ortho_fx.passes.vocabulary.expansions import Expansion

# Gets the model and the new expansions.
OnRewrite = Callable[[nn.Module, Sequence[Expansion]], None]

_LIBRARIES = {"peft": "ortho_fx.integrations.peft"}
_called: list[OnRewrite] = []


def on_rewrite(function: OnRewrite) -> None:
    """Has a function called after each rewrite that made expansions; a second call changes nothing."""
    if function not in _called:
        _called.append(function)


def off_rewrite(function: OnRewrite) -> None:
    """Has a function no longer called; a second call changes nothing."""
    if function in _called:
        _called.remove(function)


def tell(model: nn.Module, new: Sequence[Expansion]) -> None:
    """Calls the registered functions."""
    if new:
        for function in tuple(_called):
            function(model, new)


def adapters_that_miss(model: nn.Module, new: Sequence[Expansion]) -> Iterator[str]:
    """A sentence for each library with adapters in the model that will not save the new expansions."""
    if not new:
        return
    libraries = {name for cls in {type(module) for module in model.modules()} if (name := _library(cls))}
    if not libraries:
        return
    held = {id(module) for module in held_by_adapters(model)}
    if all(id(expansion) in held for expansion in new):
        return
    for name in sorted(libraries):
        yield (
            f"the model has adapters of {name}, whose files will not have the new expansions: call "
            f"{_LIBRARIES[name]}.enable() before rewrite_"
        )


def adapters_that_freeze(model: nn.Module, frozen: Sequence[Expansion]) -> Iterator[str]:
    """A sentence for each library whose adapters came after a rewrite, and leave its expansions frozen and unsaved.

    Whoever has imported its integration has chosen between that and training them.
    """
    held = {id(module) for module in held_by_adapters(model)}
    if all(id(expansion) in held for expansion in frozen):
        return
    for name in sorted({name for module in model.modules() if (name := _library(type(module)))}):
        if _LIBRARIES[name] not in sys.modules:
            yield (
                f"adapters of {name} have frozen the expansions of the model, and their files will not have them: call "
                f"{_LIBRARIES[name]}.enable() before the adapters are made"
            )


def held_by_adapters(model: nn.Module) -> list[Expansion]:
    """The expansions in modules that adapters train and save as a whole."""
    wrappers = [module for module in model.modules() if "original_module" in module._modules and _library(type(module))]
    return [inner for wrapper in wrappers for inner in wrapper.modules() if isinstance(inner, Expansion)]


def _library(cls: type[nn.Module]) -> str:
    """The library that a class of modules is of; empty where it is none of those with adapters."""
    return next((name for cls in cls.__mro__ if (name := cls.__module__.split(".")[0]) in _LIBRARIES), "")
