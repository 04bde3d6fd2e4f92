"""The Python blocks of the guides run in order, where their libraries are installed."""

import re
import warnings
from pathlib import Path

import pytest

GUIDES = Path(__file__).parents[3] / "docs" / "guides" / "integrations"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("library", ["peft", "lightning", "accelerate", "torchao"])
def test_a_guide_runs_from_top_to_bottom(library, tmp_path, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(library)
    if library == "peft":
        pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": f"guide_of_{library}"}
    for number, block in enumerate(BLOCK.findall((GUIDES / f"{library}.md").read_text())):
        file = tmp_path / f"block{number}.py"  # rewrites read the source of classes
        file.write_text(block)
        exec(compile(block, str(file), "exec"), namespace)
    if library == "peft":
        namespace["peft"].disable()
    assert len(namespace) > 2
