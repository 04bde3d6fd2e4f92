"""The notebooks run, and print and draw what they show."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def script(path):
    described = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(described)
    described.loader.exec_module(module)
    return module


def outputs(notebook):
    """What each cell prints, without the numbers, and how many pictures it shows."""
    found = []
    for cell in notebook["cells"]:
        printed = "".join(line for one in cell.get("outputs", ()) for line in one.get("text", ()))
        found.append(
            (re.sub(" +", " ", NUMBER.sub("#", printed)), sum("data" in one for one in cell.get("outputs", ())))
        )
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_prints_and_draws_what_it_shows(path, tmp_path, monkeypatch):
    kept = json.loads(path.read_text(encoding="utf-8"))
    monkeypatch.chdir(tmp_path)
    assert outputs(script(ROOT / "docs" / "notebooks" / "run.py").run(kept)) == outputs(kept)
    assert sum(pictures for _, pictures in outputs(kept)) > 0
    assert list(tmp_path.iterdir()) == []
    assert not re.search(r"/(home|work|tmp|Users|root)/", "".join(text for text, _ in outputs(kept)))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_page_of_a_notebook_has_its_cells_and_pictures(path):
    kept = json.loads(path.read_text(encoding="utf-8"))
    page, pictures = script(ROOT / "docs" / "hooks.py").notebook_page(kept, path.stem)
    for cell in kept["cells"]:
        assert "".join(cell["source"]) in page
    assert all(picture.startswith(b"\x89PNG") for picture in pictures.values())
    assert len(pictures) == sum(number for _, number in outputs(kept))
    assert set(re.findall(r"!\[.*?\]\((.*?)\)", page)) == set(pictures)
    for link in re.findall(r"(?<!!)\[[^]]*\]\(([^)]+\.md)\)", page):
        assert (path.parent / link).exists(), link
