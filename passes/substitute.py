"""Puts expansions in the place of activations, one function for each kind of site, and back.

Each takes what is known of the site when it is found, and returns the function that does the replacing. The expansion
keeps what stood there in `_replaced`, by which `restore` undoes it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ortho_fx.errors import OrthoFxError
from ortho_fx.passes.expansions import LearnableExpansion
from ortho_fx.passes.graph.matches import Match, piece
from ortho_fx.passes.graph.operators import raise_calls
from ortho_fx.passes.source import rewrite_class, set_class, source_of
from ortho_fx.passes.targets import OPERATOR

Substitute = Callable[[nn.Module], None]


@dataclass(frozen=True)
class Replaced:
    """What an expansion took the place of: "module" and "attribute" keep it, "call" needs nothing, "node" a graph.

    "pair" is a node and its backward, which are not put back.
    """

    kind: str
    value: Any = None


def module_in(places: Sequence[tuple[nn.Module, str]]) -> Substitute:
    """Replaces a child module in every place that holds it, so that a shared activation stays shared."""

    def put(expansion: nn.Module) -> None:
        for owner, key in places:
            _remember(expansion, Replaced("module", owner._modules[key]))
            _exchange(owner, key, expansion)
            _leave_fast_path(owner)

    return put


def attribute_of(owner: nn.Module, key: str) -> Substitute:
    """Replaces a function that the module keeps as an attribute (`self.activation = F.gelu`) by a child module."""

    def put(expansion: nn.Module) -> None:
        _remember(expansion, Replaced("attribute", vars(owner)[key]))
        delattr(owner, key)
        owner.add_module(key, expansion)
        _leave_fast_path(owner)

    return put


def call_in(owner: nn.Module, attribute: str, split: frozenset[str] = frozenset()) -> Substitute:
    """Replaces a call in the source of the module's class, for this instance."""

    def put(expansion: nn.Module) -> None:
        source = source_of(owner, split)
        rewritten = rewrite_class(replace(source, replaced=source.replaced | {attribute}))
        _remember(expansion, Replaced("call"))
        owner.add_module(attribute, expansion)
        set_class(owner, rewritten)

    return put


def node_in(owner: fx.GraphModule, match: Match, name: str) -> Substitute:
    """Replaces nodes of a graph by a call of a child module of that name."""

    def put(expansion: nn.Module) -> None:
        node = match.node
        # Looked up now: the input may be a node that took the place of the one that was found.
        (source,) = {other for part in match.nodes for other in part.all_input_nodes if other not in match.nodes}
        _remember(expansion, Replaced("node", piece(match.nodes, source)))
        owner.add_module(name, expansion)
        with owner.graph.inserting_before(node):
            call = owner.graph.call_module(name, (source,))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        if match.in_place:
            # Whoever reads the input afterwards expects the changed tensor.
            order = {other: index for index, other in enumerate(owner.graph.nodes)}
            source.replace_all_uses_with(call, delete_user_cb=lambda user: order[user] > order[node])
        # From the result upwards: a node goes once nobody uses it.
        for part in match.nodes:
            if not part.users:
                owner.graph.erase_node(part)
        owner.graph.lint()
        owner.recompile()

    return put


def pair_in(owner: fx.GraphModule, match: Match, backward: fx.Node, name: str) -> Substitute:
    """Replaces a node and its backward by the two operators of an expansion.

    The parameters are a child module's of that name, read by `get_attr`: the inputs of the graph stay those that its
    caller passes. Their gradients become the last outputs of the graph, in the order of the basis' learnable ones.
    """

    def put(expansion: nn.Module) -> None:
        if not isinstance(expansion, LearnableExpansion):  # a probe, which computes the function itself
            node_in(owner, match, name)(expansion)
            return
        _remember(expansion, Replaced("pair"))
        owner.add_module(name, expansion)
        graph, node, basis = owner.graph, match.node, expansion.basis
        source = match.argument
        assert source is not None
        with graph.inserting_before(node):
            parameters = [graph.get_attr(f"{name}.{parameter.name}") for parameter in basis.parameters]
            value = graph.call_function(_operator(basis.name), (source, *parameters))
        value.meta = dict(node.meta)
        node.replace_all_uses_with(value)
        with graph.inserting_before(backward):
            arguments = (backward.args[0], source, *parameters)
            gradients = graph.call_function(_operator(f"{basis.name}_backward"), arguments)
            of_input, *of_parameters = (
                graph.call_function(operator.getitem, (gradients, index)) for index in range(1 + len(basis.learnable))
            )
        of_input.meta = dict(backward.meta)
        backward.replace_all_uses_with(of_input)
        (output,) = (other for other in graph.nodes if other.op == "output")
        returned = output.args[0]
        output.args = (type(returned)((*returned, *of_parameters)),)
        graph.erase_node(backward)
        graph.erase_node(node)
        _erase_unread_aliases(graph, value)
        graph.lint()
        owner.recompile()

    return put


def _operator(name: str) -> Any:
    return getattr(torch.ops.ortho_fx, name).default


def _erase_unread_aliases(graph: fx.Graph, node: fx.Node) -> None:
    """Erases the aliases of a node that autograd made to save it, and that nobody reads now."""
    for user in list(node.users):
        if isinstance(user.target, OPERATOR) and user.target._schema.name in ("aten::alias", "aten::detach"):
            _erase_unread_aliases(graph, user)
            if not user.users:
                graph.erase_node(user)


def put_in_copy(put: Substitute, expansion: nn.Module) -> None:
    """Puts an expansion of a model into a copy of it as well; `restore` goes by the model itself all the same."""
    replaced = expansion._replaced
    put(expansion)
    expansion._replaced = replaced


def revert_expansions(model: nn.Module, chosen: Callable[[nn.Module], bool]) -> tuple[str, ...]:
    """Puts back what the chosen expansions replaced; their names."""
    places = [
        (f"{prefix}.{key}" if prefix else key, owner, key)
        for prefix, owner in model.named_modules()
        for key, child in owner._modules.items()
        if child is not None and hasattr(child, "_replaced") and chosen(child)
    ]
    for name, owner, key in places:
        if vars(owner._modules[key])["_replaced"][0].kind == "pair":
            raise OrthoFxError(f"{name} stands in a graph that holds its backward, which cannot be put back")
    for owner in model.modules():
        if isinstance(owner, fx.GraphModule):
            raise_calls(owner, lambda module: hasattr(module, "_replaced") and chosen(module))
    for _, owner, key in places:
        restore(owner, key)
    return tuple(name for name, _, _ in places)


def restore(owner: nn.Module, key: str) -> None:
    """Puts what an expansion replaced back in one place that holds it."""
    expansion = owner._modules[key]
    assert expansion is not None
    (replaced,) = vars(expansion)["_replaced"]
    if replaced.kind == "module":
        _exchange(owner, key, replaced.value.train(expansion.training))
    elif replaced.kind == "attribute":
        delattr(owner, key)
        # Past nn.Module, which would register a module that the owner did not.
        object.__setattr__(owner, key, replaced.value)
    elif replaced.kind == "call":
        delattr(owner, key)
        source = source_of(owner)
        left = replace(source, replaced=source.replaced - {key})
        set_class(owner, rewrite_class(left) if left.replaced else left.cls)
    else:
        assert isinstance(owner, fx.GraphModule)
        for node in [node for node in owner.graph.nodes if node.op == "call_module" and node.target == key]:
            with owner.graph.inserting_before(node):
                (start,) = (part for part in replaced.value.nodes if part.op == "placeholder")
                node.replace_all_uses_with(owner.graph.graph_copy(replaced.value, {start: node.args[0]}))
            owner.graph.erase_node(node)
        delattr(owner, key)
        owner.graph.lint()
        owner.recompile()
    if isinstance(owner, nn.TransformerEncoderLayer) and key == "activation":
        owner.activation_relu_or_gelu = _fast_path_of(owner.activation)


def _exchange(owner: nn.Module, key: str, new: nn.Module) -> None:
    """Puts a child in the place of another, in the lists as well in which the owner keeps its children."""
    old = owner._modules[key]
    for kept in vars(owner).values():
        if isinstance(kept, list):
            kept[:] = [new if item is old else item for item in kept]
    owner._modules[key] = new


def _remember(expansion: nn.Module, replaced: Replaced) -> None:
    # In a tuple, for a module in it to be no submodule.
    expansion._replaced = (replaced,)  # type: ignore[assignment]


def _leave_fast_path(owner: nn.Module) -> None:
    # In eval, nn.TransformerEncoderLayer runs a fused kernel with the activation that this flag names, whatever its
    # `activation` is; 0 names none.
    if isinstance(owner, nn.TransformerEncoderLayer):
        owner.activation_relu_or_gelu = 0


def _fast_path_of(activation: object) -> int:
    if activation is F.relu or isinstance(activation, nn.ReLU):
        return 1
    return 2 if activation is F.gelu or isinstance(activation, nn.GELU) else 0
