"""The function mode of the trial: answers the activation calls of one forward of a module by expansions."""

from __future__ import annotations

import copyreg
import functools
import threading
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ortho_fx.passes.vocabulary.targets import TARGETS

# Public functions and methods that are answered; gates are left out, as by default.
TAKEN = [target for target in TARGETS if not target.gate]
NAMES: dict[Any, str] = {f: target.name for target in TAKEN for f in (*target.functions, *target.in_place)}
NAMES |= {getattr(Tensor, method): target.name for target in TAKEN for method in target.methods}
IN_PLACE = {f for target in TAKEN for f in target.in_place}
IN_PLACE |= {getattr(Tensor, method) for target in TAKEN for method in target.methods if method.endswith("_")}


class Running(threading.local):
    """What runs in this thread, the innermost last: the mode of an owner, or None for any other module."""

    def __init__(self) -> None:
        self.stack: list[TorchFunctionMode | None] = []


RUNNING = Running()


class Calls(TorchFunctionMode):
    """Answers the activation calls of one forward of its owner by expansions that the owner holds."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.owner = owner
        self.counts: dict[str, int] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in NAMES or RUNNING.stack[-1] is not self:
            return func(*args, **kwargs)
        number = self.counts.get(NAMES[func], 0)
        self.counts[NAMES[func]] = number + 1
        return self.answer(f"{NAMES[func]}_call_{number}", func, args, kwargs)

    def answer(self, name, func, args, kwargs):
        expansion = self.owner._modules.get(name)
        if expansion is None:
            return func(*args, **kwargs)
        x = args[0] if args else kwargs["input"]
        if func in IN_PLACE or kwargs.get("inplace"):
            return x.copy_(expansion(x.clone()))
        return expansion(x)


def enter(*_: object) -> None:
    """A hook of every module that is no owner."""
    RUNNING.stack.append(None)


def leave(*_: object) -> None:
    RUNNING.stack.pop()


@functools.cache
def with_mode(cls: type[nn.Module], kind: type[Calls] = Calls) -> type[nn.Module]:
    """A subclass whose forward runs in the mode."""

    @functools.wraps(cls.forward)
    def forward(self, *args, **kwargs):
        mode = kind(self)
        RUNNING.stack.append(mode)
        try:
            with mode:
                return cls.forward(self, *args, **kwargs)
        finally:
            RUNNING.stack.pop()

    def reduce(self, protocol):
        made, _, *rest = cls.__reduce_ex__(self, max(protocol, 2))
        assert made is copyreg.__newobj__
        return (restored, (cls,), *rest)

    body = {"forward": forward, "__reduce_ex__": reduce, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,), body)


def restored(cls: type[nn.Module]) -> nn.Module:
    return nn.Module.__new__(with_mode(cls))


def answer_by(owner: nn.Module, expansions: dict[str, nn.Module]) -> None:
    """Has the calls of a module answered by these expansions, which become its children."""
    for name, expansion in expansions.items():
        owner.add_module(name, expansion)
    owner.__class__ = with_mode(type(owner))
    for module in owner.modules():
        if module is not owner and enter not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(enter, prepend=True)
            module.register_forward_hook(leave, always_call=True)
