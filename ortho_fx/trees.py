"""Nested inputs and outputs: the leaves of dicts, lists, tuples and of classes registered with PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ortho_fx import torch_private


def leaves(value: Any) -> list[Any]:
    """What the containers hold, in order."""
    found: list[Any] = []
    mapped(found.append, value)
    return found


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """The same containers, each leaf replaced by what the function makes of it."""
    try:
        tree_map = torch_private.load(torch_private.TREES).tree_map
    except torch_private.MissingNames as missing:
        torch_private.report_loss(str(missing), torch_private.TREES)
        return _mapped(function, value)
    return tree_map(function, value)


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _mapped(function, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_mapped(function, item) for item in value]
        named = hasattr(value, "_fields")
        return type(value)(*items) if named else type(value)(items)
    return function(value)
