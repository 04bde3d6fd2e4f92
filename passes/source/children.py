"""How a module's code treats its children: whether it goes through all of them, and which classes it tests for."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from torch import nn

from ortho_fx.passes.source.analysis import Source, analyse
from ortho_fx.passes.source.methods import Method
from ortho_fx.passes.vocabulary.meaning import cached_by_meaning

# Attributes of a module by which its code comes to every child.
_ALL = ("children", "named_children", "modules", "named_modules", "_modules")
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def goes_through_children(owner: nn.Module, source: Source) -> str:
    """Why one more child would be run as one of the others; empty where the module's code does not go through them."""
    if isinstance(owner, _CONTAINERS):
        return f"{type(owner).__name__} is a container, in which the expansion would be one more layer"
    found = _reads(source)[0]
    return f"the code goes through self.{found}, where the expansion would be one more child" if found else ""


def tested_classes(source: Source) -> tuple[type, ...]:
    """The classes of modules that the code tests for: `isinstance(m, nn.ReLU)`, `type(m) is nn.ReLU`."""
    return _reads(source)[1]


@cached_by_meaning(maxsize=4096, of=lambda source: source.cls)
def _reads(source: Source) -> tuple[str, tuple[type, ...]]:
    every, tested = "", dict[type, None]()
    for method, _ in analyse(source).methods:
        for node in ast.walk(method.definition) if method.available and not method.unreachable else ():
            if isinstance(node, ast.Attribute) and node.attr in _ALL and method.is_self(node.value):
                every = every or node.attr
            tested |= dict.fromkeys(_classes(node, method))
    return every, tuple(tested)


def _classes(node: ast.AST, method: Method) -> Iterator[type]:
    """The module classes that an expression tests for."""
    names: list[ast.expr] = []
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
        names = node.args[1:]
    elif isinstance(node, ast.Compare) and any(_is_type_of(side) for side in (node.left, *node.comparators)):
        names = [node.left, *node.comparators]
    while names:
        name = names.pop()
        if isinstance(name, ast.Tuple | ast.List):
            names += name.elts
        elif isinstance(name, ast.BinOp):
            names += [name.left, name.right]
        else:
            cls = method.resolve(name)
            if isinstance(cls, type) and issubclass(cls, nn.Module) and cls is not nn.Module:
                yield cls


def _is_type_of(node: ast.expr) -> bool:
    called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "type"
    return called or (isinstance(node, ast.Attribute) and node.attr == "__class__")
