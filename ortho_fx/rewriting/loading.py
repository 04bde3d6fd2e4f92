"""Says what to call when the state dict of a rewritten model meets a model that was not rewritten.

PyTorch would only list unexpected keys, or with strict=False drop the expansions without a word. The model that loads
is not ours, so its `load_state_dict` is `torch.nn.Module`'s, which `explain` wraps: what it does stays the same, its
error says more, and there is a warning with strict=False.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ortho_fx.errors import StateDictError
from ortho_fx.passes.vocabulary.expansions import CONFIG_KEY, Expansion
from ortho_fx.passes.vocabulary.sites import plain_name
from ortho_fx.rewriting.sources import expansion_keys, plain_names

_SHOWN = 3


def explain() -> None:
    """Wraps `torch.nn.Module.load_state_dict`; a second call changes nothing."""
    if not hasattr(nn.Module.load_state_dict, "explains_expansions"):
        nn.Module.load_state_dict = _explaining(nn.Module.load_state_dict)  # type: ignore[method-assign]


def _explaining(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def load_state_dict(self: nn.Module, state_dict: Mapping[str, Any], *args: Any, **keywords: Any) -> Any:
        try:
            result = load(self, state_dict, *args, **keywords)
        except RuntimeError as error:
            advice = _advice(self, state_dict)
            if not advice:
                raise
            raise StateDictError(f"{error}\n{advice}") from None
        if getattr(result, "unexpected_keys", ()):
            advice = _advice(self, state_dict)
            if advice:
                warnings.warn(advice, stacklevel=2)
        return result

    load_state_dict.explains_expansions = True  # type: ignore[attr-defined]
    return load_state_dict


def _advice(model: nn.Module, state_dict: object) -> str:
    """What to call for this model to fit; empty if the state dict has no expansions that the model lacks."""
    if not isinstance(state_dict, Mapping):
        return ""
    modules = {plain_name(name): module for name, module in model.named_modules(remove_duplicate=False)}
    missing = [
        name
        for name in _expansions_in(state_dict)
        # A module with parameters of these names may be anyone's.
        if not isinstance(modules.get(name), Expansion) and not any(_parameters(modules.get(name)))
    ]
    if not missing:
        return ""
    told = ", ".join(missing[:_SHOWN]) + (f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else "")
    return (
        f"ortho_fx: the state dict has expansions at {told}, and this {type(model).__name__} its own activations: "
        "call ortho_fx.rewrite_like_(model, state_dict) before model.load_state_dict(state_dict)"
    )


def _parameters(module: nn.Module | None) -> list[str]:
    return [] if module is None else [*module._parameters, *module._buffers]


def _expansions_in(state_dict: Mapping[str, Any]) -> list[str]:
    metadata = plain_names(getattr(state_dict, "_metadata", None) or {})
    told = [name for name, held in metadata.items() if isinstance(held, Mapping) and CONFIG_KEY in held]
    names = plain_names({key: None for key in state_dict if isinstance(key, str)})
    return told or list(dict.fromkeys(key.rpartition(".")[0] for key in expansion_keys(names)))
