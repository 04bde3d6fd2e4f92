"""substitute: puts an expansion in the place of every chosen site.

In the graphs of modules that is a call of a child module, which hooks, `freeze_` and `revert_` can reach. A graph that
holds its backward has no such place: forward and backward read the same parameters, so each becomes an operator.
`ortho_fx.passes.substitute` has one function for each kind of site.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from ortho_fx.config import ExpansionConfig
from ortho_fx.errors import OrthoFxError
from ortho_fx.passes.context import Context, Entry
from ortho_fx.passes.expansions import LearnableExpansion
from ortho_fx.passes.graph.pairs import is_operator_graph


def substitute(model: nn.Module, context: Context) -> int:
    """Puts an expansion, with init "stable", in the place of each chosen site; how many sites were replaced.

    Raises:
        OrthoFxError: a device that is gone.
    """
    pending = [entry for entry in context.entries if entry.config is not None and entry.expansion is None]
    starts = {entry.config: replace(entry.config, init="stable") for entry in pending if entry.config is not None}
    made = [_make(model, context, entry, starts[entry.config]) for entry in pending if entry.config is not None]
    for entry, expansion in zip(pending, made, strict=True):
        entry.expansion = expansion
        entry.occurrence.substitute(expansion)
        entry.describe(parameters=sum(parameter.numel() for parameter in expansion.parameters()))
    return len(pending)


def _make(model: nn.Module, context: Context, entry: Entry, config: ExpansionConfig) -> LearnableExpansion:
    device, dtype = _placement(model, entry)
    try:
        expansion = context.factory(
            config,
            channels=entry.seen and entry.seen.channels,
            channel_dim=entry.seen and entry.seen.channel_dim,
            reference=entry.occurrence.reference,
            device=device,
            dtype=dtype,
        )
    except (RuntimeError, AssertionError) as error:  # PyTorch asserts that a device is there
        raise OrthoFxError(f"{entry.site.name} cannot be placed on {device}: {error}") from None
    return expansion.train(entry.occurrence.owner.training)


def _placement(model: nn.Module, entry: Entry) -> tuple[torch.device | None, torch.dtype | None]:
    """The device and floating dtype of the nearest parameters: those of the owner, else of its closest ancestor.

    A `make_fx` graph has its parameters as inputs; there they are those of the site's input.
    """
    path = entry.site.name.split(".")[:-1]
    for length in range(len(path), -1, -1):
        owner = model.get_submodule(".".join(path[:length]))
        for parameter in owner.parameters():
            if parameter.is_floating_point():
                return parameter.device, parameter.dtype
    owner, match = entry.occurrence.owner, entry.occurrence.match
    if match is not None and isinstance(owner, fx.GraphModule) and is_operator_graph(owner.graph):
        value = match.node.meta.get("val")
        if isinstance(value, Tensor):
            return value.device, value.dtype
    return None, None
