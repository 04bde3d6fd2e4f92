"""From the call of an expansion to its operator, and back.

A lowered call reads the parameters of the child by `get_attr`; so the child, its names in the state dict and the
optimizer's parameters stay what they were.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn

from ortho_fx.errors import OrthoFxError
from ortho_fx.passes.expansions import LearnableExpansion
from ortho_fx.passes.targets import OPERATOR

_AROUND = ("clamp", "getitem")


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True


def lower_calls(owner: fx.GraphModule) -> int:
    """Puts operators in the place of the calls of learnable expansions; how many."""
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
    """Puts calls of the chosen expansions in the place of their operators; how many."""
    edits = 0
    for node in list(owner.graph.nodes):
        name = expansion_of(node)
        if not name or not chosen(owner.get_submodule(name)):
            continue
        source: Any = node.args[0]
        parts = [node]
        if source.op != "placeholder" and f"{name}.bounds" in _reads(source):
            parts.append(source)
            source = source.args[0]
        with owner.graph.inserting_before(node):
            call = owner.graph.call_module(name, (source,))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        for part in parts:
            _erase_with_inputs(owner.graph, part)
        edits += 1
    if edits:
        owner.graph.lint()
        owner.recompile()
    return edits


def expansion_of(node: fx.Node) -> str:
    """The name of the child whose operator a node is; empty for any other node."""
    if not isinstance(node.target, OPERATOR) or node.target.namespace != "ortho_fx":
        return ""
    attributes = [str(argument.target) for argument in node.all_input_nodes if argument.op == "get_attr"]
    is_backward = node.target._schema.name.endswith("_backward")
    return attributes[0].rpartition(".")[0] if attributes and not is_backward else ""


def _reads(node: fx.Node) -> set[str]:
    """The attributes that a node reads by itself or by items of them."""
    return {str(other.target) for given in node.all_input_nodes for other in (given, *given.all_input_nodes)}


def _as_operator(expansion: LearnableExpansion) -> fx.Graph | None:
    """What an expansion computes as a graph with one operator of a basis; None where it is not that alone."""
    if expansion._forward_hooks or expansion._forward_pre_hooks or expansion._backward_hooks:
        return None
    try:
        graph = _Tracer().trace(expansion)
    except (OrthoFxError, AttributeError, TypeError, fx.proxy.TraceError):  # it asks for a shape or a dtype
        return None
    calls = [node for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    ours = [node for node in calls if isinstance(node.target, OPERATOR) and node.target.namespace == "ortho_fx"]
    around = all(getattr(node.target, "__name__", node.target) in _AROUND for node in calls if node not in ours)
    return graph if len(ours) == 1 and around else None


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


def _erase_with_inputs(graph: fx.Graph, node: fx.Node) -> None:
    """Erases a node that nobody reads, and the attributes that were read for it."""
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for other in inputs:
        is_item = getattr(other.target, "__name__", "") == "getitem"
        if not other.users and (other.op == "get_attr" or is_item):
            _erase_with_inputs(graph, other)
