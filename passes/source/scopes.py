"""Which variable a name in a function is: Python's rules of scopes, read off the syntax tree of a definition.

A name inside of a comprehension, a lambda, an inner function or an inner class may be another variable than the same
name around it, and a variable that is assigned once stands for what it is assigned.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

_COMPREHENSION = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
_FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Binding:
    """One place that gives a variable a value: `kind` is "parameter", "value" (an assignment of `value`), "import" (of
    `alias`, by `statement`) or "other"."""

    kind: str
    value: ast.expr | None = None
    statement: ast.stmt | None = None
    alias: ast.alias | None = None


@dataclass(eq=False)
class Scope:
    """A function, a lambda, a comprehension or the body of a class."""

    outer: Scope | None
    kind: str = "function"
    bindings: dict[str, list[Binding]] = field(default_factory=dict)
    globals: set[str] = field(default_factory=set)
    nonlocals: set[str] = field(default_factory=set)


_OTHER = Binding("other")


class Scopes:
    """The scopes of a function's definition, and the parent of each of its nodes."""

    def __init__(self, definition: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self.top = Scope(None)
        self.set_globals: set[str] = set()
        self.parents: dict[ast.AST, ast.AST] = {}
        self._scopes: dict[ast.AST, Scope] = {}
        self._bind_arguments(definition.args, self.top)
        self._body(definition, definition.body, self.top)
        for scope in {id(scope): scope for scope in self._scopes.values()}.values():
            for name in scope.nonlocals:
                binder = None if scope.outer is None else self.binder_from(scope.outer, name)
                if binder is not None:
                    binder.bindings[name].append(_OTHER)

    def scope_of(self, node: ast.AST) -> Scope:
        """The innermost scope that a node is evaluated in; the function's own for a node of nobody's."""
        return self._scopes.get(node, self.top)

    def binder(self, node: ast.Name) -> Scope | None:
        """The scope whose variable a name is; None for one from outside of the function."""
        return self.binder_from(self.scope_of(node), node.id)

    def binder_from(self, scope: Scope, name: str) -> Scope | None:
        inner: Scope | None = scope
        while inner is not None:
            if name in inner.globals:
                return None
            # What a class' body binds is seen in that body alone.
            if name in inner.bindings and (inner.kind != "class" or inner is scope):
                return inner
            inner = inner.outer
        return None

    def only_binding(self, node: ast.Name) -> Binding | None:
        """The one place that gives a name its value; None where there are several, or none in the function."""
        binder = self.binder(node)
        bindings = [] if binder is None else binder.bindings[node.id]
        # The same import in several places counts as one.
        imports = {
            ast.unparse(b.statement) if b.statement is not None else None for b in bindings if b.kind == "import"
        }
        same = len(imports) == 1 and all(binding.kind == "import" for binding in bindings)
        return bindings[0] if len(bindings) == 1 or same else None

    def stands_for(self, new: ast.AST, old: ast.AST) -> None:
        """Lets a node that was made anew be looked up like another."""
        self._scopes[new] = self.scope_of(old)

    def later_loads(self, statement: ast.stmt, name: str) -> Iterator[ast.Name]:
        """The places after a statement that read a name, until the next statement that surely sets it anew."""
        scope = self.scope_of(statement)
        for later in self.after(statement):
            for node in ast.walk(later):
                if isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load):
                    if self.binder_from(self.scope_of(node), name) is self.binder_from(scope, name):
                        yield node
            if isinstance(later, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in later.targets):
                return

    def after(self, statement: ast.AST) -> Iterator[ast.stmt]:
        """The statements that follow one, in its block and in the blocks around."""
        parent = self.parents.get(statement)
        if parent is None:
            return
        for _, value in ast.iter_fields(parent):
            if isinstance(value, list) and statement in value:
                yield from value[value.index(statement) + 1 :]
        if isinstance(parent, ast.stmt) and not isinstance(parent, _FUNCTION | ast.ClassDef):
            yield from self.after(parent)

    def _body(self, parent: ast.AST, body: Sequence[ast.AST], scope: Scope) -> None:
        for node in body:
            self._visit(node, scope, parent)

    def _visit(self, node: ast.AST, scope: Scope, parent: ast.AST) -> None:
        self._scopes[node], self.parents[node] = scope, parent
        if isinstance(node, _FUNCTION):
            self._bind(scope, node.name)
            inner = Scope(scope)
            self._around(node, (*node.decorator_list, *([node.returns] if node.returns else ())), scope)
            self._arguments(node, node.args, scope, inner)
            self._body(node, node.body, inner)
        elif isinstance(node, ast.Lambda):
            inner = Scope(scope)
            self._arguments(node, node.args, scope, inner)
            self._visit(node.body, inner, node)
        elif isinstance(node, ast.ClassDef):
            self._bind(scope, node.name)
            self._around(node, (*node.decorator_list, *node.bases, *node.keywords), scope)
            self._body(node, node.body, Scope(scope, "class"))
        elif isinstance(node, _COMPREHENSION):
            self._comprehension(node, scope)
        else:
            self._bind_by(node, scope)
            self._body(node, list(ast.iter_child_nodes(node)), scope)

    def _around(self, node: ast.AST, parts: Sequence[ast.AST], scope: Scope) -> None:
        self._body(node, parts, scope)

    def _arguments(self, node: ast.AST, arguments: ast.arguments, scope: Scope, inner: Scope) -> None:
        self._scopes[arguments], self.parents[arguments] = scope, node
        self._body(arguments, list(ast.iter_child_nodes(arguments)), scope)
        self._bind_arguments(arguments, inner)

    def _bind_arguments(self, arguments: ast.arguments, scope: Scope) -> None:
        further = [arguments.vararg, arguments.kwarg]
        for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *filter(None, further)):
            scope.bindings.setdefault(argument.arg, []).append(Binding("parameter"))

    def _comprehension(self, node: ast.AST, scope: Scope) -> None:
        inner = Scope(scope, "comprehension")
        generators: list[ast.comprehension] = node.generators  # type: ignore[attr-defined]
        for index, generator in enumerate(generators):
            self._scopes[generator], self.parents[generator] = inner, node
            # The first iterable is evaluated outside of the comprehension.
            self._visit(generator.iter, inner if index else scope, generator)
            self._visit(generator.target, inner, generator)
            self._body(generator, generator.ifs, inner)
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.comprehension):
                self._visit(child, inner, node)

    def _bind_by(self, node: ast.AST, scope: Scope) -> None:
        if isinstance(node, ast.Global):
            scope.globals.update(node.names)
            self.set_globals.update(node.names)
        elif isinstance(node, ast.Nonlocal):
            scope.nonlocals.update(node.names)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                name = (alias.asname or alias.name).split(".")[0]
                self._bind(scope, name, Binding("import", statement=node, alias=alias))
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            self._bind(scope, node.name)
        elif isinstance(node, ast.MatchMapping) and node.rest:
            self._bind(scope, node.rest)
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            target = scope
            while isinstance(self.parents[node], ast.NamedExpr) and target.kind == "comprehension" and target.outer:
                target = target.outer
            self._bind(target, node.id, self._assigned(node))

    def _assigned(self, node: ast.Name) -> Binding:
        statement = self.parents[node]
        if isinstance(statement, ast.Assign) or (isinstance(statement, ast.AnnAssign) and statement.value is not None):
            return Binding("value", statement.value)
        return _OTHER

    def _bind(self, scope: Scope, name: str, binding: Binding = _OTHER) -> None:
        if name not in scope.globals and name not in scope.nonlocals:
            scope.bindings.setdefault(name, []).append(binding)


@functools.lru_cache(maxsize=1024)
def scopes_of(definition: ast.FunctionDef | ast.AsyncFunctionDef) -> Scopes:
    """The scopes of a definition, which is looked up by identity."""
    return Scopes(definition)
