"""README and guides run: their Python blocks in order, as a reader would run them, then their shortened commands."""

import ast
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import ortho_fx
from ortho_fx import cli, moved
from ortho_fx.bases import OURS
from ortho_fx.models import gpt2
from tests.kinds import activations_from_outside, bases_from_outside

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
PAGES = [ROOT / "docs" / "index.md", *GUIDES, ROOT / "passes" / "README.md"]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)#:]+)\)")
# Options that shorten the commands of a page, which take long.
SHORT = "--no-compile --steps 2 --batch-size 8 --eval-every 1 --warmup 1".split()
SMALL = gpt2.GPT2Config(vocabulary=256, context=16, layers=1, heads=2, width=32)


# The first line of a Python block that is a file.
FILE = re.compile(r"# ([\w/]+\.py)\n")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(gpt2.PRESETS, "tiny", SMALL)
    with bases_from_outside(), activations_from_outside():
        yield


def read(page):
    """Runs the blocks of a page; returns the namespace of its Python, and its commands."""
    namespace, commands = {"__name__": page.stem}, []
    for language, text in BLOCK.findall(page.read_text()):
        if language == "python" and (named := FILE.match(text)):
            Path(named[1]).parent.mkdir(parents=True, exist_ok=True)
            Path(named[1]).write_text(text)
        elif language == "python":
            # The block is a file, since the rewrite reads the source of classes from their files.
            file = Path(f"block{len(namespace)}.py").absolute()
            file.write_text(text)
            exec(compile(text, str(file), "exec"), namespace)
        elif language == "toml":
            name, recipe = text.removeprefix("# ").split("\n", 1)
            Path(name).write_text(recipe)
        else:
            assert language in ("", "console"), f"{page.name} has a block of {language!r}"
            for command in re.findall(r"^(?:\$ )?ortho-fx (.*)$", text, flags=re.MULTILINE):
                arguments = shlex.split(command)
                arguments += SHORT if arguments[0] in ("train", "compare") else []
                arguments += ["--seeds", "1", "--no-equal-time"] if arguments[0] == "compare" else []
                assert cli.main(arguments) == 0, command
                commands.append(command)
    return namespace, commands


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem != "extend"], ids=lambda page: page.stem)
def test_a_page_runs_from_top_to_bottom(page):
    namespace, commands = read(page)
    assert len(namespace) > 2 or commands


LOAD = """
import sys, torch, legendre_basis
import ortho_fx
model, x, y = torch.load("saved.pt", weights_only=False)
torch.testing.assert_close(model(x), y)
torch.testing.assert_close(torch.export.load("legendre.pt2").module()(x), y)
"""
WITHOUT = """
import torch, ortho_fx
try:
    torch.load("saved.pt", weights_only=False)
except ortho_fx.OrthoFxError as error:
    print(error)
"""


def test_the_basis_of_the_guide_is_like_ours(capsys):
    page = read(ROOT / "docs" / "guides" / "extend.md")[0]
    assert "forward=1.0" in capsys.readouterr().out
    for degree in range(1, 17):
        gains = ortho_fx.gains(ortho_fx.ExpansionConfig("legendre", degree))
        assert (gains.forward, gains.backward) == pytest.approx((1, 1), abs=1e-9)
    assert page["moved"].abs().max() > 0.01
    assert page["gelu"].rmse == pytest.approx(ortho_fx.fit(F.gelu, ortho_fx.ExpansionConfig("hermite", 8)).rmse)
    assert page["its"] == page["ours"]
    model, loaded, x = page["model"], page["loaded"], page["x"]
    assert model[1].form == "formula"
    torch.testing.assert_close(model(x), loaded(x))
    assert page["polynomial"].degree == 3
    torch.testing.assert_close(torch.from_numpy(page["polynomial"](x.numpy())).float(), model(x))

    torch.save((loaded, x, loaded(x)), "saved.pt")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])}
    for code in (LOAD, WITHOUT):
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert done.stdout == f"basis must be one of {', '.join(basis.name for basis in OURS)}; got 'legendre'\n"


def test_the_readme_runs_from_top_to_bottom(capsys):
    namespace, commands = read(ROOT / "README.md")
    assert "1 replaced, 0 left, 4 new parameters" in capsys.readouterr().out
    assert [tuple(p.shape) for p in namespace["model"][1].parameters()] == [(1,), (5,), (5,), (5,)]
    assert [command.split()[0] for command in commands] == ["train", "plot", "export", "compare"]


OTHERS = [
    ROOT / name
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "benchmarks/README.md",
        "examples/README.md",
        "passes/source/README.md",
    )
]


@pytest.mark.parametrize("page", [*OTHERS, ROOT / "docs" / "architecture.md", *PAGES], ids=str)
def test_links_lead_somewhere(page):
    text = re.sub(r"`[^`\n]*`", "", BLOCK.sub("", page.read_text()))
    for link in LINK.findall(text):
        assert (page.parent / link).exists(), link


def readme_tree():
    """The folders of the tree in the README, by their paths."""
    tree = (ROOT / "README.md").read_text().split("## The folders")[1].split("```")[1]
    path = []
    for indent, name in re.findall(r"^( *)(\w+)/ ", tree, re.MULTILINE):
        path = [*path[: len(indent) // 2], name]
        yield "/".join(path)


def test_the_readme_and_the_architecture_page_name_every_folder():
    top = [ROOT / name for name in ("ortho_fx", "passes", "models")]
    inside = [child for folder in top for child in folder.iterdir() if child.is_dir() and child.name[0].isalpha()]
    package = {str(folder.relative_to(ROOT)) for folder in (*top, *inside)}
    rest = {"tests", "benchmarks", "docs", "examples"}
    assert set(readme_tree()) == package | rest

    architecture = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`([\w/]+)/`", architecture))
    assert package | rest <= named
    assert [folder for folder in named if not (ROOT / folder).is_dir()] == []


# Paths and dotted names between backticks, such as `passes/graph/find.py` and `ortho_fx.passes.pipeline.PASSES`.
PATH = re.compile(r"`((?:ortho_fx|passes|models|tests|benchmarks|docs|examples)/[\w/.-]*)`")
DOTTED = re.compile(r"(?<![\w.])(ortho_fx(?:\.\w+)+)(?=[`\s.:(])")


@pytest.mark.parametrize("page", sorted([*OTHERS, *ROOT.glob("docs/**/*.md"), ROOT / "passes" / "README.md"]), ids=str)
def test_paths_and_names_are_those_of_today(page):
    text = page.read_text()
    for path in PATH.findall(text):
        # The placeholders of instructions.
        assert (ROOT / path).exists() or "NAME" in path, path
    for name in set(DOTTED.findall(text)):
        assert not any(name == old or name.startswith(f"{old}.") for old in moved.MOVED), name
        if name.startswith("ortho_fx.integrations."):
            assert_is_in_integration(*name.split(".")[2:])
        else:
            pkgutil.resolve_name(name)


def assert_is_in_integration(library, *name):
    """Without an import: the library may not be installed."""
    tree = ast.parse((ROOT / "ortho_fx" / "integrations" / f"{library}.py").read_text())
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    imported = {one.asname or one.name for node in tree.body if isinstance(node, ast.ImportFrom) for one in node.names}
    assert set(name) <= defined | imported, name
