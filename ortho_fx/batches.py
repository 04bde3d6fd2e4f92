"""The type of a batch that users pass, and the call of a model with it."""

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
