"""Finds activations in the `torch.fx` graphs of any tracer: single nodes, and formulas of several nodes.

A formula is a cone of elementwise nodes that ends in one node and reads, besides constants, exactly one input node. It
is written as an expression in `x` and recognised like a formula in source. A graph does not show where one activation
ends and the next begins, so the smallest cone that computes a known function is taken.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from ortho_fx.passes.vocabulary.elementwise import ARITHMETIC, METHODS, OPERATIONS, bends, operation_of
from ortho_fx.passes.vocabulary.formula import Formula
from ortho_fx.passes.vocabulary.guards import POSITIVE, number
from ortho_fx.passes.vocabulary.sites import NOTE
from ortho_fx.passes.vocabulary.targets import EVERY_TARGET, OPERATOR, Reference, may_change_input

# Limits in nodes and characters. Formulas written by people are shorter.
_MOST_NODES, _LONGEST = 24, 600
_SYMBOLS = {
    "add": "{} + {}",
    "sub": "{} - {}",
    "mul": "{} * {}",
    "truediv": "{} / {}",
    "pow": "{} ** {}",
    "neg": "-{}",
    "pos": "+{}",
}


@dataclass(frozen=True)
class Match:
    """An activation in a graph: its result node, its input node, and its nodes from the result back to the input."""

    node: fx.Node
    argument: fx.Node | None
    nodes: tuple[fx.Node, ...]
    function: str
    kind: str
    reference: Reference | None
    in_place: bool = False


def find_matches(graph: fx.Graph, among: Collection[fx.Node] | None = None) -> list[Match]:
    """The activations of a graph, in graph order; a node inside a formula is not reported by itself.

    With `among`, only activations whose result is one of these nodes.
    """
    found: list[Match] = []
    covered: set[fx.Node] = set()
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in reversed(graph.nodes):
        if node in covered or (among is not None and node not in among):
            continue
        match = _formula(node, order) or single_match(node)
        if match is not None:
            found.append(match)
            covered.update(match.nodes)
    return found[::-1]


def single_match(node: fx.Node) -> Match | None:
    """The activation that a single node computes; None if it computes none."""
    target = EVERY_TARGET.of_node(node)
    if target is None:
        return None
    argument = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))
    named = {name: value for name, value in node.kwargs.items() if name not in ("input", "self", "inplace")}
    further = node.args[1:] if not isinstance(node.target, OPERATOR) else _further(node)
    reference = target.reference(further, named) if len(further) <= len(target.settings) else None
    source = argument if isinstance(argument, fx.Node) else None
    return Match(node, source, (node,), target.name, "node", reference, may_change_input(node))


def _further(node: fx.Node) -> tuple[object, ...]:
    """The arguments of an ATen operator after its input, without trailing arguments that have their default value."""
    assert isinstance(node.target, OPERATOR)
    defaults = [argument.default_value for argument in node.target._schema.arguments[1:]]
    given = list(node.args[1:])
    while given and given[-1] == defaults[len(given) - 1]:
        given.pop()
    return tuple(given)


def _formula(node: fx.Node, order: Mapping[fx.Node, int]) -> Match | None:
    """The smallest formula that ends in a node. Its input is the nearest node on which the whole formula depends."""
    inside: set[fx.Node] = set()
    frontier = {node}
    while len(inside) < _MOST_NODES and frontier:
        latest = max(frontier, key=order.__getitem__)
        if elementwise_name(latest) is None or (may_change_input(latest) and latest is not node):
            return None
        inside.add(latest)
        frontier = (frontier - {latest}) | set(latest.all_input_nodes)
        if len(frontier) == 1 and len(inside) > 1 and any(bends(_base(part)) for part in inside):
            (argument,) = frontier
            reference = _recognised(node, argument, inside)
            in_place = may_change_input(node)
            if reference is not None and reference.target in POSITIVE and _adds_constant(node):
                return None
            if reference is not None and not (in_place and node.args[0] is not argument):
                nodes = tuple(sorted(inside, key=order.__getitem__, reverse=True))
                return Match(node, argument, nodes, reference.target, "formula", reference, in_place)
    return None


def _adds_constant(node: fx.Node) -> bool:
    """Whether a node adds a number, as the 1e-6 of `relu(x) + 1e-6`, which hardly changes the function."""
    return _base(node) == "add" and any(number(part) for part in node.args)


def _recognised(node: fx.Node, argument: fx.Node, inside: set[fx.Node]) -> Reference | None:
    uses = sum(part.all_input_nodes.count(argument) for part in inside)
    text = _text(node, argument)
    if text is None or len(text) > _LONGEST:
        return None
    formula = Formula(ast.Name("x", ast.Load()), text, uses > 1)
    reference = formula.reference()
    if reference is None and not any(_is_activation(part) for part in inside):
        reference = formula.gated()
    return reference


def _is_activation(node: fx.Node) -> bool:
    target = EVERY_TARGET.of_node(node)
    return target is not None and not target.gate


def elementwise_name(node: fx.Node) -> str | None:
    """The name of an elementwise node in an expression, with a leading dot for a method; None for other nodes."""
    if node.op == "call_method" and str(node.target) in METHODS:
        return f".{str(node.target).removesuffix('_')}"
    if node.op != "call_function":
        return None
    if isinstance(node.target, OPERATOR):
        base = node.target._schema.name.removeprefix("aten::").removesuffix("_")
        return next((name for name in (f"torch.{base}", f"F.{base}") if name in _NAMES), None)
    return ARITHMETIC.get(node.target) or operation_of(node.target)  # type: ignore[arg-type]


def _base(node: fx.Node) -> str:
    return (elementwise_name(node) or "").rpartition(".")[2]


def _text(value: object, argument: fx.Node) -> str | None:
    """A value as an expression in `x`, where `x` is the argument; None if it cannot be written so."""
    if value is argument:
        return "x"
    if isinstance(value, bool | int | float | str | None):
        return repr(value)
    name = elementwise_name(value) if isinstance(value, fx.Node) else None
    if not isinstance(value, fx.Node) or name is None:
        return None
    arguments = [_text(part, argument) for part in value.args]
    named = [f"{key}={_text(part, argument)}" for key, part in value.kwargs.items() if key not in ("inplace", "out")]
    if any(part is None or len(part) > _LONGEST for part in arguments):
        return None
    if name in _SYMBOLS:
        return f"({_SYMBOLS[name].format(*arguments)})"
    if name.startswith("."):
        name = f"({arguments.pop(0)}){name}"
    return f"{name}({', '.join([*(part for part in arguments if part is not None), *named])})"


_NAMES = frozenset(OPERATIONS.values())


def piece(nodes: Sequence[fx.Node], source: fx.Node) -> fx.Graph:
    """Copies the nodes of a match, from input to result, into a new graph, which `revert_` later puts back."""
    graph = fx.Graph()
    values = {source: graph.placeholder("x")}
    for node in reversed(nodes):
        values[node] = graph.node_copy(node, values.__getitem__)
        values[node].meta.pop(NOTE, None)
    graph.output(values[nodes[0]])
    return graph
