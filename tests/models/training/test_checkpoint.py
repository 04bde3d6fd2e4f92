import errno
import json
import os

import pytest
import torch

from ortho_fx import OrthoFxError
from ortho_fx.models.training import checkpoint
from ortho_fx.models.training.checkpoint import (
    checkpoints,
    load_tensors,
    newest_checkpoint,
    remove_checkpoints,
    save_checkpoint,
)
from ortho_fx.models.training.processes import Processes

CONFIGURATION = {"basis": "hermite", "degree": 3}
ALONE = Processes(0, 1, torch.device("cpu"))


def state(value=1.0):
    return {"model": {"w": torch.full((3,), value)}, "optimizer": {"param_groups": [{"lr": 0.1}]}}


def save(directory, step, value=1.0, keep=2):
    return save_checkpoint(directory, step, state(value), CONFIGURATION, ALONE, keep)


def load(directory):
    newest = newest_checkpoint(directory, CONFIGURATION)
    loaded = state(0.0)
    load_tensors(newest.path, loaded, ALONE)
    return newest.step, loaded["model"]["w"].tolist()


def test_round_trip(tmp_path):
    path = save(tmp_path / "run" / "checkpoints", 7)
    assert path.name == "step-00000007"
    assert load(path.parent) == (7, [1, 1, 1])
    description = json.loads((path / "state.json").read_text())
    assert description["configuration"] == CONFIGURATION
    assert description["processes"] == 1
    assert [file.name for file in path.parent.iterdir()] == ["step-00000007"]


def test_the_newest_are_kept(tmp_path):
    for step in (2, 4, 6, 8):
        save(tmp_path, step, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000006", "step-00000008"]
    assert len(list(tmp_path.iterdir())) == 2


def test_what_an_interrupted_save_left_is_passed_over_and_removed(tmp_path):
    save(tmp_path, 2)
    (tmp_path / "step-00000004.partial").mkdir()
    (tmp_path / "step-00000004.partial" / "state.json").write_text("{}")
    (tmp_path / "step-00000006").mkdir()
    assert load(tmp_path)[0] == 2
    save(tmp_path, 8)
    assert not (tmp_path / "step-00000004.partial").exists()
    remove_checkpoints(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_another_configuration_is_refused_field_by_field(tmp_path):
    path = save(tmp_path, 7)
    with pytest.raises(OrthoFxError) as caught:
        newest_checkpoint(tmp_path, {"basis": "fourier", "degree": 3, "seed": 1})
    assert str(caught.value) == (
        f"{path} is of another configuration: basis is 'hermite' there and 'fourier' here, "
        "seed is None there and 1 here"
    )


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["tensors", "description"])
def test_a_full_disk_keeps_the_earlier_checkpoint(tmp_path, monkeypatch, where):
    save(tmp_path, 7)
    module = torch.distributed.checkpoint.filesystem if where == "tensors" else checkpoint.json
    monkeypatch.setattr(*((module.os, "fsync") if where == "tensors" else (module, "dumps")), full)
    with pytest.raises(
        OrthoFxError,
        match=r"^cannot save .*step-00000008: No space left on device; earlier checkpoints are untouched$",
    ):
        save(tmp_path, 8)
    monkeypatch.undo()
    assert load(tmp_path)[0] == 7
    assert [file.name for file in tmp_path.iterdir()] == ["step-00000007"]


def test_missing_and_broken_checkpoints_are_named(tmp_path):
    with pytest.raises(OrthoFxError, match=r"^there is no checkpoint in .* to resume from$"):
        newest_checkpoint(tmp_path, {})
    path = save(tmp_path, 7)
    described = (path / "state.json").read_text()
    for content in ("", "no", "[1]", '{"version": 2}', '{"version": 2, "configuration": 3, "step": 1}'):
        (path / "state.json").write_text(content)
        with pytest.raises(OrthoFxError, match="step-00000007 is not a readable checkpoint: ") as caught:
            newest_checkpoint(tmp_path, {})
        assert "\n" not in str(caught.value)
    (path / "state.json").write_text(described.replace('"version": 2', '"version": 9'))
    with pytest.raises(OrthoFxError, match="has checkpoint version 9; this release reads version 2"):
        newest_checkpoint(tmp_path, CONFIGURATION)


@pytest.mark.parametrize("damage", ["index", "no index", "tensors"])
def test_damaged_tensors_are_named(tmp_path, damage):
    path = save(tmp_path, 7)
    if damage == "index":
        (path / ".metadata").write_bytes(b"damaged")
    elif damage == "no index":
        (path / ".metadata").unlink()
    else:
        (path / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(OrthoFxError, match="step-00000007 is not a readable checkpoint: ") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_without_a_tensor_that_is_needed_is_an_error(tmp_path):
    path = save(tmp_path, 7)
    with pytest.raises(OrthoFxError, match=r"is not a readable checkpoint: .*average"):
        load_tensors(path, {**state(), "average": {"w": torch.ones(3)}}, ALONE)
