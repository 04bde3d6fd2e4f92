"""What becomes of a value in a graph: the nodes that take it, in the terms of `guards`."""

from __future__ import annotations

import operator
from collections.abc import Iterator

from torch import fx

from ortho_fx.passes.graph.matches import Match
from ortho_fx.passes.vocabulary.elementwise import ARITHMETIC
from ortho_fx.passes.vocabulary.guards import Use, guard_of, number
from ortho_fx.passes.vocabulary.targets import OPERATOR

_OTHERS = {operator.getitem: "getitem", operator.floordiv: "floordiv", operator.matmul: "matmul"}
_LONGEST_WAY = 8


def guard_of_match(match: Match) -> str:
    """Why an activation of a graph is none unless it is named as one; empty where it is one."""
    argument = match.argument
    return guard_of(
        match.function, uses_of(match.node), of_parameter=_of_parameter(argument), of_margin=_of_margin(argument)
    )


def guard_of_called(graph: fx.Graph, key: str, function: str) -> str:
    """The same of a child that a graph calls, by its name."""
    calls = (node for node in graph.nodes if node.op == "call_module" and node.target == key)
    guards = (
        guard_of(function, uses_of(node), of_margin=_of_margin(next(iter(node.all_input_nodes), None)))
        for node in calls
    )
    return next((guard for guard in guards if guard), "")


def uses_of(node: fx.Node) -> Iterator[Use]:
    """The nodes that take the value of a node."""
    for user in node.users:
        name = _name(user)
        if name and node in user.args:
            operand = user.args.index(node)
            other = user.args[1 - operand] if operand < 2 <= len(user.args) else None
            alone = len(user.args) == 1 and not user.kwargs
            yield Use(name, operand, number(other), lambda user=user: uses_of(user), alone)  # type: ignore[misc]


def _name(node: fx.Node) -> str:
    if node.op == "call_method":
        return str(node.target).removesuffix("_")
    if node.op != "call_function":
        return ""
    if isinstance(node.target, OPERATOR):
        return node.target._schema.name.rpartition("::")[2].removesuffix("_")
    name = ARITHMETIC.get(node.target) or _OTHERS.get(node.target)  # type: ignore[arg-type]
    return name or getattr(node.target, "__name__", "").removesuffix("_")


def _of_margin(node: fx.Node | None, depth: int = _LONGEST_WAY) -> bool:
    """Whether a value is a sum or a difference with a constant in it."""
    if node is None or not depth or _name(node) not in ("add", "sub", "rsub"):
        return False
    nodes = (one for one in node.args if isinstance(one, fx.Node))
    return any(number(one) for one in node.args[:2]) or any(_of_margin(one, depth - 1) for one in nodes)


def _of_parameter(node: fx.Node | None) -> bool:
    """Whether a value is computed of parameters and constants alone."""
    waiting, found = [] if node is None else [node], False
    for _ in range(_LONGEST_WAY):
        if not waiting:
            return found
        one = waiting.pop()
        if one.op == "get_attr":
            found = True
        elif one.op in ("call_function", "call_method") and one.all_input_nodes:
            waiting += one.all_input_nodes
        else:
            return False
    return False
