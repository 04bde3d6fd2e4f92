"""The imports: no module imports itself through others, and the passes do not import the public API."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = {"ortho_fx": ROOT / "ortho_fx", "ortho_fx.passes": ROOT / "passes", "ortho_fx.models": ROOT / "models"}


def modules() -> dict[str, Path]:
    """Every module of the package by its name."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


MODULES = modules()


def imported(path: Path) -> Iterator[str]:
    """The modules of the package that a file imports anywhere, also inside functions and for type checkers."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                # `from package import name` imports a module of that name; if there is none, the package has the name.
                yield name if name in MODULES else node.module


IMPORTS = {name: set(imported(path)) for name, path in MODULES.items()}


def reached(names: set[str]) -> set[str]:
    """The modules that these import, directly or indirectly."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        for name in IMPORTS[waiting.pop()] - found:
            found.add(name)
            waiting.append(name)
    return found


PASSES = {name for name in MODULES if name.startswith("ortho_fx.passes")}


def test_the_walk_sees_the_imports():
    assert len(MODULES) > 100
    assert "ortho_fx.passes.pipeline" in IMPORTS["ortho_fx.rewriting.rewrite"]
    assert "ortho_fx.operators.lowering" in IMPORTS["ortho_fx.operators.support"]  # inside a function
    assert "ortho_fx.passes.graph.matches" in reached({"ortho_fx.rewriting.hook"})
    assert "ortho_fx.passes.source.classes" in reached({"ortho_fx.passes.pipeline"})


def test_no_module_imports_itself():
    circles = {name: sorted(other for other in reached({name}) if name in reached({other})) for name in sorted(MODULES)}
    assert {name: others for name, others in circles.items() if name in others} == {}


def test_the_passes_do_not_reach_what_is_built_on_them():
    above = {name for name in set(MODULES) - PASSES if reached({name}) & PASSES}
    assert {"ortho_fx", "ortho_fx.rewriting.rewrite", "ortho_fx.activations.expansion"} <= above
    assert reached(PASSES) & above == set()


def test_numerics_and_vocabulary_know_nothing_of_rewriting():
    below = {name for name in MODULES if name.startswith(("ortho_fx.numerics", "ortho_fx.bases"))}
    below |= {name for name in MODULES if name.startswith("ortho_fx.passes.vocabulary")}
    assert [name for name in sorted(reached(below)) if name.startswith(("ortho_fx.rewriting", "ortho_fx.models"))] == []


def architecture() -> list[list[str]]:
    """The layers that the architecture page lists, the highest first, as names of modules."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    lines = re.findall(r"^\d\. (`.*)$", page.split("## Which way imports point")[1].split("##")[0], re.MULTILINE)
    return [["ortho_fx." + name.removesuffix(".py") for name in re.findall(r"`([\w.]+)`", line)] for line in lines]


def test_folders_import_downwards_as_the_architecture_page_says():
    layers = architecture()
    assert len(layers) == 7
    height = {name: -number for number, line in enumerate(layers) for name in line}
    folders = {".".join(name.split(".")[:2]) for name in MODULES if name.count(".") == 2}
    assert folders <= set(height)
    for name, others in IMPORTS.items():
        folder = ".".join(name.split(".")[:2])
        above = [other for other in others if height.get(".".join(other.split(".")[:2]), -9) > height.get(folder, 9)]
        assert above == [], name
    assert not any(name.startswith("ortho_fx.operators") for name in reached(PASSES))
    assert not {name for name in MODULES if name.startswith("ortho_fx.operators") and reached({name}) & PASSES}
