"""What the passes know about an expansion: its base classes, and how to make one.

The passes are a lower layer than the activation modules, so they import none of them. A module that replaces an
activation derives from `Expansion`. The caller of the passes gives them a `Factory`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ortho_fx.bases import Basis
from ortho_fx.batches import Batch
from ortho_fx.config import ExpansionConfig
from ortho_fx.numerics.fit import FittedExpansion
from ortho_fx.numerics.histogram import Histogram
from ortho_fx.numerics.moments import Values


class Expansion(nn.Module):
    """A module that replaces an activation, learnable or frozen. The passes look for no activation inside it."""


class LearnableExpansion(Expansion):
    """An expansion with parameters, which the passes initialise and lower."""

    config: ExpansionConfig
    basis: ClassVar[Basis]

    def initial_values(self, inputs: Histogram | None = None) -> tuple[Values, FittedExpansion | None]:
        """The initial values that `config.init` asks for, by name, and the fit that gave them; None without a fit."""
        raise NotImplementedError

    def set_parameters(self, values: Values) -> None:
        """Copies values (arrays by parameter name) into the parameters."""
        raise NotImplementedError


@dataclass(frozen=True)
class Replaced:
    """What an expansion replaced.

    "module" and "attribute" keep the replaced object, "node" keeps a graph of the replaced nodes, and "call" needs to
    keep nothing. "pair" is a node with its backward, which cannot be put back.
    """

    kind: str
    value: Any = None


def remember(expansion: nn.Module, replaced: Replaced) -> None:
    """Stores on an expansion what it replaces."""
    # In a tuple, so that a replaced module does not become a submodule.
    expansion._replaced = (replaced,)  # type: ignore[assignment]


Substitute = Callable[[nn.Module], None]


class Factory(Protocol):
    """Makes the expansion of a config; takes the arguments of `ExpansionActivation`."""

    def __call__(
        self,
        config: ExpansionConfig,
        *,
        channels: int | None = None,
        channel_dim: int | None = None,
        reference: Callable[[Tensor], Tensor] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> LearnableExpansion: ...


class Calibrate(Protocol):
    """Initialises some expansions of a model, by name, for the inputs that they get from the batches."""

    def __call__(
        self, model: nn.Module, expansions: Mapping[str, LearnableExpansion], batches: Iterable[Batch]
    ) -> object: ...


@dataclass(frozen=True)
class Maker:
    """How a run of the passes gets expansions, and calibrates them."""

    make: Factory
    calibrate: Calibrate


_provided: list[Maker] = []


def provide(maker: Maker) -> None:
    """Sets the default maker of the passes."""
    _provided[:] = [maker]


def provided() -> Maker:
    (maker,) = _provided
    return maker
