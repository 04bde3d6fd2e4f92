"""What the passes know of an expansion: the base classes by which they tell it, and how they get one.

The passes stand below the modules that are learned, so they import none of them. A module that takes the place of an
activation derives from `Expansion`; whoever runs the passes hands them a `Factory`.
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
    """A module that took the place of an activation, learned or frozen: no pass finds an activation in it."""


class LearnableExpansion(Expansion):
    """An expansion with parameters, which the passes start and lower."""

    config: ExpansionConfig
    basis: ClassVar[Basis]

    def initial_values(self, inputs: Histogram | None = None) -> tuple[Values, FittedExpansion | None]:
        """The values that `config.init` asks for, by name, and the fit that they come from or None."""
        raise NotImplementedError

    def set_parameters(self, values: Values) -> None:
        """Copies values, arrays by name, into the parameters."""
        raise NotImplementedError


@dataclass(frozen=True)
class Replaced:
    """What an expansion took the place of: "module" and "attribute" keep it, "call" needs nothing, "node" a graph.

    "pair" is a node and its backward, which are not put back.
    """

    kind: str
    value: Any = None


def remember(expansion: nn.Module, replaced: Replaced) -> None:
    """Notes on an expansion what it replaces."""
    # In a tuple, for a module in it to be no submodule.
    expansion._replaced = (replaced,)  # type: ignore[assignment]


Substitute = Callable[[nn.Module], None]


class Factory(Protocol):
    """Makes the expansion that a config describes, with the arguments of `ExpansionActivation`."""

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
    """Starts some expansions of a model, by their names, for the inputs that the batches give them."""

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
    """Sets the maker of the runs that are given none."""
    _provided[:] = [maker]


def provided() -> Maker:
    (maker,) = _provided
    return maker
