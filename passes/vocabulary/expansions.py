"""What the passes know about an expansion: its base classes, and how to make one.

The passes are a lower layer than the activation modules, so they import none of them. A module that replaces an
activation derives from `Expansion`. The caller of the passes gives them a `Factory`.
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
from ortho_fx.config import ExpansionConfig, SiteConfig
from ortho_fx.errors import OrthoFxError
from ortho_fx.numerics.fit import FittedExpansion
from ortho_fx.numerics.histogram import Histogram
from ortho_fx.numerics.moments import Values
from ortho_fx.sharded import is_same_memory, is_sharded

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor.placement_types import Placement


# The key in the metadata of a state dict under which each expansion stores its `SiteConfig`.
CONFIG_KEY = "ortho_fx"


class Expansion(nn.Module):
    """A module that replaces an activation, learnable or frozen. The passes look for no activation inside it.

    Attributes:
        site: the qualified name of the place that it was put in; empty where it was built there.
        input_layouts: how plain inputs are distributed over processes, in each dimension of the mesh of the parameters;
            `ortho_fx.rewriting.parallel.ExpansionParallel` sets it.
    """

    site: str = ""
    input_layouts: tuple[Placement, ...] | None = None
    # Where the state dict that it was last part of had it.
    _prefix: str = ""

    config: ExpansionConfig

    @property
    def called(self) -> str:
        """What errors call it."""
        return self.site or type(self).__name__

    @property
    def _apart(self) -> str:
        """What gives each of its places an expansion of its own."""
        if self.config.granularity == "model":
            return "choose granularity 'layer'"
        return 'call rewrite_(model, config, sharing="site")'

    def site_config(self) -> SiteConfig:
        """What it takes to make an expansion like this one."""
        raise NotImplementedError

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
        metadata = getattr(result, "_metadata", {}).get(prefix[:-1], {})
        if CONFIG_KEY in metadata:
            metadata[CONFIG_KEY]["same_as"] = self._prefix[:-1]
        return result

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # PyTorch keeps versions here, beside the tensors; `torch.save` and `torch.load` keep them too.
        if hasattr(destination, "_metadata"):
            destination._metadata.setdefault(prefix[:-1], {})[CONFIG_KEY] = self.site_config().to_dict()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        other = _difference(local_metadata.get(CONFIG_KEY), self.site_config())
        if other:
            error_msgs.append(f"{prefix[:-1] or type(self).__name__}: {other}")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def named_parameters(self, *args: Any, **keywords: Any) -> Iterator[tuple[str, nn.Parameter]]:
        if torch_private.is_called_by_fully_shard() and any(map(is_sharded, self._parameters.values())):
            raise OrthoFxError(
                f"{self.called}: several of the modules that fully_shard wraps share it, and the first of them has "
                f"sharded it: {self._apart}, for each to have its own"
            )
        return super().named_parameters(*args, **keywords)


def _tensors(state: Mapping[str, Any], prefix: str) -> list[str]:
    return [key for key, value in state.items() if key.startswith(prefix) and isinstance(value, Tensor)]


def _difference(saved: Any, own: SiteConfig) -> str:
    """What would make saved tensors another function here although their shapes fit; empty where nothing does."""
    if not isinstance(saved, Mapping):
        return ""
    settings = {
        "basis": own.expansion.basis,
        "channels": own.channels,
        "channel_dim": own.channel_dim,
    }
    for name, value in settings.items():
        given = saved.get(name)
        if None not in (given, value) and given != value:
            return f"the state dict has {name} {given!r}, and the model {value!r}"
    return ""


class Kept(nn.Module):
    """An activation that an expansion replaced, and that stays in the model beside it. The passes leave it alone."""

    def __init__(self, activation: Callable[..., Any]) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, *args: Any, **named: Any) -> Any:
        return self.activation(*args, **named)


class LearnableExpansion(Expansion):
    """An expansion with parameters, which the passes initialise and lower."""

    basis: ClassVar[Basis]

    def initial_values(self, inputs: Histogram | None = None) -> tuple[Values, FittedExpansion | None]:
        """The initial values that `config.init` asks for, by name, and the fit that gave them; None without a fit."""
        raise NotImplementedError

    def set_parameters(self, values: Values) -> None:
        """Copies values (arrays by parameter name) into the parameters."""
        raise NotImplementedError


# An attribute of modules in which expansions replaced modules or attributes: what stood in each place, by its name, and
# the device and dtype that the expansion had.
REPLACED = "_replaced_by_expansions"


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
    """Initialises some expansions of a model, by name, for the inputs that they get from the batches of a group."""

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
    """Sets the default maker of the passes."""
    _provided[:] = [maker]


def provided() -> Maker:
    (maker,) = _provided
    return maker
