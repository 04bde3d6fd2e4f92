"""Finds the backward node of each activation in a graph that holds forward and backward.

`make_fx` traces a whole step: `aten.gelu` and, further down, `aten.gelu_backward` of the same input. If only one of the
two were replaced, the gradients would belong to a function that the graph does not compute. So an activation of such a
graph is replaced together with its backward if all of this holds, and is left with a reason otherwise:

- The backward of the graph starts from one loss, `ones_like(loss)`. A product with a given vector could be a forward
  derivative, for which the new parameters have no gradient. Two losses may be two derivatives.
- The activation's backward is one node. It reads the input, or the result where autograd saves that (ReLU, tanh,
  sigmoid).
- No other activation could own that node, and the activation is not recomputed for it, as checkpointing does.

In a graph of ATen operators, a decomposition may have split the backward into several nodes. If no node marks a
backward, an activation is replaced only if nothing reads its input or its result as such a backward would.

One case stays undetected: a product of a Hessian with a given vector. The second derivative of a ReLU is zero, and
leaves no node.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from ortho_fx.passes.graph.matches import Match, elementwise_name, find_matches, single_match
from ortho_fx.passes.vocabulary.targets import BY_NAME, OPERATOR

# The backward operator of each function that has one.
_BACKWARD_OF: Mapping[str, str] = {
    "relu": "threshold_backward",
    "relu6": "hardtanh_backward",
    "hardtanh": "hardtanh_backward",
    "leaky_relu": "leaky_relu_backward",
    "elu": "elu_backward",
    "celu": "elu_backward",
    "selu": "elu_backward",
    **{
        name: f"{name}_backward"
        for name in ("gelu", "silu", "mish", "hardswish", "softplus", "sigmoid", "hardsigmoid", "tanh")
    },
}
# The position of the saved tensor among the arguments, if it does not follow the gradient.
_SAVED_AT = {"elu_backward": 5}
_KEEPS_RESULT = ("threshold_backward", "tanh_backward", "sigmoid_backward")
_ALIASES = ("alias", "detach")
_COMPARISONS = ("le", "lt", "ge", "gt", "eq", "ne", "sign", "sgn")
_SPREAD = "the graph holds its backward as several nodes"
# A sum that reads the input of an activation is a residual connection. A product may be part of a backward.
_SUMS = ("add", "sub")


@dataclass(frozen=True)
class Derivative:
    """The backward node of an activation in the same graph; `reason` says why the activation is left."""

    node: fx.Node | None = None
    reason: str = ""


def is_operator_graph(graph: fx.Graph) -> bool:
    """Whether `make_fx` may have made a graph: it calls operators, and has no signature of an exported program."""
    calls_operators = any(isinstance(node.target, OPERATOR) for node in graph.nodes)
    return calls_operators and type(graph._codegen) is fx.graph.CodeGen


def holds_backward(graph: fx.Graph) -> bool:
    """Whether some node marks the graph as one that holds a backward."""
    return is_operator_graph(graph) and any(_is_seed(node) or _tells_of_backward(node) for node in graph.nodes)


def with_derivatives(graph: fx.Graph, *, beside_backward: bool = False) -> list[tuple[Match, Derivative]]:
    """The activations of a graph, each with its `Derivative`.

    In a graph that holds a backward, only the activations of the forward are listed. There a node with its own backward
    node is an activation even inside a formula: ReLU in `relu(x) ** 2`. `beside_backward` says that another graph of
    the model holds a backward, for example the graph around the branches of a condition.
    """
    if not is_operator_graph(graph):
        return [(match, Derivative()) for match in find_matches(graph)]
    seeds = [node for node in graph.nodes if _is_seed(node)]
    matches = find_matches(graph, _ancestors(seeds) if seeds else None)
    if not holds_backward(graph):
        if beside_backward:
            return [(match, Derivative(reason="a graph around it holds a backward")) for match in matches]
        names = {match.node for match in matches if match.kind == "node" and not BY_NAME[match.function].gate}
        return [(match, Derivative(reason=_hidden_backward(match, names))) for match in matches]
    (output,) = (node for node in graph.nodes if node.op == "output")
    common = ""
    if not seeds:
        common = "its backward starts from no loss of the graph: which way it goes is not known"
    elif len(seeds) > 1:
        common = "the graph is differentiated more than once"
    elif not isinstance(output.args[0], tuple | list):
        common = "the graph holds its backward, and returns no tuple that the new gradients could join"
    if common:
        return [(match, Derivative(reason=common)) for match in matches]
    return _paired(graph, matches, seeds[0])


def _paired(graph: fx.Graph, matches: Sequence[Match], seed: fx.Node) -> list[tuple[Match, Derivative]]:
    backwards: dict[tuple[str, fx.Node], list[fx.Node]] = {}
    for node in graph.nodes:
        name = _operator(node)
        if name in _BACKWARD_OF.values():
            saved = node.args[_SAVED_AT.get(name, 1)]
            if isinstance(saved, fx.Node):
                backwards.setdefault((name, _origin(saved)), []).append(node)
    forward = _ancestors([seed])
    singles = [match for match in map(single_match, graph.nodes) if match is not None]
    own = {match.node: _backwards_of(match, backwards) for match in singles}
    plain = {match.node for match in singles if own[match.node] and not BY_NAME[match.function].gate}
    formulas = [match for match in matches if match.kind == "formula" and plain.isdisjoint(match.nodes)]
    covered = {node for match in formulas for node in match.nodes}
    found = [(match, Derivative(reason=_SPREAD)) for match in formulas]
    for match in singles:
        nodes = own[match.node]
        # A gate outside of the forward, such as the sigmoid in mish's derivative, is part of a backward.
        if match.node in covered or (match.node not in forward and not (nodes and match.node in plain)):
            continue
        rivals = [other.node for other in singles if other is not match and set(own[other.node]) & set(nodes)]
        reason = ""
        if match.in_place:
            reason = "it changes its input in place, in a graph that holds its backward"
        elif match.function not in _BACKWARD_OF:
            reason = _SPREAD
        elif not nodes:
            reason = "the graph holds a backward, but no node of it is that of this activation"
        elif rivals:
            reason = f"{_names(nodes)} may be the backward of {_names(rivals)} as well"
        elif len(nodes) > 1:
            reason = f"it has {len(nodes)} backward nodes ({_names(nodes)}): it is differentiated more than once"
        elif match.node not in forward:
            reason = "it is computed again for the backward, as checkpointing does"
        elif seed not in _ancestors(nodes):
            reason = f"{nodes[0].name} does not come from the loss of the graph"
        found.append((match, Derivative(None if reason else nodes[0], reason)))
    order = {node: index for index, node in enumerate(graph.nodes)}
    return sorted(found, key=lambda pair: order[pair[0].node])


def _names(nodes: Sequence[fx.Node]) -> str:
    return ", ".join(node.name for node in nodes)


def _backwards_of(match: Match, backwards: Mapping[tuple[str, fx.Node], list[fx.Node]]) -> list[fx.Node]:
    name = _BACKWARD_OF.get(match.function, "")
    saved = [] if match.argument is None else [_origin(match.argument)]
    if name in _KEEPS_RESULT:
        saved.append(match.node)
    return [node for tensor in saved for node in backwards.get((name, tensor), [])]


def _operator(node: fx.Node) -> str:
    """The name of a node's operator, without namespace and overload; empty for any other node."""
    if node.op != "call_function" or not isinstance(node.target, OPERATOR):
        return ""
    return node.target._schema.name.rpartition("::")[2]


def _origin(node: fx.Node) -> fx.Node:
    """The node behind a chain of aliases. Autograd makes aliases of the tensors that it saves."""
    while _operator(node) in _ALIASES and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    for user in node.users:
        if _operator(user) in _ALIASES:
            yield from _readers(user)
        else:
            yield user


def _ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(node.all_input_nodes)
    return found


def _is_seed(node: fx.Node) -> bool:
    """Whether a node is the gradient of a loss with respect to itself, 1, from which `autograd.grad` starts."""
    name = _operator(node)
    if name != "ones_like" and not (name == "full_like" and node.args[1] == 1):
        return False
    value: Any = node.meta.get("val")
    return not isinstance(value, Tensor) or value.dim() == 0


def _tells_of_backward(node: fx.Node) -> bool:
    return (
        "_backward" in _operator(node)
        # AOTAutograd gives inputs these names if it traces a backward too, in this graph or in another one.
        or (node.op == "placeholder" and str(node.target).startswith(("primals_", "tangents_")))
        or bool(node.meta.get("autograd_backward"))
        or node.meta.get("partitioner_tag") == "is_backward"
    )


def _hidden_backward(match: Match, activations: Collection[fx.Node]) -> str:
    """Why an activation may have a backward of several nodes, from a decomposition; empty if it has none."""
    for reader in () if match.argument is None else _readers(_origin(match.argument)):
        harmless = reader in match.nodes or reader in activations or _operator(reader) in _SUMS
        if not harmless and (elementwise_name(reader) is not None or _operator(reader) in _COMPARISONS):
            return f"its input is read by {reader.name} as well, which may be a part of its backward"
    for reader in _readers(match.node):
        if _operator(reader) in _COMPARISONS:
            return f"its result is read by {reader.name}, which may be a part of its backward"
    return ""
