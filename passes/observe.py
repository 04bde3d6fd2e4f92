"""Measures each activation in a run of the model: the distribution of its inputs, and which dimension holds channels.

A copy of the model runs once, with a probe in place of every activation. A probe computes the activation that it
replaces, so every probe gets the inputs of the original model. The original is not changed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ortho_fx.batches import Batch, call
from ortho_fx.errors import OrthoFxError
from ortho_fx.numerics.histogram import Histogram
from ortho_fx.passes.modules.exchange import set_nested_paths
from ortho_fx.passes.occurrence import Observation
from ortho_fx.passes.search import find_occurrences
from ortho_fx.passes.vocabulary.targets import TargetTable
from ortho_fx.ragged import size_of

# Layers whose output has its channels in a known dimension. Only these exact classes: a subclass may permute.
_CHANNELS_FIRST = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)
_CHANNELS_LAST = (nn.Linear, nn.Bilinear, nn.LayerNorm, nn.RMSNorm, nn.Embedding)


class _Probe(nn.Module):
    """Computes a function and records the inputs."""

    def __init__(self, function: Callable[[Tensor], Tensor] | None, layers: _LastLayer) -> None:
        super().__init__()
        self._function, self._layers = (function,), layers
        self.seen = Observation(Histogram())

    def forward(self, x: Tensor | None = None, inplace: bool = False, **named: Tensor) -> Tensor:
        if x is None:  # by a name of its own, as in self.act(input=x)
            (x,) = named.values()
        seen, dim = self.seen, self._layers.channel_dim
        if dim is None or not -x.dim() <= dim < x.dim():
            dim = 1 if x.dim() >= 4 else -1
        channels = size_of(x, dim) if x.dim() else None
        if seen.channels is None:
            seen.channels, seen.channel_dim, seen.problem = channels, dim, ""
        elif (seen.channels, seen.channel_dim) != (channels, dim):
            seen.problem = f"it is called with {seen.channels} channels and with {channels}"
            if seen.channels == channels:
                seen.problem = "it is called with channels in different dimensions"
        seen.inputs.add(x)
        (function,) = self._function
        return x if function is None else function(x)


class _LastLayer:
    """The channel dimension in the output of the layer that ran last."""

    def __init__(self) -> None:
        self.channel_dim: int | None = None

    def watch(self, model: nn.Module) -> None:
        for module in model.modules():
            # A lazy module is what it becomes by the time that it has an output.
            cls = getattr(module, "cls_to_become", None) or type(module)
            dim = 1 if cls in _CHANNELS_FIRST else -1 if cls in _CHANNELS_LAST else None
            if dim is not None:
                module.register_forward_hook(lambda *_, dim=dim: setattr(self, "channel_dim", dim))


def observe(model: nn.Module, table: TargetTable, batch: Batch, *, sharing: str = "instance") -> list[Observation]:
    """Runs a copy of the model on a batch; returns one observation for each occurrence, in order."""
    model = copied(model)
    layers = _LastLayer()
    layers.watch(model)
    probes = []
    for occurrence in find_occurrences(model, table, sharing=sharing):
        probe = _Probe(occurrence.reference, layers)
        probes.append(probe)
        if not occurrence.site.reason:
            occurrence.substitute(probe)
    set_nested_paths(model)
    with torch.no_grad():
        call(model, batch)
    return [probe.seen for probe in probes]


def copied(model: nn.Module) -> nn.Module:
    """A deep copy of the model.

    Raises:
        OrthoFxError: a model that cannot be copied.
    """
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise OrthoFxError(f"{type(model).__name__} cannot be copied to run example_inputs: {error}") from error
