"""Which node of a graph is the backward of which activation, where a graph holds forward and backward.

`make_fx` traces a whole step: `aten.gelu` and, further down, `aten.gelu_backward` of the same input. To replace one and
not the other would give gradients of a function that the graph does not compute. So an activation of such a graph is
replaced together with its backward, or left with a reason:

- its backward is one node that reads its input, or its result where autograd keeps that (ReLU, tanh, sigmoid);
- it has one such node: several mean that the graph is differentiated more than once;
- no other activation could own that node, and the node is no backward of a value that checkpointing computed again.

A graph of ATen operators may also hold a backward that a decomposition took apart. Where no node tells of a backward,
an activation is replaced only if nothing reads its input or its result as such a backward would.

What cannot be seen: a product of a Hessian with a given vector, in which the second derivative of a ReLU is no node.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from ortho_fx.passes.graph.matches import Match, elementwise_name
from ortho_fx.passes.targets import BY_NAME, OPERATOR

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
# Where the tensor that autograd saved stands among the arguments, if not after the gradient.
_SAVED_AT = {"elu_backward": 5}
_KEEPS_RESULT = ("threshold_backward", "tanh_backward", "sigmoid_backward")
_ALIASES = ("alias", "detach")
_COMPARISONS = ("le", "lt", "ge", "gt", "eq", "ne", "sign", "sgn")
# A residual connection reads the input of an activation in a forward; a product may be part of a backward.
_SUMS = ("add", "sub")


@dataclass(frozen=True)
class Derivative:
    """The backward of an activation in the same graph; `reason` says why the activation has to stay."""

    node: fx.Node | None = None
    reason: str = ""


def is_operator_graph(graph: fx.Graph) -> bool:
    """Whether a graph is one of `make_fx`: calls of operators alone, and no signature of an exported program."""
    calls = [node for node in graph.nodes if node.op == "call_function"]
    operators = [node for node in calls if isinstance(node.target, OPERATOR)]
    others = (node for node in calls if not isinstance(node.target, OPERATOR))
    return (
        bool(operators)
        and all(getattr(node.target, "__name__", "") == "getitem" for node in others)
        and not isinstance(graph._codegen, fx.graph._PyTreeCodeGen)
    )


def derivatives(graph: fx.Graph, matches: Sequence[Match]) -> dict[fx.Node, Derivative]:
    """What is known of the backward of each activation of a `make_fx` graph; nothing for any other graph."""
    if not is_operator_graph(graph):
        return {}
    seeds = [node for node in graph.nodes if _is_seed(node)]
    if not seeds and not any(_tells_of_backward(node) for node in graph.nodes):
        names = {match.node for match in matches if match.kind == "node" and not BY_NAME[match.function].gate}
        return {match.node: Derivative(reason=_hidden_backward(match, names)) for match in matches}
    (output,) = (node for node in graph.nodes if node.op == "output")
    common = ""
    if len(seeds) > 1:
        common = "the graph is differentiated more than once"
    elif not isinstance(output.args[0], tuple | list):
        common = "the graph holds its backward, and returns no tuple that the new gradients could join"
    if common:
        return {match.node: Derivative(reason=common) for match in matches}
    return _paired(graph, matches, seeds)


def _paired(graph: fx.Graph, matches: Sequence[Match], seeds: Sequence[fx.Node]) -> dict[fx.Node, Derivative]:
    backwards: dict[tuple[str, fx.Node], list[fx.Node]] = {}
    for node in graph.nodes:
        name = _operator(node)
        if name in _BACKWARD_OF.values():
            saved = node.args[_SAVED_AT.get(name, 1)]
            if isinstance(saved, fx.Node):
                backwards.setdefault((name, _origin(saved)), []).append(node)
    single = [match for match in matches if match.kind == "node"]
    own = {match.node: _backwards_of(match, backwards) for match in single}
    forward = _ancestors(seeds)
    found = {}
    for match in matches:
        nodes = own.get(match.node, [])
        rivals = [other.node for other in single if other is not match and set(own[other.node]) & set(nodes)]
        again = [
            other.node
            for other in single
            if not seeds and not own[other.node] and other.function == match.function and other is not match
        ]
        reason = ""
        if match.in_place:
            reason = "it changes its input in place, in a graph that holds its backward"
        elif match.kind == "formula" or match.function not in _BACKWARD_OF:
            reason = "the graph holds its backward as several nodes"
        elif not nodes:
            reason = "the graph holds a backward, but no node of it is that of this activation"
        elif len(nodes) > 1:
            reason = f"it has {len(nodes)} backward nodes ({_names(nodes)}): it is differentiated more than once"
        elif rivals:
            reason = f"{nodes[0].name} may be the backward of {_names(rivals)} as well"
        elif again or (seeds and match.node not in forward):
            reason = "it may compute another activation again for the backward, as checkpointing does"
        found[match.node] = Derivative(None if reason else nodes[0], reason)
    return found


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
    """The node that an alias, as autograd makes one of what it saves, stands for."""
    while _operator(node) in _ALIASES and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    for user in node.users:
        if _operator(user) in _ALIASES:
            yield from _readers(user)
        else:
            yield user


def _ancestors(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(node.all_input_nodes)
    return found


def _is_seed(node: fx.Node) -> bool:
    """Whether a node is the gradient of a loss by itself, with which `autograd.grad` starts."""
    name = _operator(node)
    if name != "ones_like" and not (name == "full_like" and node.args[1] == 1):
        return False
    value: Any = node.meta.get("val")
    return not isinstance(value, Tensor) or value.dim() == 0


def _tells_of_backward(node: fx.Node) -> bool:
    return (
        "_backward" in _operator(node)
        or (node.op == "placeholder" and str(node.target).startswith("tangents"))
        or bool(node.meta.get("autograd_backward"))
        or node.meta.get("partitioner_tag") == "is_backward"
    )


def _hidden_backward(match: Match, activations: Collection[fx.Node]) -> str:
    """Why an activation may have a backward that a decomposition took apart; empty where it cannot."""
    for reader in () if match.argument is None else _readers(_origin(match.argument)):
        harmless = reader in match.nodes or reader in activations or _operator(reader) in _SUMS
        if not harmless and (elementwise_name(reader) is not None or _operator(reader) in _COMPARISONS):
            return f"its input is read by {reader.name} as well, which may be a part of its backward"
    for reader in _readers(match.node):
        if _operator(reader) in _COMPARISONS:
            return f"its result is read by {reader.name}, which may be a part of its backward"
    return ""
