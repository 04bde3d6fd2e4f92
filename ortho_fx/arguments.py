"""Checks of what a user hands over: a wrong type is one sentence that says what is expected and what came."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from ortho_fx.errors import OrthoFxError


def checked_model(model: object) -> nn.Module:
    """The model itself.

    Raises:
        OrthoFxError: it is no module.
    """
    if not isinstance(model, nn.Module):
        raise OrthoFxError(f"the model must be a torch.nn.Module; got {type(model).__name__}")
    return model


def checked_function(function: object) -> Callable[..., Any]:
    """The function itself.

    Raises:
        OrthoFxError: it cannot be called.
    """
    if not callable(function):
        raise OrthoFxError(f"the function must be callable; got {function!r}")
    return function


def is_number(value: object) -> bool:
    """Whether a value is a finite int or float, and no bool."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond every float
        return False


def is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
