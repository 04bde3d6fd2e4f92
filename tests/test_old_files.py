"""Files that were written when the package was one flat folder, by `old_files/make.py`, still load."""

import copy
import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from ortho_fx import FrozenExpansion, moved, revert_, rewrite_, rewrite_like_
from ortho_fx.activations.expansion import ExpansionActivation
from ortho_fx.models import gpt2
from ortho_fx.models.runs.files import read_run
from ortho_fx.models.training import train
from ortho_fx.models.weights import load_model

FOLDER = Path(__file__).parent / "old_files"
FLAT = FOLDER / "flat"
PICKLED = sorted(path.stem for path in FLAT.glob("*.pt") if path.stem != "outputs")


@pytest.fixture
def old_models(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    yield
    for name in ("old_models", "make"):
        sys.modules.pop(name, None)


def test_there_are_files_of_every_kind():
    assert len(PICKLED) == 10


@pytest.mark.parametrize("name", PICKLED)
def test_a_pickled_model_computes_what_it_did_and_can_be_reverted(old_models, name):
    outputs = torch.load(FLAT / "outputs.pt")
    model = torch.load(FLAT / f"{name}.pt", weights_only=False)
    assert any(isinstance(module, ExpansionActivation | FrozenExpansion) for module in model.modules())
    torch.testing.assert_close(model(outputs["x"]), outputs[name])
    revert_(model)
    assert not any(isinstance(module, ExpansionActivation | FrozenExpansion) for module in model.modules())
    model(outputs["x"])


def test_calls_in_branches_keep_the_expansions_that_they_had(old_models):
    model, x, outputs = torch.load(FOLDER / "branches.pt", weights_only=False)
    for loaded in (model, copy.deepcopy(model)):
        assert sorted(loaded._modules) == ["a", "silu_expansion_0", "silu_expansion_1"]
        for step, expected in outputs.items():
            torch.testing.assert_close(loaded(x, step), expected)
    assert not rewrite_(loaded).replaced
    revert_(loaded)
    fresh = type(loaded)()
    (note,) = rewrite_like_(fresh, model.state_dict()).notes
    assert "silu_expansion_0 and silu_expansion_1" in note
    fresh.load_state_dict(model.state_dict())
    for step, expected in outputs.items():
        torch.testing.assert_close(fresh(x, step), expected)


def test_a_run_goes_on_and_its_weights_load(old_models, tmp_path, monkeypatch):
    make = importlib.import_module("make")
    monkeypatch.setitem(gpt2.PRESETS, "tiny", make.SMALL)
    shutil.copytree(FLAT, tmp_path / "flat")
    monkeypatch.chdir(tmp_path / "flat")
    model = load_model("run/model.safetensors")
    assert [type(module).__name__ for module in model.modules() if isinstance(module, ExpansionActivation)] == [
        "HermiteActivation"
    ]
    before = {row["step"]: row["loss"] for row in map(json.loads, Path("run/metrics.jsonl").read_text().splitlines())}
    result = train(make.config(), resume=True)
    assert sorted(before) == [1, 2, 3, 4]
    assert result.losses == {step: pytest.approx(before[step], rel=1e-5) for step in before}
    assert [row["step"] for row in read_run(Path("run")).rows] == [1, 2, 3, 4]


def test_a_moved_module_is_one_module():
    for old, new in moved.MOVED.items():
        module = importlib.import_module(old)
        assert module is importlib.import_module(new)
        assert (module.__name__, module.__spec__.name) == (new, new)
