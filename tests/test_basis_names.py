"""No code outside of `ortho_fx/bases` branches on a basis' name or class; such code belongs into the basis' methods."""

import ast
from pathlib import Path

import pytest

from ortho_fx.bases import BASES

ROOT = Path(__file__).parent.parent
FILES = sorted(
    file
    for folder in ("ortho_fx", "passes", "models")
    for file in (ROOT / folder).rglob("*.py")
    if ROOT / "ortho_fx" / "bases" not in file.parents
)
CLASSES = {f"{basis.title}Activation" for basis in BASES.values()}
CONSTANTS = {name.upper() for name in BASES}


def names_a_basis(node):
    """Whether an operand is the name or class of a basis, or contains one."""
    if isinstance(node, ast.Constant):
        return node.value in BASES
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        return any(map(names_a_basis, node.elts))
    return isinstance(node, ast.Name) and node.id in CONSTANTS | CLASSES


def begins_a_name(node):
    return isinstance(node, ast.Constant) and any(name.startswith(str(node.value)) for name in BASES)


def chooses(node):
    """Whether a syntax node branches on a basis."""
    match node:
        case ast.Compare():
            return any(map(names_a_basis, (node.left, *node.comparators)))
        case ast.Dict():
            return any(key is not None and names_a_basis(key) for key in node.keys)
        case ast.Subscript():
            return names_a_basis(node.slice)
        case ast.MatchValue():
            return names_a_basis(node.value)
        case ast.Attribute(value=ast.Attribute(attr="ortho_fx")):
            return node.attr in BASES
        case ast.Call(func=ast.Name(id="isinstance" | "issubclass")):
            return any(map(names_a_basis, node.args[1:]))
        case ast.Call(func=ast.Attribute(attr="startswith" | "endswith")):
            return any(map(begins_a_name, node.args)) and not isinstance(node.func.value, ast.Constant)
        case ast.Call(func=ast.Attribute(attr="get" | "pop")):
            return any(map(names_a_basis, node.args[:1]))
    return False


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_is_chosen_by_the_name_of_a_basis(file):
    found = [f"{file}:{node.lineno}" for node in ast.walk(ast.parse(file.read_text())) if chooses(node)]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "basis == 'hermite'",
        "basis not in ('fourier', 'x')",
        "table = {'tropical': 1}",
        "table['tropical_rational']",
        "name.startswith('tropical')",
        "isinstance(module, HermiteActivation)",
        "type(module) is FourierActivation",
        "basis is HERMITE",
        "torch.ops.ortho_fx.hermite",
        "table.get('hermite')",
    ],
)
def test_what_would_be_a_choice_is_found(code):
    assert any(map(chooses, ast.walk(ast.parse(code))))
    assert not any(map(chooses, ast.walk(ast.parse("config = ExpansionConfig('hermite', basis='fourier')"))))
