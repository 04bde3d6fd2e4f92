"""What the passes know about an expansion: its base classes, and how to make one.

The passes are a lower layer than the activation modules, so they import none of them. A module that replaces an
activation derives from `Expansion`. The caller of the passes gives them a `Factory`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import nn

from ortho_fx.bases import Basis
from ortho_fx.config import ExpansionConfig
from ortho_fx.numerics.histogram import Histogram


class Expansion(nn.Module):
    """A module that replaces an activation, learnable or frozen. The passes look for no activation inside it."""


class LearnableExpansion(Expansion):
    """An expansion with parameters, which the passes initialise and lower."""

    config: ExpansionConfig
    basis: ClassVar[Basis]

    def initial_values(self, inputs: Histogram | None = None) -> tuple[Any, Any]:
        """The initial values that `config.init` asks for, by name, and the fit that gave them; None without a fit."""
        raise NotImplementedError

    def set_parameters(self, values: Any) -> None:
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

    def __call__(self, config: ExpansionConfig, **settings: Any) -> LearnableExpansion: ...


class Calibrate(Protocol):
    """Initialises some expansions of a model, by name, for the inputs that they get from the batches."""

    def __call__(self, model: nn.Module, expansions: Any, batches: Any) -> object: ...


_PROVIDED: dict[str, Callable[..., Any]] = {}


def provide(factory: Factory, calibrate: Calibrate) -> None:
    """Sets the default factory and calibration of the passes."""
    _PROVIDED.update(factory=factory, calibrate=calibrate)


def provided_factory() -> Factory:
    return _PROVIDED["factory"]


def provided_calibration() -> Calibrate:
    return _PROVIDED["calibrate"]
