"""The guides run: their Python in order, as one reader would run it, and their commands, shortened, in a row."""

import re
import shlex
from pathlib import Path

import pytest

from ortho_fx import cli
from ortho_fx.models import gpt2

DOCS = Path(__file__).parent.parent / "docs"
PAGES = [DOCS / "index.md", *sorted((DOCS / "guides").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# What a page tells a reader to wait for, a test need not.
SHORT = "--no-compile --steps 2 --batch-size 8 --eval-every 1 --warmup 1".split()
SMALL = gpt2.GPT2Config(vocabulary=256, context=16, layers=1, heads=2, width=32)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(gpt2.PRESETS, "tiny", SMALL)
    namespace = {"__name__": page.stem}
    blocks = BLOCK.findall(page.read_text())
    assert blocks
    for language, text in blocks:
        if language == "python":
            # Classes are rewritten by their source, which a file has.
            file = tmp_path / f"block{len(namespace)}.py"
            file.write_text(text)
            exec(compile(text, str(file), "exec"), namespace)
        elif language == "toml":
            name, recipe = text.removeprefix("# ").split("\n", 1)
            Path(name).write_text(recipe)
        elif language == "console":
            for line in text.splitlines():
                command = shlex.split(line.removeprefix("$ ortho-fx "))
                shortened = [*command, *(SHORT if command[0] in ("train", "compare") else [])]
                assert cli.main(shortened) == 0, capsys.readouterr().err
        else:
            assert language == "", f"{page.name} has a block of {language!r}"
