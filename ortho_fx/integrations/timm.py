"""timm: expansions by name, `timm.create_model("vit_tiny_patch16_224", act_layer="hermite3")`.

timm looks names of activations up in a table of classes, and in a table of functions. `enable` puts tables in their
place that hold the same entries, and that make an entry for a name that they lack if it is one of ours. So every degree
has a name, and a basis that is registered later has one too.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from ortho_fx.activations.expansion import ExpansionActivation, make_activation
from ortho_fx.bases import BASES
from ortho_fx.config import ExpansionConfig
from ortho_fx.errors import OrthoFxError


def enable() -> None:
    """Has timm know expansions by name, wherever it takes the name of an activation. A second call changes nothing.

    A name is that of a basis, with a degree or without: "hermite", "hermite3", "fourier5", "tropical_rational6". A
    model that is made by such a name holds one expansion, of init "stable", in the place of each activation.

    Raises:
        OrthoFxError: timm is not installed, or it keeps its activations in another way.

    Examples:
        >>> import timm
        >>> from ortho_fx.integrations.timm import enable
        >>> enable()
        >>> timm.create_model("vit_tiny_patch16_224", act_layer="hermite3").blocks[0].mlp.act
        HermiteActivation(degree=3, init='stable')
    """
    try:
        from timm.layers import create_act
    except ImportError:
        raise OrthoFxError("timm is not installed: pip install timm") from None
    for name, table in (("_ACT_LAYER_DEFAULT", _Layers), ("_ACT_FN_DEFAULT", _Functions)):
        entries = getattr(create_act, name, None)
        if not isinstance(entries, dict):
            raise OrthoFxError(
                f"this release of timm has no table timm.layers.create_act.{name}: hand over a class, "
                "act_layer=ortho_fx.HermiteActivation, or call ortho_fx.rewrite_ on the model"
            )
        if not isinstance(entries, _Table):
            setattr(create_act, name, table(entries))


class _Table(dict[str, Any]):
    """A table of timm, with an entry for each of our names."""

    make: ClassVar[Callable[[str, ExpansionConfig], Any]]

    def __init__(self, entries: Mapping[str, Any]) -> None:
        super().__init__(entries)
        self._entries = entries

    def __missing__(self, name: str) -> Any:
        # Somebody may have kept the old table, and add to it.
        if name in self._entries:
            return self._entries[name]
        config = _config(name)
        if config is None:
            raise KeyError(name)
        return type(self).make(name, config)


def _config(name: str) -> ExpansionConfig | None:
    """The config that a name stands for; None if it is none of ours.

    Raises:
        OrthoFxError: a degree that the basis does not have.
    """
    if name in BASES:
        return ExpansionConfig(name)
    # A basis of somebody's may end with a digit.
    starts = [basis for basis in BASES if name.startswith(basis) and re.fullmatch("[0-9]+", name[len(basis) :])]
    basis = max(starts, key=len, default=None)
    return None if basis is None else ExpansionConfig(basis, int(name[len(basis) :]))


def _layer(name: str, config: ExpansionConfig) -> Callable[..., Any]:
    return functools.partial(_make, config)


def _make(config: ExpansionConfig, inplace: bool = False, **settings: Any) -> ExpansionActivation:
    """An expansion; classes of PyTorch's take `inplace` first of all, and some models hand it over without its name."""
    return make_activation(config, **settings)


def _refuse(name: str, config: ExpansionConfig) -> Any:
    raise OrthoFxError(
        f"{name} has parameters, so a function cannot compute it, and this model calls its activations as functions: "
        "make the model with its own activation, and call ortho_fx.rewrite_(model, "
        f"ortho_fx.ExpansionConfig({config.basis!r}, {config.degree}))"
    )


class _Layers(_Table):
    make = _layer


class _Functions(_Table):
    make = _refuse
