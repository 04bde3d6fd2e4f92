"""Modules that accelerate has offloaded: their weights are on the meta device, but while a hook has loaded them.

An expansion has a few numbers, so it stays where its neighbours are computed. The hooks are told by their attributes,
which accelerate documents, without importing it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def device_of(module: nn.Module, parameter: Tensor) -> torch.device:
    """Where a parameter of a module is when the module runs."""
    if parameter.is_meta:
        for hook in _hooks(module):
            if hook.offload and hook.execution_device is not None:
                return torch.device(hook.execution_device)
    return parameter.device


def loads_all_weights(module: nn.Module) -> bool:
    """Whether a hook loads the weights of everything inside of a module, by a map of their names."""
    return any(hook.offload and getattr(hook, "place_submodules", False) for hook in _hooks(module))


def _hooks(module: nn.Module) -> Iterator[Any]:
    """What aligns devices around a module, alone or in a sequence of hooks."""
    first = vars(module).get("_hf_hook")
    for hook in getattr(first, "hooks", (first,)):
        if hasattr(hook, "offload") and hasattr(hook, "execution_device"):
            yield hook
