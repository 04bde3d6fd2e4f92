"""README and guides run: their Python blocks in order, as a reader would run them, then their shortened commands."""

import ast
import importlib.util
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import markdown
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import ortho_fx
from ortho_fx import moved
from ortho_fx.bases import OURS, basis_named
from ortho_fx.plots import STOCK, colour_of
from tests.kinds import activations_from_outside, bases_from_outside

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
BASES = sorted((ROOT / "docs" / "bases").glob("*.md"))
PAGES = [
    ROOT / "docs" / "index.md",
    ROOT / "docs" / "security.md",
    *GUIDES,
    *(page for page in BASES if page.stem != "index"),
    ROOT / "passes" / "README.md",
]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)#:]+)\)")


def script(path):
    """A script of the documentation, as a module."""
    described = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(described)
    described.loader.exec_module(module)
    return module


OUTPUTS = script(ROOT / "docs" / "outputs.py")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    with bases_from_outside(), activations_from_outside():
        yield


def read(page):
    """Runs a page; returns the namespace of its Python, and its commands."""
    namespace, commands, differences, _ = OUTPUTS.read(page)
    assert differences == [], f"run: python docs/outputs.py {page.stem}"
    return namespace, commands


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem != "extend"], ids=lambda page: page.stem)
def test_a_page_runs_and_prints_what_it_shows(page):
    namespace, commands = read(page)
    assert len(namespace) > 2 or commands


@pytest.mark.parametrize("page", [*sorted(ROOT.glob("docs/**/*.md")), *ROOT.glob("*/README.md")], ids=str)
def test_lists_stand_apart_from_the_text_before(page):
    # Without an empty line the site shows their items as one paragraph.
    text = BLOCK.sub("```", page.read_text())
    assert re.findall(r"^(?!#|- |\d+\. | ).+\n(?=- |\d+\. )", text, re.MULTILINE) == []


def test_outputs_may_differ_in_times_and_in_last_digits_alone():
    shown = "site  rmse 0.0123, 4 new parameters in 1.25 s, 3e-08\n---\n"
    assert OUTPUTS.difference(shown, "site    rmse 0.0124, 4 new parameters in 80.5 s, -1.2e-07\n-----\n") is None
    for old, new in [("0.0123", "0.0153"), ("4", "5"), ("3e-08", "3e-04"), ("site", "sites"), ("---\n", "")]:
        assert OUTPUTS.difference(shown, shown.replace(old, new)) is not None


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/**/*.md")), ids=lambda page: page.stem)
def test_a_page_has_a_picture_or_an_output(page):
    assert re.search(r"!\[|^```text$|^\{\{ |^:::", page.read_text(), re.MULTILINE), page


def test_numbers_of_pages_are_those_of_the_result_files():
    numbers = script(ROOT / "docs" / "page_numbers.py")
    for page in numbers.PAGES:
        text = page.read_text()
        assert numbers.renewed(text) == text, "run: python docs/page_numbers.py"


def test_the_picture_of_times_has_those_of_the_result_file():
    drawn = re.findall(r">(\d\.\d\d)</text>", (ROOT / "docs" / "pictures" / "speed.svg").read_text())
    times = script(ROOT / "docs" / "pictures" / "speed.py").times()
    assert drawn == [f"{time:.2f}" for time in times.values()], "run: python docs/pictures/speed.py"


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


def test_colours_of_diagrams_are_those_of_bases_or_greys():
    known = {STOCK.lower(), *(basis.colour.lower() for basis in OURS)}
    for file in (ROOT / "docs" / "pictures").glob("*.svg"):
        colours = {colour.lower() for colour in re.findall("#[0-9a-fA-F]{6}", file.read_text())} - known
        assert [colour for colour in colours if len({colour[1:3], colour[3:5], colour[5:]}) > 1] == [], file.name


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


def test_the_basis_of_the_guide_is_like_ours():
    page = read(ROOT / "docs" / "guides" / "extend.md")[0]
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


def test_the_readme_runs_from_top_to_bottom():
    namespace, commands = read(ROOT / "README.md")
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


def test_the_sample_of_the_training_guide_is_that_of_its_result_file():
    kept = (ROOT / "benchmarks" / "results" / "sample.txt").read_text()
    commands, text = kept.split("\n", 3)[1:3], kept.split("\n", 3)[3]
    page = (ROOT / "docs" / "guides" / "train.md").read_text()
    assert f"```\n{text}```\n" in page
    for command in commands:
        assert command.removeprefix("# ").partition(" --out")[0] in page


def source_nodes():
    for folder in ("ortho_fx", "passes", "models"):
        for path in (ROOT / folder).rglob("*.py"):
            yield from ast.walk(ast.parse(path.read_text()))


def text_of(node):
    """A text of the source, with "…" in the place of each value that is put in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def test_troubleshooting_quotes_the_messages_of_today():
    page = (ROOT / "docs" / "guides" / "troubleshooting.md").read_text()
    quoted = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(quoted) > 70
    patterns = {row: re.compile(".*".join(map(re.escape, row.strip("… ").split("…"))), re.DOTALL) for row in quoted}
    nodes = list(source_nodes())
    known = [text for node in nodes if (text := text_of(node))]
    assert [row for row, pattern in patterns.items() if not any(map(pattern.search, known))] == []

    calls = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn"]
    warned = {text_of(call.args[0]) for call in calls} - {"", "ortho_fx: …"}
    assert len(warned) > 4
    assert [text for text in warned if not any(pattern.search(text) for pattern in patterns.values())] == []
