"""README and guides run: their Python in order, as one reader would run it, and their commands, shortened, in a row."""

import re
import shlex
from pathlib import Path

import pytest

from ortho_fx import cli
from ortho_fx.models import gpt2

ROOT = Path(__file__).parent.parent
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
PAGES = [ROOT / "docs" / "index.md", *GUIDES, ROOT / "passes" / "README.md"]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)#:]+)\)")
# What a page tells a reader to wait for, a test need not.
SHORT = "--no-compile --steps 2 --batch-size 8 --eval-every 1 --warmup 1".split()
SMALL = gpt2.GPT2Config(vocabulary=256, context=16, layers=1, heads=2, width=32)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(gpt2.PRESETS, "tiny", SMALL)


def read(page):
    """Does what a page says; returns what its Python leaves behind, and the commands."""
    namespace, commands = {"__name__": page.stem}, []
    for language, text in BLOCK.findall(page.read_text()):
        if language == "python":
            # Classes are rewritten by their source, which a file has.
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
                assert cli.main(arguments) == 0, command
                commands.append(command)
    return namespace, commands


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs_from_top_to_bottom(page):
    namespace, commands = read(page)
    assert len(namespace) > 2 or commands


def test_the_readme_runs_from_top_to_bottom(capsys):
    namespace, commands = read(ROOT / "README.md")
    assert "1 replaced, 0 left, 4 new parameters" in capsys.readouterr().out
    assert [tuple(p.shape) for p in namespace["model"][1].parameters()] == [(1,), (5,), (5,), (5,)]
    assert [command.split()[0] for command in commands] == ["train", "plot", "export", "compare"]


@pytest.mark.parametrize(
    "page", [*(ROOT / folder / "README.md" for folder in (".", "benchmarks", "examples")), *PAGES], ids=str
)
def test_links_lead_somewhere(page):
    text = re.sub(r"`[^`\n]*`", "", BLOCK.sub("", page.read_text()))
    for link in LINK.findall(text):
        assert (page.parent / link).exists(), link
