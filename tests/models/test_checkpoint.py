import errno
import os

import pytest
import torch

from ortho_fx import OrthoFxError
from ortho_fx.models import checkpoint
from ortho_fx.models.checkpoint import load_checkpoint, save_checkpoint

STATE = {"configuration": {"basis": "hermite", "degree": 3}, "step": 7, "model": {"w": torch.ones(3)}}


def test_round_trip(tmp_path):
    path = tmp_path / "run" / "checkpoint.pt"
    save_checkpoint(path, STATE)
    loaded = load_checkpoint(path, STATE["configuration"])
    assert loaded["step"] == 7
    assert torch.equal(loaded["model"]["w"], torch.ones(3))
    assert [file.name for file in path.parent.iterdir()] == ["checkpoint.pt"]


def test_another_configuration_is_refused_field_by_field(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, STATE)
    with pytest.raises(OrthoFxError) as caught:
        load_checkpoint(path, {"basis": "fourier", "degree": 3, "seed": 1})
    assert str(caught.value) == (
        f"{path} is of another configuration: basis is 'hermite' there and 'fourier' here, "
        "seed is None there and 1 here"
    )


def _full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _zip_writer_fails(*_):
    try:
        _full()
    finally:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0\nmore")


@pytest.mark.parametrize(
    ("where", "failure"),
    [("fsync", _full), ("save", _full), ("save", _zip_writer_fails)],
)
def test_a_full_disk_keeps_the_earlier_checkpoint(tmp_path, monkeypatch, where, failure):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, STATE)
    monkeypatch.setattr(checkpoint.os if where == "fsync" else checkpoint.torch, where, failure)
    with pytest.raises(
        OrthoFxError,
        match=r"^cannot save .*checkpoint\.pt: No space left on device; an earlier checkpoint there is untouched$",
    ):
        save_checkpoint(path, {**STATE, "step": 8})
    monkeypatch.undo()
    assert load_checkpoint(path, STATE["configuration"])["step"] == 7
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_missing_and_broken_files_are_named(tmp_path):
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(OrthoFxError, match="there is no checkpoint"):
        load_checkpoint(path, {})
    for content in (b"", b"not a checkpoint"):
        path.write_bytes(content)
        with pytest.raises(OrthoFxError, match="is not a readable checkpoint"):
            load_checkpoint(path, {})
    for content in ({"weights": 1}, [1, 2], {"version": 1, "configuration": 3}):
        torch.save(content, path)
        with pytest.raises(OrthoFxError, match="is not a readable checkpoint"):
            load_checkpoint(path, {})


def test_a_damaged_file_comes_without_the_advice_to_load_it_unsafely(tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save({"version": 1, "configuration": {}, "step": object()}, path)
    with pytest.raises(OrthoFxError, match="is damaged, or holds more than tensors") as caught:
        load_checkpoint(path, {})
    assert "weights_only" not in str(caught.value)
