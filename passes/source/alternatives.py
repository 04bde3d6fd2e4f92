"""Which activation calls are alternatives of one another: one pass through the code comes to one of them at most.

A model with a state writes its activation twice: in the branch for a whole sequence, and in that for one step with a
cache. Training comes to the first alone, so both calls need one expansion. They share it where

- they lie in branches that exclude each other, in one function or in functions that only such branches call,
- they compute the same function with the same settings,
- both branches call that function equally often, and the calls have the same number in their order,
- the branches do not go through different layers.

Branches through different layers are different computations: whoever trains one of them trains its layers and its
expansion alike. Where only the second or the third condition is not met, it cannot be told which calls belong
together, and the report says so.
"""

from __future__ import annotations

import ast
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from torch import nn

from ortho_fx.passes.source.analysis import ENTRIES, Analysis, Source, analyse
from ortho_fx.passes.source.branches import Branch, fork, is_steady
from ortho_fx.passes.source.methods import Method
from ortho_fx.passes.source.reader import Call
from ortho_fx.passes.vocabulary.expansions import Expansion
from ortho_fx.passes.vocabulary.meaning import UNRESOLVED, cached_by_meaning

# How a call is reached: each function on the way, with the place in it that leads on.
Path = tuple[tuple[types.FunctionType, ast.AST], ...]
# A part of the module, by the attributes and items that lead to it.
Chain = tuple[str | int, ...]
# More ways to a call than these are not followed.
_MOST = 256


@dataclass(frozen=True)
class Alternatives:
    """Two calls that exclude each other, by their names: of one function, or one of them a child's.

    Attributes:
        functions: what each calls.
        matched: whether they compute the same and have the same place in the order of their branches.
        steady: whether one module always comes to the same of the two.
        layers: what of the module the branch of each goes through.
    """

    one: str
    other: str
    functions: tuple[str, str]
    matched: bool
    steady: bool
    layers: tuple[frozenset[Chain], frozenset[Chain]]

    def are_one_computation(self, owner: nn.Module) -> bool:
        """Whether the branches go through layers that are the same in this module, or one of them through none."""
        one, other = ([*_layers_of(owner, chains)] for chains in self.layers)
        return not one or not other or any(a[-1] in b or b[-1] in a for a in one for b in other)


def groups_of(
    owner: nn.Module, source: Source, calls: Sequence[Call], *, share: bool
) -> tuple[list[list[Call]], list[list[str]]]:
    """The calls by the expansion that they get, and the names of alternatives that have one each all the same."""
    if len({call.function for call in calls}) == len(calls):  # alternatives compute the same function
        return [[call] for call in calls], []
    by_name = {call.attribute: call for call in calls}
    pairs = [
        pair
        for pair in alternatives(source.plain)
        if {pair.one, pair.other} <= by_name.keys() and pair.are_one_computation(owner)
    ]
    matched = {frozenset((pair.one, pair.other)) for pair in pairs if pair.matched and share}
    groups = []
    for names in _joined(list(by_name), matched):
        # Two calls may be alternatives of a third and not of each other. Which of them it belongs to cannot be told.
        whole = all(frozenset(pair) in matched for pair in combinations(names, 2))
        groups += [names] if whole else [[name] for name in names]
    together = {frozenset(pair) for names in groups for pair in combinations(names, 2)}
    paired = {name for pair in pairs if pair.matched for name in (pair.one, pair.other)}
    apart = {
        frozenset((pair.one, pair.other))
        for pair in pairs
        if not pair.steady and (pair.matched or not {pair.one, pair.other} <= paired)
    }
    alone = [names for names in _joined(list(by_name), apart - together) if len(names) > 1]
    return [[by_name[name] for name in names] for names in groups], alone


def beside_children(owner: nn.Module, source: Source, functions: Mapping[str, str]) -> dict[str, list[str]]:
    """The calls that stand in a branch where another branch calls a child, each with these children.

    `functions` says which function each child computes. Calls and children with a counterpart of their own kind do not
    count.
    """
    pairs = alternatives(replace(source.plain, split=frozenset(functions)))
    paired = {name for pair in pairs if pair.matched for name in (pair.one, pair.other)}
    found: dict[str, list[str]] = {}
    for pair in pairs:
        ends = ((pair.one, pair.functions[0]), (pair.other, pair.functions[1]))
        for (call, function), (child, key) in (ends, ends[::-1]):
            beside = functions.get(key) == function and function not in functions and not {call, child} & paired
            if beside and not pair.steady and pair.are_one_computation(owner) and key not in found.get(call, []):
                found.setdefault(call, []).append(key)
    return found


def _joined(names: Sequence[str], pairs: Iterable[frozenset[str]]) -> list[list[str]]:
    """The names in groups that the pairs connect, in order."""
    group = {name: [name] for name in names}
    for one, other in pairs:
        if group[one] is not group[other]:
            group[one] += group[other]
            group.update((name, group[one]) for name in group[other])
    found = {id(members): sorted(members, key=names.index) for members in group.values()}
    return sorted(found.values(), key=lambda members: names.index(members[0]))


@cached_by_meaning(maxsize=4096, of=lambda source: source.cls)
def alternatives(source: Source) -> tuple[Alternatives, ...]:
    """Every two calls of a source that are alternatives, of those that can be replaced."""
    analysis = analyse(source)
    if sum(not call.problem for call in analysis.calls) < 2:
        return ()
    return tuple(_Reader(analysis).read())


class _Reader:
    """Compares the calls of an analysis by the ways that lead to them."""

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self.methods: dict[types.FunctionType, Method] = {}
        for method, _ in analysis.methods:
            if method.outer not in self.methods or not method.unreachable:
                self.methods[method.outer] = method
        self.paths: dict[str, list[Path]] = {}
        ways = self._ways()
        for method, calls in analysis.methods:
            for call in calls if method.outer in ways and method is self.methods[method.outer] else ():
                if not call.problem and call.place is not None:
                    self.paths[call.attribute] = [(*way, (method.outer, call.place)) for way in ways[method.outer]]
        calls_found = [call for call in analysis.calls if call.attribute in self.paths]
        self.calls = sorted(calls_found, key=lambda call: self._order(self.paths[call.attribute][0]))
        self.same: dict[object, list[Call]] = {}
        for call in self.calls:
            self.same.setdefault(_computed(call), []).append(call)
        self.rank: dict[str, int] = {}
        for calls in self.same.values():
            for index, call in enumerate(calls):
                before = [self.rank[c.attribute] for c in calls[:index] if not self._forks(c, call)]
                self.rank[call.attribute] = max(before, default=-1) + 1

    def read(self) -> Iterator[Alternatives]:
        for one, other in combinations(self.calls, 2):
            comparable = one.function == other.function or "call" in (one.kind, other.kind)
            forks = self._forks(one, other) if comparable else []
            if forks:
                first, second = ([pair[side] for pair in forks] for side in (0, 1))
                steady = all(is_steady(branch.node, self.methods[way[depth][0]]) for branch, way, depth in first)
                yield Alternatives(
                    one.attribute,
                    other.attribute,
                    (one.function, other.function),
                    matched=self._match(one, other, forks),
                    steady=steady,
                    layers=(frozenset(self._layers(first)), frozenset(self._layers(second))),
                )

    def _ways(self) -> dict[types.FunctionType, list[Path]]:
        """How the module's call comes to each function; empty if there are too many ways."""
        named = {inner for references in self.analysis.references.values() for _, inner in references}
        entries = [m.outer for m in self.methods.values() if m.cls and m.name in ENTRIES]
        waiting: list[tuple[types.FunctionType, Path]] = [(e, ()) for e in entries if e not in named]
        found: dict[types.FunctionType, list[Path]] = {}
        for function, path in waiting:
            found.setdefault(function, []).append(path)
            if len(waiting) > _MOST:
                return {}
            for node, inner in self.analysis.references.get(function, ()):
                if inner in self.methods and inner is not function and all(inner is not step for step, _ in path):
                    waiting.append((inner, (*path, (function, node))))
        return found

    def _forks(self, one: Call, other: Call) -> list[tuple[_Side, _Side]]:
        """Where the ways to two calls part; empty if some of them do not exclude each other."""
        found = []
        for a in self.paths[one.attribute]:
            for b in self.paths[other.attribute]:
                pair = self._fork(a, b)
                if pair is None:
                    return []
                found.append(pair)
        return found

    def _fork(self, one: Path, other: Path) -> tuple[_Side, _Side] | None:
        for depth, ((function, a), (_, b)) in enumerate(zip(one, other, strict=False)):
            if a is not b:
                method = self.methods[function]
                pair = fork(a, b, method)
                return None if pair is None else ((pair[0], one, depth), (pair[1], other, depth))
        return None

    def _order(self, path: Path) -> list[tuple[int, int]]:
        """What sorts the ways to calls by the time at which Python comes to them: what stands inside ends first."""
        found = []
        for function, node in path:
            parent = self.methods[function].scopes.parents.get(node)
            ends = parent if isinstance(parent, ast.Call) and parent.func is node else node
            found.append((ends.end_lineno, ends.end_col_offset))  # type: ignore[attr-defined]
        return found

    def _match(self, one: Call, other: Call, forks: Iterable[tuple[_Side, _Side]]) -> bool:
        if _computed(one) != _computed(other) or self.rank[one.attribute] != self.rank[other.attribute]:
            return False
        return all(self._ranks(one, a) == self._ranks(other, b) for a, b in forks)

    def _ranks(self, call: Call, side: _Side) -> set[int]:
        """The ranks of the calls of the same function that a branch may come to when it comes to a call."""
        branch, way, depth = side
        method = self.methods[way[depth][0]]
        return {
            self.rank[other.attribute]
            for other in self.same[_computed(call)]
            if other is call or not self._forks(*sorted((call, other), key=self.calls.index))
            for path in self.paths[other.attribute]
            if path[:depth] == way[:depth] and len(path) > depth and branch.holds(path[depth][1], method)
        }

    def _layers(self, sides: Iterable[_Side]) -> Iterator[Chain]:
        seen: set[types.FunctionType] = set()
        for branch, way, depth in sides:
            function, place = way[depth]
            method = self.methods[function]
            yield from self._layers_in(branch.walk(place, method), method, seen)

    def _layers_in(self, nodes: Iterable[ast.AST], method: Method, seen: set[types.FunctionType]) -> Iterator[Chain]:
        """What of the module some nodes name, and the methods that they call."""
        named = dict(self.analysis.references.get(method.outer, ()))
        for node in nodes:
            inner = named.get(node)
            if inner is not None and inner not in seen and inner in self.methods:
                seen.add(inner)
                body = (part for statement in self.methods[inner].definition.body for part in ast.walk(statement))
                yield from self._layers_in(body, self.methods[inner], seen)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                chain = _chain(node, method)
                if chain is not None:
                    yield _followed(chain, node, method)


# A branch, on the way to a call, in the function of this number on that way.
_Side = tuple[Branch, Path, int]


def _computed(call: Call) -> object:
    """What a call computes: its function with the settings."""
    if call.reference is not None:
        return call.reference
    settings = []
    if isinstance(call.place, ast.Call):
        settings = [ast.unparse(value) for value in call.place.args[1:]]
        settings += [f"{keyword.arg}={ast.unparse(keyword.value)}" for keyword in call.place.keywords]
    return (call.function, *settings)


def _chain(node: ast.expr, method: Method, depth: int = 4) -> Chain | None:
    """How an expression is reached from self; None for one that is no part of it."""
    if isinstance(node, ast.Name):
        if method.is_self(node):
            return ()
        binding = method.scopes.only_binding(node)
        bound = None if binding is None else binding.value
        return _chain(bound, method, depth - 1) if isinstance(bound, ast.Attribute | ast.Subscript) and depth else None
    outer = _chain(node.value, method, depth) if isinstance(node, ast.Attribute | ast.Subscript) else None
    key = None if outer is None else _key(node, method)
    return None if outer is None or key is None else (*outer, key)


def _followed(chain: Chain, node: ast.AST, method: Method) -> Chain:
    """The chain with the attributes and items that are taken of a node."""
    parent = method.scopes.parents.get(node)
    while isinstance(parent, ast.Attribute | ast.Subscript) and parent.value is node:
        key = _key(parent, method)
        if key is None:
            return chain
        chain, node, parent = (*chain, key), parent, method.scopes.parents.get(parent)
    return chain


def _key(node: ast.AST, method: Method) -> str | int | None:
    if isinstance(node, ast.Attribute):
        return node.attr
    key = method.constant(node.slice) if isinstance(node, ast.Subscript) else UNRESOLVED
    return key if isinstance(key, str | int) else None


def _layers_of(owner: nn.Module, chains: Iterable[Chain]) -> Iterator[list[int]]:
    """The ids of the modules on the way to each layer that the chains lead to, of those with tensors of their own."""
    for chain in chains:
        module, found = owner, list[int]()
        for key in chain:
            children = list(module._modules)
            name = children[key] if isinstance(key, int) and -len(children) <= key < len(children) else key
            tensor = module._parameters.get(str(name), module._buffers.get(str(name)))
            inner = module._modules.get(str(name))
            if inner is not None:
                module = inner
                found.append(id(inner))
            elif tensor is not None and not found:
                found.append(id(tensor))
            if inner is None:
                break
        held = (*module.parameters(), *module.buffers()) if module is not owner else ()
        if found and not isinstance(module, Expansion) and (held or module is owner):
            yield found
