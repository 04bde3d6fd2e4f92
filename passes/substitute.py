"""Puts expansions in the place of activations, one function for each kind of site.

Each takes what is known of the site when it is found, and returns the function that does the replacing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import fx, nn

from ortho_fx.passes.source import origin, rewrite_class
from ortho_fx.passes.targets import may_change_input

Substitute = Callable[[nn.Module], None]


def module_in(places: Sequence[tuple[nn.Module, str]]) -> Substitute:
    """Replaces a child module in every place that holds it, so that a shared activation stays shared."""

    def put(expansion: nn.Module) -> None:
        for owner, key in places:
            owner._modules[key] = expansion
            _leave_fast_path(owner)

    return put


def attribute_of(owner: nn.Module, key: str) -> Substitute:
    """Replaces a function that the module keeps as an attribute (`self.activation = F.gelu`) by a child module."""

    def put(expansion: nn.Module) -> None:
        delattr(owner, key)
        owner.add_module(key, expansion)
        _leave_fast_path(owner)

    return put


def call_in(owner: nn.Module, attribute: str) -> Substitute:
    """Replaces a call in the source of the module's class, for this instance."""

    def put(expansion: nn.Module) -> None:
        cls, done = origin(type(owner))
        rewritten = rewrite_class(cls, done | {attribute})
        owner.add_module(attribute, expansion)
        owner.__class__ = rewritten

    return put


def node_in(owner: fx.GraphModule, node: fx.Node, name: str) -> Substitute:
    """Replaces a node of a graph by a call of a child module of that name."""

    def put(expansion: nn.Module) -> None:
        source = node.args[0] if node.args else node.kwargs["input"]
        assert isinstance(source, fx.Node)
        owner.add_module(name, expansion)
        with owner.graph.inserting_before(node):
            call = owner.graph.call_module(name, (source,))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        if may_change_input(node):
            # Whoever reads the input afterwards expects the changed tensor.
            order = {other: index for index, other in enumerate(owner.graph.nodes)}
            source.replace_all_uses_with(call, delete_user_cb=lambda user: order[user] > order[node])
        owner.graph.erase_node(node)
        owner.graph.lint()
        owner.recompile()

    return put


def _leave_fast_path(owner: nn.Module) -> None:
    # In eval, nn.TransformerEncoderLayer runs a fused kernel with the activation that this flag names, whatever its
    # `activation` is; 0 names none.
    if isinstance(owner, nn.TransformerEncoderLayer):
        owner.activation_relu_or_gelu = 0
