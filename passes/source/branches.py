"""Where a function's code forks, and whether two of its places lie in branches that exclude each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from ortho_fx.passes.source.methods import Method

_LOOPS: tuple[type[ast.AST], ...] = (ast.For, ast.AsyncFor, ast.While)
_COMPREHENSIONS: tuple[type[ast.AST], ...] = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_FUNCTIONS: tuple[type[ast.AST], ...] = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_NEGATED: dict[type[ast.cmpop], type[ast.cmpop]] = {ast.IsNot: ast.Is, ast.NotEq: ast.Eq, ast.NotIn: ast.In}
# Functions by which a test can look at a module, and that give the same for it at any time.
_STEADY = ("isinstance", "hasattr", "getattr", "len")


@dataclass(frozen=True, eq=False)
class Branch:
    """One way of a fork: the fork's node, the number of the way, and the code that it runs.

    After a way that always leaves the function, what follows the fork is a part of the other way.
    """

    node: ast.AST
    arm: int
    code: tuple[ast.AST, ...]

    def holds(self, place: ast.AST, method: Method) -> bool:
        """Whether a place lies in this branch."""
        return any(node in self.code for node in (place, *_above(place, method)))

    def walk(self, place: ast.AST, method: Method) -> Iterator[ast.AST]:
        """The nodes in this branch, without the branches inside that exclude a place."""
        waiting = [*self.code]
        while waiting:
            node = waiting.pop()
            yield node
            ways = {id(child) for way in _ways(node) for child in way}
            for child in ast.iter_child_nodes(node):
                if id(child) not in ways or child is place or fork(child, place, method) is None:
                    waiting.append(child)


def fork(one: ast.AST, other: ast.AST, method: Method) -> tuple[Branch, Branch] | None:
    """The branches in which two places of a function lie, if one pass through it comes to one of the two at most.

    Two places in a loop whose turns may take different branches exclude each other in no pass.
    """
    decided = {}
    for node, arm in _arms(other, method):
        question, answer = _decided(node, arm, method)
        decided[question] = answer, Branch(node, arm, tuple(_ways(node)[arm]))
    for node, arm in _arms(one, method):
        question, answer = _decided(node, arm, method)
        if question in decided and decided[question][0] != answer:
            branches = Branch(node, arm, tuple(_ways(node)[arm])), decided[question][1]
            return None if _varies(node, other, method) else branches
    return _left_before(one, other, method) or _reversed(_left_before(other, one, method))


def is_steady(node: ast.AST, method: Method) -> bool:
    """Whether a module always takes the same way at a fork: its test reads settings of the module, and not its mode."""
    for part in ast.walk(_test(node)):
        if isinstance(part, ast.Name) and not method.is_self(part) and part.id not in _STEADY:
            return False
        if isinstance(part, ast.Attribute) and part.attr == "training":
            return False
        if isinstance(part, ast.Call) and not (isinstance(part.func, ast.Name) and part.func.id in _STEADY):
            return False
    return True


def _reversed(pair: tuple[Branch, Branch] | None) -> tuple[Branch, Branch] | None:
    return None if pair is None else pair[::-1]


def _above(node: ast.AST, method: Method) -> Iterator[ast.AST]:
    parent = method.scopes.parents.get(node)
    while parent is not None:
        yield parent
        parent = method.scopes.parents.get(parent)


def _arms(place: ast.AST, method: Method) -> list[tuple[ast.AST, int]]:
    """The forks around a place, each with the way that leads to it; the outermost first."""
    found, inner = [], place
    for node in _above(place, method):
        arm = next((number for number, code in enumerate(_ways(node)) if inner in code), None)
        if arm is not None:
            found.append((node, arm))
        inner = node
    return found[::-1]


def _ways(node: ast.AST) -> list[list[ast.AST]]:
    """The code of each way of a fork; empty for a node that is none."""
    if isinstance(node, ast.If):
        return [[*node.body], [*node.orelse]]
    if isinstance(node, ast.IfExp):
        return [[node.body], [node.orelse]]
    return [[case] for case in node.cases] if isinstance(node, ast.Match) else []


def _test(node: ast.AST) -> ast.AST:
    assert isinstance(node, ast.If | ast.IfExp | ast.Match)
    return node.subject if isinstance(node, ast.Match) else node.test


def _decided(node: ast.AST, arm: int, method: Method) -> tuple[object, int]:
    """What a fork asks and what the answer is in one of its ways; `if not step` and `if step` ask the same.

    A fork whose question may have another answer at another time asks one of its own.
    """
    question, turned = _test(node), False
    while isinstance(question, ast.UnaryOp) and isinstance(question.op, ast.Not):
        question, turned = question.operand, not turned
    text = ast.dump(question)
    if isinstance(question, ast.Compare) and len(question.ops) == 1 and type(question.ops[0]) in _NEGATED:
        plain = ast.Compare(question.left, [_NEGATED[type(question.ops[0])]()], question.comparators)
        text, turned = ast.dump(plain), not turned
    lasting = not isinstance(node, ast.Match) and all(_lasts(part, method) for part in ast.walk(question))
    return (text, arm ^ turned) if lasting else (node, arm)


def _lasts(part: ast.AST, method: Method) -> bool:
    """Whether a part of an expression has the same value throughout a function."""
    if isinstance(part, ast.Name):
        return method.scopes.binder(part) is None or method.scopes.only_binding(part) is not None
    return not isinstance(part, ast.Call | ast.Subscript | ast.NamedExpr | ast.Await)


def _left_before(one: ast.AST, other: ast.AST, method: Method) -> tuple[Branch, Branch] | None:
    """The branches of a fork that leaves after the first place, before it can come to the second."""
    others = dict(_arms(other, method))
    for node, arm in _arms(one, method):
        code = _ways(node)[arm]
        left = _leaves(code)
        if left is None or node in others or not _is_before(node, other):
            continue
        around = next(n for n in _above(node, method) if isinstance(n, (*_FUNCTIONS, *left)))
        if around not in _above(other, method):
            continue
        if _varies(node, other, method):
            return None
        rest = [n for number, way in enumerate(_ways(node)) if number != arm for n in way]
        rest += [n for n in method.scopes.after(node) if around in _above(n, method)]
        return Branch(node, arm, tuple(code)), Branch(node, 1 - arm, tuple(rest))
    return None


def _is_before(node: ast.AST, other: ast.AST) -> bool:
    end = (node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]
    return bool(end <= (other.lineno, other.col_offset))  # type: ignore[attr-defined]


def _leaves(code: list[ast.AST]) -> tuple[type[ast.AST], ...] | None:
    """What statements always leave at their end: () for the function, kinds of loops for a turn, None for neither."""
    last = code[-1] if code else None
    if isinstance(last, ast.Return | ast.Raise):
        return ()
    if isinstance(last, ast.Continue):
        return _LOOPS
    if isinstance(last, ast.With | ast.AsyncWith):
        return _leaves([*last.body])
    if isinstance(last, ast.If):
        ways = [_leaves(way) for way in _ways(last)]
        return None if None in ways else tuple({kind for way in ways if way for kind in way})
    return None


def _varies(node: ast.AST, other: ast.AST, method: Method) -> bool:
    """Whether the turns of a loop around a fork and a place may take different ways at the fork."""
    read = {n.id for n in ast.walk(_test(node)) if isinstance(n, ast.Name)}
    shared = set(_above(other, method))
    loops = (n for n in _above(node, method) if isinstance(n, (*_LOOPS, *_COMPREHENSIONS)) and n in shared)
    return any(
        isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store) and n.id in read
        for loop in loops
        for n in ast.walk(loop)
    )
