"""A batch as users hand it over, and how a model is called with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

Batch = Tensor | tuple[Any, ...] | Mapping[str, Any]


def call(model: nn.Module, batch: Batch) -> Any:
    """Calls the model with a tensor, a tuple of positional arguments or a map of keyword arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    return model(batch)
