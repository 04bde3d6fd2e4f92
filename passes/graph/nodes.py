"""Replaces nodes of a graph by expansions, with or without their backward nodes, and puts the nodes back."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from ortho_fx.passes.graph.matches import Match, piece
from ortho_fx.passes.vocabulary.expansions import LearnableExpansion, Replaced, Substitute, remember
from ortho_fx.passes.vocabulary.targets import OPERATOR


def node_in(owner: fx.GraphModule, match: Match, name: str) -> Substitute:
    """Replaces nodes of a graph by a call of a child module of that name."""

    def put(expansion: nn.Module) -> None:
        node = match.node
        # Looked up only now: an earlier substitution may have replaced the input that the search found.
        (source,) = {other for part in match.nodes for other in part.all_input_nodes if other not in match.nodes}
        remember(expansion, Replaced("node", piece(match.nodes, source)))
        owner.add_module(name, expansion)
        order = {other: index for index, other in enumerate(owner.graph.nodes)}
        written = match.in_place and not _has_one_name(source, node, owner, order)
        with owner.graph.inserting_before(node):
            call = owner.graph.call_module(name, (_cloned(source, node) if written else source,))
            result = _written(source, call, node) if written else call
        call.meta = dict(node.meta)
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result)
        if match.in_place and not written:
            # The activation changed its input in place, so later readers of the input need the new result.
            source.replace_all_uses_with(call, delete_user_cb=lambda user: order.get(user, -1) > order[node])
        # From the result back to the input: a node can be erased once it has no users.
        for part in match.nodes:
            if not part.users:
                owner.graph.erase_node(part)
        owner.graph.lint()
        owner.recompile()

    return put


# Layers that return a tensor which nobody else has.
_LAYERS = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm),
)


def _has_one_name(source: fx.Node, node: fx.Node, owner: fx.GraphModule, order: Mapping[fx.Node, int]) -> bool:
    """Whether nothing but the uses of a node reads its tensor: it is a new one, and no view of it was made before."""
    earlier = [user for user in source.users if order[user] < order[node]]
    return all(_is_new(one, owner) for one in (source, *earlier))


def _is_new(node: fx.Node, owner: fx.GraphModule) -> bool:
    """Whether a node returns a tensor that shares no memory with another."""
    if node.op == "call_module":
        return type(owner.get_submodule(str(node.target))) in _LAYERS
    if isinstance(node.target, OPERATOR):
        return all(returned.alias_info is None for returned in node.target._schema.returns)
    return node.op == "call_function" and node.target in _NEW


_NEW = (operator.add, operator.sub, operator.mul, operator.truediv, operator.pow, operator.neg, operator.matmul)


def _cloned(source: fx.Node, node: fx.Node) -> fx.Node:
    """A copy of the input: what the expansion keeps for its backward must not be written to."""
    if isinstance(node.target, OPERATOR):
        return node.graph.call_function(torch.ops.aten.clone.default, (source,))
    return node.graph.call_method("clone", (source,))


def _written(source: fx.Node, value: fx.Node, node: fx.Node) -> fx.Node:
    """Writes a value to the input, for whoever holds that tensor under another name."""
    if isinstance(node.target, OPERATOR):
        return node.graph.call_function(torch.ops.aten.copy_.default, (source, value))
    return node.graph.call_method("copy_", (source, value))


def _is_written_back(node: fx.Node) -> fx.Node | None:
    """The node that writes the result of a call of an expansion to its input."""
    (argument,) = node.all_input_nodes
    for user in node.users:
        writes = user.target in ("copy_", torch.ops.aten.copy_.default)
        if writes and user.args[1] is node and user.args[0] in argument.all_input_nodes:
            return user
    return None


def pair_in(owner: fx.GraphModule, match: Match, backward: fx.Node, name: str) -> Substitute:
    """Replaces a node and its backward by the two operators of an expansion.

    The parameters belong to a child module of that name and are read by `get_attr`, so the graph's inputs stay.
    Their gradients become the last outputs of the graph, in the order of the basis' learnable parameters.
    """

    def put(expansion: nn.Module) -> None:
        if not isinstance(expansion, LearnableExpansion):  # a probe, which computes the function itself
            node_in(owner, match, name)(expansion)
            return
        remember(expansion, Replaced("pair"))
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


def restore_nodes(owner: fx.GraphModule, key: str, replaced: fx.Graph) -> None:
    """Replaces the calls of an expansion by the nodes that it had replaced."""
    for node in [node for node in owner.graph.nodes if node.op == "call_module" and node.target == key]:
        written, source = _is_written_back(node), node.args[0]
        read = source if written is None else written.args[0]
        assert isinstance(source, fx.Node)
        assert isinstance(read, fx.Node)
        with owner.graph.inserting_before(node):
            (start,) = (part for part in replaced.nodes if part.op == "placeholder")
            result = owner.graph.graph_copy(replaced, {start: read})
        assert isinstance(result, fx.Node)
        (node if written is None else written).replace_all_uses_with(result)
        for old in (node,) if written is None else (written, node, source):
            owner.graph.erase_node(old)
    delattr(owner, key)
    owner.graph.lint()
    owner.recompile()


def _operator(name: str) -> Any:
    return getattr(torch.ops.ortho_fx, name).default


def _erase_unread_aliases(graph: fx.Graph, node: fx.Node) -> None:
    """Erases the aliases by which autograd saved a node, if they have no readers now."""
    for user in list(node.users):
        if isinstance(user.target, OPERATOR) and user.target._schema.name in ("aten::alias", "aten::detach"):
            _erase_unread_aliases(graph, user)
            if not user.users:
                graph.erase_node(user)
