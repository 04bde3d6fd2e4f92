"""Which sites get one expansion together: with granularity "model", all that have one config and the same activation.

The same activation is the same function with the same settings, found in the same way: as a module of one class, as a
function that modules keep, as a call in source, or as the same nodes of a graph. So where `revert_` no longer knows
what stood at a place, it can put a copy of another one there.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from torch import fx, nn

from ortho_fx.config import ExpansionConfig
from ortho_fx.errors import OrthoFxError
from ortho_fx.passes.modules.exchange import hooked
from ortho_fx.passes.occurrence import Occurrence


def groups_of(occurrences: Sequence[Occurrence]) -> list[list[Occurrence]]:
    """The sites that share an expansion, in the order of the first of each group; the others are alone in theirs.

    Raises:
        OrthoFxError: an activation that is to be shared has hooks.
    """
    found: dict[Hashable, list[Occurrence]] = {}
    for one in occurrences:
        assert one.config is not None
        found.setdefault(group_of(one, one.config), []).append(one)
    for group in found.values():
        if len(group) > 1:
            _refuse_hooks(group)
    return list(found.values())


def group_of(one: Occurrence, config: ExpansionConfig) -> Hashable:
    """Equal for sites that share an expansion with this config."""
    return (config, _activation(one)) if config.granularity == "model" else id(one)


def _activation(one: Occurrence) -> Hashable:
    """Equal for the same activations."""
    function = (one.site.function, one.reference)
    if one.places:
        module = _module(one)
        return (*function, type(module), repr(module))
    if one.match is not None:
        return (*function, *(_written(node) for node in one.match.nodes))
    if one.site.kind == "attribute":
        return (*function, type(vars(one.owner)[one.site.name.rpartition(".")[2]]))
    return (*function, "call")


def _module(one: Occurrence) -> nn.Module | None:
    owner, key = one.places[0]
    return owner._modules[key]


def _written(node: fx.Node) -> Hashable:
    """A node without the names of the nodes that it reads."""
    arguments = fx.map_arg((node.args, node.kwargs), lambda read: None)
    return node.op, str(node.target), repr(arguments)


def _refuse_hooks(group: Sequence[Occurrence]) -> None:
    names = [one.site.name for one in group if one.places and hooked(_module(one))]
    if names:
        raise OrthoFxError(
            f"{', '.join(names)}: one expansion for {len(group)} sites would call the hooks of this activation at each "
            "of them: remove the hooks, or choose granularity 'layer'"
        )
