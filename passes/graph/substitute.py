"""substitute: puts an expansion in the place of every chosen site.

In most models the expansion is a child module that is called, so that hooks, `freeze_` and `revert_` can reach it. In a
graph that holds its backward, forward and backward read the same parameters, so each becomes an operator. Each kind of
site has its own editing function, `Occurrence.substitute`.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from ortho_fx.config import ExpansionConfig
from ortho_fx.errors import OrthoFxError
from ortho_fx.operands import COMPUTED
from ortho_fx.passes.context import Context
from ortho_fx.passes.graph.pairs import is_operator_graph
from ortho_fx.passes.groups import groups_of
from ortho_fx.passes.modules.exchange import set_nested_paths
from ortho_fx.passes.modules.offloaded import device_of, loads_all_weights
from ortho_fx.passes.modules.undecayed import set_no_weight_decay
from ortho_fx.passes.occurrence import Occurrence
from ortho_fx.passes.vocabulary.expansions import LearnableExpansion
from ortho_fx.passes.vocabulary.sites import join
from ortho_fx.sharded import is_sharded


def substitute(model: nn.Module, context: Context) -> int:
    """Puts an expansion, with init "stable", in the place of each chosen site; returns how many.

    Raises:
        OrthoFxError: the device of a site is no longer available, a module is offloaded as a whole, the model is
            already wrapped or sharded for several processes, or inside of such a wrapper, or sites that are to share an
            expansion are on several devices, of several dtypes or with hooks.
    """
    pending = [one for one in context.occurrences if one.config is not None and one.expansion is None]
    if pending:
        _refuse_wrapped(model, pending[0].site.name)
    starts = {one.config: replace(one.config, init="stable") for one in pending if one.config is not None}
    nearest: dict[str, _Placement] = {}
    groups = groups_of(pending)
    made = [_make(model, context, group, starts, nearest) for group in groups]
    for group, expansion in zip(groups, made, strict=True):
        first, *others = group
        first.describe(parameters=sum(parameter.numel() for parameter in expansion.parameters()))
        for one in others:
            one.describe(expansion=f"{one.config}, that of {first.site.name}")
        for one in group:
            one.expansion = expansion
            one.substitute(expansion)
    if pending:
        set_nested_paths(model)
        set_no_weight_decay(model)
    return len(pending)


# What has collected the parameters of a model, and would leave new ones alone in every process.
_WRAPPERS = ("DistributedDataParallel", "FSDPModule", "FullyShardedDataParallel")


def _refuse_wrapped(model: nn.Module, site: str) -> None:
    for name, module in model.named_modules():
        wrapper = next((cls.__name__ for cls in type(module).__mro__ if cls.__name__ in _WRAPPERS), None)
        sharded = [key for key, parameter in module.named_parameters(recurse=False) if is_sharded(parameter)]
        if wrapper is not None or sharded:
            held = (
                f"{name or 'the model'} is wrapped by {wrapper}" if wrapper else f"{join(name, sharded[0])} is sharded"
            )
            raise OrthoFxError(
                f"{site} would get parameters that no other process knows of, since {held}: call rewrite_ before "
                "DistributedDataParallel, fully_shard or parallelize_module"
            )
    if _is_inside_ddp(model):
        raise OrthoFxError(
            f"{site} would get parameters that no other process knows of, since the model is inside of a "
            "DistributedDataParallel: call rewrite_ before making it"
        )


def _is_inside_ddp(model: nn.Module) -> bool:
    """Whether there is a wrapper around the model, which the model does not know of."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    for _ in range(2):
        if not any(module is model for wrapper in _ddp_wrappers() for module in wrapper.modules()):
            return False
        gc.collect()  # one that is garbage does not matter
    return True


def _ddp_wrappers() -> list[nn.Module]:
    return [found for found in gc.get_objects() if issubclass(type(found), nn.parallel.DistributedDataParallel)]


_Placement = tuple[torch.device | None, torch.dtype | None]


def _make(
    model: nn.Module,
    context: Context,
    group: Sequence[Occurrence],
    starts: Mapping[ExpansionConfig, ExpansionConfig],
    nearest: dict[str, _Placement],
) -> LearnableExpansion:
    """The expansion of the sites that share it."""
    one, *others = group
    assert one.config is not None
    device, dtype = placement = _placement(model, one, nearest)
    for other in others:
        if (there := _placement(model, other, nearest)) != placement:
            raise OrthoFxError(
                f"one expansion cannot stand at {one.site.name}, on {_told(placement)}, and at {other.site.name}, on "
                f"{_told(there)}: choose granularity 'layer'"
            )
    try:
        expansion = context.maker.make(
            starts[one.config],
            channels=None if one.seen is None else one.seen.channels,
            channel_dim=None if one.seen is None else one.seen.channel_dim,
            reference=one.reference,
            device=device,
            dtype=dtype,
        )
    except (RuntimeError, AssertionError) as error:  # PyTorch asserts that the device exists
        raise OrthoFxError(f"{one.site.name} cannot be placed on {device}: {error}") from None
    expansion.site = one.site.name
    return expansion if one.owner.training else expansion.eval()


def _placement(model: nn.Module, one: Occurrence, nearest: dict[str, _Placement]) -> _Placement:
    """The device and the dtype of the parameters at a site."""
    owner = one.site.name.rpartition(".")[0]
    if owner not in nearest:
        nearest[owner] = _nearest(model, owner, one.site.name)
    return nearest[owner] if nearest[owner] != (None, None) else _of_result(one)


def _told(placement: _Placement) -> str:
    device, dtype = placement
    return f"{device or 'cpu'} in {str(dtype or torch.get_default_dtype()).removeprefix('torch.')}"


def _nearest(model: nn.Module, owner: str, site: str) -> _Placement:
    """The device and dtype of the nearest parameters to compute with: the owner's, else its closest ancestor's."""
    path = owner.split(".") if owner else []
    owners = [model.get_submodule(".".join(path[:length])) for length in range(len(path), -1, -1)]
    for module in owners:
        if loads_all_weights(module):
            raise OrthoFxError(
                f"{site}: {type(module).__name__} is offloaded as a whole, and its hook has no weights for new "
                "parameters: call rewrite_ before offloading"
            )
    for module in (module for above in owners for module in above.modules()):
        for parameter in module.parameters(recurse=False):
            if parameter.dtype in COMPUTED:  # a storage dtype, such as float8, computes with nothing
                return device_of(module, parameter), parameter.dtype
    return None, None


def _of_result(one: Occurrence) -> _Placement:
    """The device and dtype of the site's result in a `make_fx` graph, which takes its parameters as inputs."""
    owner, match = one.owner, one.match
    if match is not None and isinstance(owner, fx.GraphModule) and is_operator_graph(owner.graph):
        value = match.node.meta.get("val")
        if isinstance(value, Tensor):
            return value.device, value.dtype
    return None, None
