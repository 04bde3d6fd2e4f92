"""README and guides run: their Python blocks in order, as a reader would run them, then their shortened commands."""

import ast
import importlib.util
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import markdown
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import ortho_fx
from ortho_fx import cli, moved
from ortho_fx.bases import OURS, basis_named
from ortho_fx.models import gpt2
from ortho_fx.plots import STOCK, colour_of
from tests.kinds import activations_from_outside, bases_from_outside

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
PAGES = [ROOT / "docs" / "index.md", *GUIDES, ROOT / "passes" / "README.md"]
BASES = sorted((ROOT / "docs" / "bases").glob("*.md"))
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


def read(page, printed=None):
    """Runs the blocks of a page; returns the namespace of its Python, and its commands.

    `printed` returns what was printed since its last call, for pages that show it.
    """
    namespace, commands = {"__name__": page.stem}, []
    for language, text in BLOCK.findall(page.read_text()):
        if language == "text":  # what the block before has printed
            assert printed() == text, page.name
            continue
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


@pytest.mark.parametrize("page", [page for page in BASES if page.stem != "index"], ids=lambda page: page.stem)
def test_the_example_of_a_basis_prints_what_its_page_shows(page, capsys):
    read(page, lambda: capsys.readouterr().out)
    assert "```text\n" in page.read_text()


def script(path):
    """A script of the documentation, as a module."""
    described = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(described)
    described.loader.exec_module(module)
    return module


def test_numbers_of_pages_are_those_of_the_result_files():
    numbers = script(ROOT / "docs" / "page_numbers.py")
    assert {page for page in [*BASES, *GUIDES] if "<!-- " in page.read_text()} <= set(numbers.PAGES)
    for page in numbers.PAGES:
        assert numbers.renewed(page.read_text()) == page.read_text(), "run: python docs/page_numbers.py"


@pytest.mark.parametrize("page", BASES, ids=lambda page: page.stem)
def test_every_formula_becomes_mathml(page):
    arithmatex = {"pymdownx.arithmatex": {"generic": True}}
    html = markdown.markdown(page.read_text(), extensions=["tables", *arithmatex], extension_configs=arithmatex)
    typeset = script(ROOT / "docs" / "hooks.py").on_page_content(html)
    assert typeset.count("<math ") == html.count('class="arithmatex"') > 0
    assert re.search(r"\\[a-zA-Z(\[]", re.sub("<code.*?</code>", "", typeset, flags=re.DOTALL)) is None


HEADINGS = ["Formula", "Start", "Example", "Derivative, growth, other forms", "Cost", "When", "Sources"]


def test_every_basis_has_a_whole_page():
    pages = {page.stem: page for page in BASES if page.stem != "index"}
    assert set(pages) == {*(basis.name for basis in OURS), "polynorm", "gated"}
    tables = ["parameters", "starts", "fits", "facts", "cost"]
    for name, page in pages.items():
        text = page.read_text()
        assert re.findall("^## (.*)$", text, re.MULTILINE) == HEADINGS, name
        assert f"](../pictures/bases/{name}.svg)" in text
        assert "$$" in text
        expected = [] if name in ("polynorm", "gated") else [(table, name) for table in tables]
        assert re.findall(r"<!-- table (\w+) (\w+) -->", text) == expected
    listed = (ROOT / "mkdocs.yml").read_text()
    assert [page.stem for page in BASES if f"bases/{page.name}" not in listed] == []


def test_the_picture_of_a_basis_shows_what_the_basis_computes(tmp_path):
    pictures, basis = script(ROOT / "docs" / "pictures" / "bases.py"), basis_named("hermite")
    kept = ROOT / "docs" / "pictures" / "bases" / "hermite.svg"
    curves, numbers = pictures.curves_of(basis), pictures.numbers_of(basis)
    x = pictures.X
    start = ortho_fx.HermiteActivation(dtype=torch.float64)
    torch.testing.assert_close(curves["start"]["f"], start(x).detach())
    he = {f"He_{k}(x) / {k}!": np.polynomial.HermiteE.basis(k)(x.numpy()) / np.prod(range(1, k + 1)) for k in range(5)}
    assert list(curves["functions"]) == list(he)
    for name, expected in he.items():
        np.testing.assert_allclose(curves["functions"][name], expected, atol=1e-12)
    # For N(0, 1) the fit is the projection, so its coefficient k is the mean of the k-th derivative: those of ReLU.
    density = 1 / np.sqrt(2 * np.pi)
    relu = density * he["He_0(x) / 0!"] + 0.5 * he["He_1(x) / 1!"] + density * he["He_2(x) / 2!"]
    np.testing.assert_allclose(curves["fits"]["ReLU"], relu, atol=1e-9)
    np.testing.assert_allclose(curves["errors"]["ReLU"], np.abs(relu - np.maximum(x.numpy(), 0)), atol=1e-9)

    drawn = []
    original = pictures._figure
    pictures._figure = lambda: drawn.append(original()) or drawn[-1]
    pictures.draw(basis, curves, numbers, tmp_path / "hermite.svg")
    ((_figure, axes),) = drawn
    ours = {line.get_label(): line for line in axes[1, 0].lines}
    np.testing.assert_allclose(ours["fit of ReLU + 2"].get_ydata(), relu + 2, atol=1e-9)
    assert ours["fit of ReLU + 2"].get_color() == colour_of("hermite")
    assert ours["the activation"].get_color() == STOCK
    for axis in axes.flat:
        assert axis.get_xlabel()
        assert axis.get_ylabel()
        assert [text.get_text() for text in axis.get_legend().get_texts()]
    # Another release of matplotlib may place things elsewhere.
    shown = (re.findall("<text[^>]*>(.*?)</text>", file.read_text()) for file in (tmp_path / "hermite.svg", kept))
    assert next(shown) == next(shown)


def test_pictures_of_bases_are_small_and_their_numbers_are_those_of_today():
    pictures = script(ROOT / "docs" / "pictures" / "bases.py")
    kept = script(ROOT / "docs" / "page_numbers.py").result("bases")["bases"]
    assert list(kept) == [basis.name for basis in OURS]
    for file in (ROOT / "docs" / "pictures" / "bases").iterdir():
        assert file.stat().st_size < 60_000, file.name
    for name in ("hermite", "tropical"):
        assert leaves(pictures.numbers_of(basis_named(name))) == pytest.approx(leaves(kept[name]), rel=1e-3, abs=1e-9)


def leaves(tree, path=""):
    """The numbers of nested maps, by their path."""
    if not isinstance(tree, dict):
        return {path: tree} if isinstance(tree, int | float) else {}
    return {key: value for name, part in tree.items() for key, value in leaves(part, f"{path}/{name}").items()}


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
    assert [command.split()[0] for command in commands] == ["train", "plot", "sample", "export", "compare"]


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


@pytest.mark.parametrize("page", [*OTHERS, ROOT / "docs" / "architecture.md", *PAGES, *BASES], ids=str)
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
