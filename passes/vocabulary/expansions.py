"""What the passes know of an expansion: the base classes by which they tell it, and how they get one.

The passes stand below the modules that are learned, so they import none of them. A module that takes the place of an
activation derives from `Expansion`; whoever runs the passes hands them a `Factory`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ortho_fx import torch_private
from ortho_fx.bases import Basis
from ortho_fx.batches import Batch
from ortho_fx.config import ExpansionConfig
from ortho_fx.errors import OrthoFxError
from ortho_fx.numerics.fit import FittedExpansion
from ortho_fx.numerics.histogram import Histogram
from ortho_fx.numerics.moments import Values
from ortho_fx.sharded import is_same_memory, is_sharded

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor.placement_types import Placement


class Expansion(nn.Module):
    """A module that took the place of an activation, learned or frozen: no pass finds an activation in it.

    Attributes:
        site: the qualified name of the place that it was put in; empty where it was built there.
        input_layouts: how plain inputs are distributed over processes, in each dimension of the mesh of the parameters;
            `ortho_fx.rewriting.parallel.ExpansionParallel` sets it.
    """

    site: str = ""
    input_layouts: tuple[Placement, ...] | None = None
    # Where the state dict that it was last part of had it.
    _prefix: str = ""

    @property
    def called(self) -> str:
        """What errors call it."""
        return self.site or type(self).__name__

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """As that of every module; of one in several places, each has tensors of its own, which files need."""
        result = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        if args or keep_vars or self._prefix == prefix:
            return result
        twins = {key: result.get(self._prefix + key.removeprefix(prefix)) for key in _tensors(result, prefix)}
        if not any(twin is not None and is_same_memory(twin, result[key]) for key, twin in twins.items()):
            self._prefix = prefix
            return result
        result.update((key, result[key].clone()) for key in twins)
        return result

    def named_parameters(self, *args: Any, **keywords: Any) -> Iterator[tuple[str, nn.Parameter]]:
        if torch_private.is_called_by_fully_shard() and any(map(is_sharded, self._parameters.values())):
            raise OrthoFxError(
                f"{self.called}: several of the modules that fully_shard wraps share it, and the first of them has "
                'sharded it: call rewrite_(model, config, sharing="site"), for each to have its own'
            )
        return super().named_parameters(*args, **keywords)


def _tensors(state: Mapping[str, Any], prefix: str) -> list[str]:
    return [key for key, value in state.items() if key.startswith(prefix) and isinstance(value, Tensor)]


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
    """Starts some expansions of a model, by their names, for the inputs that the batches of a group give them."""

    def __call__(
        self,
        model: nn.Module,
        expansions: Mapping[str, LearnableExpansion],
        batches: Iterable[Batch],
        process_group: ProcessGroup | str | None = None,
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
