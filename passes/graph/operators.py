"""Replaces the call of an expansion by its operator, and the operator by the call.

A lowered call reads the parameters of the child module by `get_attr`. So the child stays, and its names in the state
dict and the optimizer's parameters do not change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn

from ortho_fx.errors import OrthoFxError
from ortho_fx.passes.vocabulary.expansions import LearnableExpansion
from ortho_fx.passes.vocabulary.targets import OPERATOR


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True


def lower_calls(owner: fx.GraphModule) -> int:
    """Replaces the calls of learnable expansions by operators; returns how many."""
    calls = [node for node in owner.graph.nodes if node.op == "call_module"]
    edits = 0
    for call in calls:
        expansion = owner.get_submodule(str(call.target))
        if isinstance(expansion, LearnableExpansion) and len(call.args) == 1 and not call.kwargs:
            inner = _as_operator(expansion)
            if inner is not None:
                _inline(owner.graph, call, inner)
                edits += 1
    if edits:
        owner.graph.lint()
        owner.recompile()
    return edits


def raise_calls(owner: fx.GraphModule, chosen: Callable[[nn.Module], bool]) -> int:
    """Replaces the operators of the chosen expansions by calls; returns how many."""
    edits = 0
    for node in list(owner.graph.nodes):
        name = expansion_of(node)
        expansion = owner.get_submodule(name) if name else None
        if name and isinstance(expansion, LearnableExpansion) and chosen(expansion):
            with owner.graph.inserting_before(node):
                call = owner.graph.call_module(name, (node.args[0],))
            call.meta = dict(node.meta)
            node.replace_all_uses_with(call)
            parameters = [other for other in node.all_input_nodes if other.op == "get_attr"]
            for part in (node, *parameters):
                if not part.users:
                    owner.graph.erase_node(part)
            edits += 1
    if edits:
        owner.graph.lint()
        owner.recompile()
    return edits


def expansion_of(node: fx.Node) -> str | None:
    """The name of the child module to which an operator node belongs; None for other nodes.

    The name is empty if the parameters belong to the graph module itself.
    """
    if not isinstance(node.target, OPERATOR) or node.target.namespace != "ortho_fx":
        return None
    attributes = [str(argument.target) for argument in node.all_input_nodes if argument.op == "get_attr"]
    is_backward = node.target._schema.name.endswith("_backward")
    return attributes[-1].rpartition(".")[0] if attributes and not is_backward else None


def _as_operator(expansion: LearnableExpansion) -> fx.Graph | None:
    """The graph of an expansion that is one operator of its basis; None if it computes more, such as a clamp."""
    if expansion._forward_hooks or expansion._forward_pre_hooks or expansion._backward_hooks:
        return None
    try:
        graph = _Tracer().trace(expansion)
    except (OrthoFxError, AttributeError, TypeError, fx.proxy.TraceError):  # forward reads a shape or a dtype
        return None
    calls = [node for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    return graph if len(calls) == 1 and expansion_of(calls[0]) is not None else None


def _inline(graph: fx.Graph, call: fx.Node, inner: fx.Graph) -> None:
    arguments = iter(call.args)
    values: dict[fx.Node, Any] = {}
    with graph.inserting_before(call):
        for node in inner.nodes:
            if node.op == "placeholder":
                values[node] = next(arguments, None)
            elif node.op == "get_attr":
                values[node] = graph.get_attr(f"{call.target}.{node.target}")
            elif node.op == "output":
                result = values[node.args[0]]
            else:
                values[node] = graph.node_copy(node, values.__getitem__)
    result.meta = dict(call.meta)
    call.replace_all_uses_with(result)
    graph.erase_node(call)
