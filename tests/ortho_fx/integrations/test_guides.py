"""The guides run and print what they show, where their libraries are installed."""

import importlib
import warnings
from pathlib import Path

import pytest

from tests.test_docs import OUTPUTS

GUIDES = Path(__file__).parents[3] / "docs" / "guides" / "integrations"
NEEDED = {"peft": ("peft", "transformers"), "transformers": ("transformers", "accelerate")}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", sorted(GUIDES.glob("*.md")), ids=lambda page: page.stem)
def test_a_guide_runs_and_prints_what_it_shows(page, tmp_path, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for library in NEEDED.get(page.stem, (page.stem,)):
            pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    if page.stem == "timm":  # puts its tables back
        tables = importlib.import_module("timm.layers.create_act")
        for name in ("_ACT_LAYER_DEFAULT", "_ACT_FN_DEFAULT"):
            monkeypatch.setattr(tables, name, getattr(tables, name))
    namespace, _, differences, _ = OUTPUTS.read(page)
    if page.stem == "peft":
        namespace["peft"].disable()
    assert len(namespace) > 2
    assert differences == [], f"run: python docs/outputs.py {page.stem}"
