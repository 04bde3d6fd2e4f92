"""Only ortho_fx/torch_private.py uses private names of PyTorch, and the names that it lists exist.

A name is private if a part of its path after `torch` starts with a single underscore. The walk follows imports, aliases
and attribute chains, names in strings that a function such as `import_module` takes, and programs in strings.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from ortho_fx import torch_private

ROOT = Path(__file__).parents[1]
FOLDERS = ("ortho_fx", "passes", "models", "tests", "benchmarks", "examples")
SEAM = ROOT / "ortho_fx" / "torch_private.py"
THIS = Path(__file__)

# Functions that take a name as a string.
BY_STRING = {"__import__", "import_module", "find_spec", "patch", "setattr", "delattr", "getattr", "resolve"}


def is_private(path: str) -> bool:
    root, *parts = path.split(".")
    return root == "torch" and any(part.startswith("_") and not part.startswith("__") for part in parts)


class Walker(ast.NodeVisitor):
    """Collects the private names that a program uses, as (line, path)."""

    def __init__(self) -> None:
        self.found: list[tuple[int, str]] = []
        # The path for which each variable stands; scopes are ignored.
        self._paths: dict[str, str] = {}

    def _see(self, node: ast.AST, path: str | None) -> None:
        if path is not None and is_private(path):
            self.found.append((getattr(node, "lineno", 0), path))

    def _path(self, node: ast.expr) -> str | None:
        """The path that an expression names; None for any other expression."""
        if isinstance(node, ast.Name):
            return self._paths.get(node.id)
        if isinstance(node, ast.Attribute) and (value := self._path(node.value)) is not None:
            return f"{value}.{node.attr}"
        return None

    def visit_Import(self, node: ast.Import) -> None:
        for name in node.names:
            self._see(node, name.name)
            self._paths[name.asname or name.name.split(".")[0]] = name.name if name.asname else name.name.split(".")[0]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level == 0:
            for name in node.names:
                path = f"{node.module}.{name.name}"
                self._see(node, path)
                self._paths[name.asname or name.name] = path

    def visit_Assign(self, node: ast.Assign) -> None:
        path = self._path(node.value)
        for target in node.targets:
            if isinstance(target, ast.Name) and path is not None:
                self._paths[target.id] = path
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        path = self._path(node)
        if path is None:
            self.generic_visit(node)
            return
        root: ast.expr = node
        while isinstance(root, ast.Attribute):
            root = root.value
        # If the variable itself stands for a private path, that was recorded at its assignment.
        if not is_private(self._path(root) or ""):
            self._see(node, path)

    def visit_Call(self, node: ast.Call) -> None:
        function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
        strings = [each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
        if function in BY_STRING and strings:
            owner = self._path(node.args[0])
            self._see(node, strings[0] if owner is None else f"{owner}.{strings[0]}")
        self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):  # a docstring
            self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and "import " in node.value:
            try:
                program = ast.parse(node.value)
            except SyntaxError:
                return
            inner = Walker()
            inner.visit(program)
            self.found += [(node.lineno + line - 1, path) for line, path in inner.found]


def private_names(source: str) -> list[tuple[int, str]]:
    walker = Walker()
    walker.visit(ast.parse(source))
    return walker.found


def sources() -> Iterator[Path]:
    for folder in FOLDERS:
        yield from sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch._dynamo", ["torch._dynamo"]),
        ("import torch._inductor.config as c\nc.patch()", ["torch._inductor.config"]),
        ("import torch\ntorch._dynamo.reset()", ["torch._dynamo.reset"]),
        ("import torch as t\nt.Tensor._make_subclass(x)", ["torch.Tensor._make_subclass"]),
        ("import torch.fx\ntorch._C", ["torch._C"]),
        ("from torch import Tensor\nTensor._make_subclass", ["torch.Tensor._make_subclass"]),
        ("from torch.utils import _pytree as pytree\npytree.tree_map(f, x)", ["torch.utils._pytree"]),
        ("from torch._inductor import config", ["torch._inductor.config"]),
        ("def f():\n    from torch._inductor import config", ["torch._inductor.config"]),
        ("import torch\ncuda = torch.cuda\ncuda._sleep(1)", ["torch.cuda._sleep"]),
        ("import torch\ndef f(keys: torch._C.DispatchKeySet): ...", ["torch._C.DispatchKeySet"]),
        ("import torch\nf(torch._C._x(), torch._y)[0].z", ["torch._C._x", "torch._y"]),
        ("import importlib\nimportlib.import_module('torch._dynamo')", ["torch._dynamo"]),
        ("__import__('torch._dynamo')", ["torch._dynamo"]),
        ("import torch\ngetattr(torch.cuda, '_sleep')", ["torch.cuda._sleep"]),
        ("from unittest import mock\nmock.patch('torch._dynamo.reset')", ["torch._dynamo.reset"]),
        ("SCRIPT = '''\nimport torch\ntorch._dynamo.reset()\n'''", ["torch._dynamo.reset"]),
        ("import torch\ntorch.__version__, torch.nn.Module.__call__", []),
        ("import torch\ntorch.compiler.reset()", []),
        ("import sys\n'torch._dynamo' in sys.modules", []),
        ("'''import torch._dynamo'''\n# torch._dynamo", []),
        ("from package import torch\ntorch._dynamo", []),
        ("def f(x):\n    return x._dynamo", []),
    ],
)
def test_the_walk_finds(source, expected):
    assert [path for _, path in private_names(source)] == expected


def test_private_names_of_pytorch_are_used_in_one_place():
    files = [file for file in sources() if file not in (SEAM, THIS)]
    assert len(files) > 100
    found = [
        f"{file.relative_to(ROOT)}:{line} {path}" for file in files for line, path in private_names(file.read_text())
    ]
    assert not found, "\n".join(found)


GROUPS = (*torch_private.GROUPS, *torch_private.REPOSITORY_GROUPS)
ENTRIES = {entry.path: entry for group in GROUPS for entry in group.names}


@pytest.mark.parametrize("path", ENTRIES)
def test_listed_names_exist(path):
    if torch_private.release() in ENTRIES[path].releases:
        torch_private.resolve(path)
    else:
        assert torch_private.release() in torch_private.TESTED
        with pytest.raises(AttributeError):
            torch_private.resolve(path)


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.title)
def test_names_of_a_group_have_different_last_parts(group):
    assert len({entry.name for entry in group.names}) == len(group.names)
