"""`register_activation`: an activation from outside is found and replaced like one of PyTorch's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ortho_fx.errors import OrthoFxError
from ortho_fx.passes.vocabulary.recognise import POINTS, evaluated, match
from ortho_fx.passes.vocabulary.targets import BY_NAME, EVERY_TARGET, Target, add_target


def register_activation(
    name: str,
    function: Callable[..., Tensor],
    *,
    modules: Sequence[type[nn.Module]] = (),
    functions: Sequence[Callable[..., Tensor]] = (),
    in_place: Sequence[Callable[..., Tensor]] = (),
    settings: Sequence[str] = (),
    gate: bool = False,
) -> None:
    """Makes an activation known by its name: `find_sites`, `rewrite_`, the compile hook and `fit` take it from then on.

    It is found where one of its modules or functions is called, and where other code computes the same function with
    its default settings. Register it before the first rewrite, and before a rewritten model that holds it is loaded.

    Args:
        name: an identifier in lower case; `targets=` takes it.
        function: the scalar function, elementwise on a tensor of any shape and floating dtype: `function(x,
            **settings)`. It is called with float64 tensors.
        modules: module classes that compute it. They keep the settings as attributes of the same names. Subclasses are
            not meant: each is named by itself.
        functions: further functions that compute it, with the same arguments.
        in_place: functions that compute it, and also write the result to their argument.
        settings: names of the function's arguments besides x, in order. They have defaults, and take plain numbers or
            strings.
        gate: it is more often a gate than an activation, so it is replaced only where `targets=` names it.

    Raises:
        OrthoFxError: a name, a module or a function that is known already, a function that is not elementwise or not
            finite, that is linear, or that computes what a known activation does. Nothing is registered then.

    Examples:
        >>> def snake(x, frequency=1.0):
        ...     return x + torch.sin(frequency * x).square() / frequency
        >>> register_activation("snake", snake, settings=("frequency",))  # doctest: +SKIP
    """
    target = Target(
        name,
        tuple(modules),
        (function, *functions),
        in_place=tuple(in_place),
        gate=gate,
        settings=tuple(settings),
    )
    _check_names(target)
    _check_function(target)
    add_target(target)


def _check_names(target: Target) -> None:
    name = target.name
    if not isinstance(name, str) or not name.isidentifier() or name != name.lower():
        raise OrthoFxError(f"the name of an activation must be an identifier in lower case; got {name!r}")
    if name in BY_NAME:
        raise OrthoFxError(f"activation {name!r} is registered already; known are {', '.join(BY_NAME)}")
    for cls in target.modules:
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise OrthoFxError(f"modules of activation {name!r} must be classes of torch.nn.Module; got {cls!r}")
        if cls in EVERY_TARGET.modules:
            raise OrthoFxError(f"{cls.__name__} is a module of activation {EVERY_TARGET.modules[cls].name!r} already")
    for function in (*target.functions, *target.in_place):
        if not callable(function):
            raise OrthoFxError(f"functions of activation {name!r} must be callable; got {function!r}")
        known = EVERY_TARGET.of_function(function)
        if known is not None:
            raise OrthoFxError(f"{_told(function)} is a function of activation {known.name!r} already")
        missing = [one for one in target.settings if one not in _arguments(function)]
        if missing:
            raise OrthoFxError(f"{_told(function)} takes no argument {missing[0]!r}, a setting of activation {name!r}")


def _check_function(target: Target) -> None:
    name = target.name
    for function in (*target.functions, *target.in_place):
        y = evaluated(function, POINTS)
        if y is None:
            raise OrthoFxError(
                f"{_told(function)} must return a finite tensor of the shape of its input; for float64 from -8 to 8 "
                f"it does not, so activation {name!r} is not registered"
            )
        reordered = evaluated(function, POINTS.roll(1).reshape(4, -1))
        if reordered is None or not torch.equal(reordered.flatten(), y.roll(1)):
            raise OrthoFxError(f"{_told(function)} is not elementwise, so it can be no activation")
        off = float((y - evaluated(target.functions[0], POINTS)).abs().max())  # type: ignore[operator]
        if not off < 1e-6:
            raise OrthoFxError(f"{_told(function)} and {_told(target.functions[0])} differ by {off:.2g}")
    y = evaluated(target.functions[0], POINTS)
    assert y is not None
    line = torch.stack([torch.ones_like(POINTS), POINTS], 1)
    if torch.allclose(line @ torch.linalg.lstsq(line, y.unsqueeze(1)).solution, y.unsqueeze(1)):
        raise OrthoFxError(f"{_told(target.functions[0])} is linear, so it is no activation")
    known = match(target.functions[0])
    if known is not None:
        raise OrthoFxError(f"{_told(target.functions[0])} computes {known}, which is found already")


def _told(function: Any) -> str:
    return getattr(function, "__name__", None) or repr(function)


def _arguments(function: Callable[..., Any]) -> list[str]:
    """The names of a function's arguments, without the first; none where Python cannot tell."""
    try:
        return list(inspect.signature(function).parameters)[1:]
    except ValueError:  # of a builtin function
        return []
