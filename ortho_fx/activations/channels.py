"""Which dimension of an input holds the channels of an expansion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, fx

from ortho_fx.errors import OrthoFxError


class HasChannels(Protocol):
    channels: int | None
    channel_dim: int | None


class ComputesParts(HasChannels, Protocol):
    """An expansion, learned or frozen, as what computes it part by part sees it."""

    @property
    def called(self) -> str: ...

    def expand(self, x: Tensor, operands: Mapping[str, Tensor], dim: int) -> Tensor: ...


def likely_dims(module: HasChannels, dims: int) -> tuple[int, ...]:
    """The dimensions of an input of so many that may hold the channels, the likeliest first."""
    if module.channel_dim is not None:
        return (module.channel_dim,)
    return (1, -1) if dims >= 4 else (-1, 1)


def channel_dim_of(module: HasChannels, x: Tensor, shape: tuple[int, ...] | None = None) -> int:
    """The dimension of an input that holds the module's channels; `shape` is that of what the input is a part of.

    Raises:
        OrthoFxError: no dimension has that size, or not the one that the module names.
    """
    if isinstance(x, fx.Proxy):
        if module.channel_dim is None:
            raise OrthoFxError(f"{type(module).__name__} needs channel_dim= for torch.fx to trace it")
        return module.channel_dim
    sizes = x.shape if shape is None else shape
    for dim in likely_dims(module, x.dim()):
        if -x.dim() <= dim < x.dim() and sizes[dim] == module.channels:
            return dim
    where = "" if module.channel_dim is None else f" in dimension {module.channel_dim}"
    raise OrthoFxError(f"{type(module).__name__} has {module.channels} channels{where}; got shape {tuple(x.shape)}")
