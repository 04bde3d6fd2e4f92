"""Nested inputs and outputs: the leaves of dicts, lists, tuples and of classes registered with PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ortho_fx import torch_private


def leaves(value: Any) -> list[Any]:
    """The leaves of nested containers, in order."""
    found: list[Any] = []
    mapped(found.append, value)
    return found


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """The same containers, with the function applied to each leaf."""
    trees = torch_private.available(torch_private.TREES)
    return trees.tree_map(function, value) if trees else _mapped(function, value)


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _mapped(function, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_mapped(function, item) for item in value]
        named = hasattr(value, "_fields")
        return type(value)(*items) if named else type(value)(items)
    return function(value)
