import errno
import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import xxhash

from ortho_fx import OrthoFxError
from ortho_fx.models.runs.files import RowsWritten
from ortho_fx.models.training import checkpoint, stored
from ortho_fx.models.training.checkpoint import checkpoints, load_checkpoint, remove_checkpoints, save_checkpoint
from ortho_fx.models.training.processes import Processes

CONFIGURATION = {"basis": "hermite", "degree": 3}
ALONE = Processes(0, 1, torch.device("cpu"))


def state(value=1.0):
    return {"model": {"w": torch.full((3,), value)}, "optimizer": {"param_groups": [{"lr": 0.1, "betas": (0.9, 0.95)}]}}


def save(directory, step, value=1.0, keep=2, **others):
    return save_checkpoint(directory, step, state(value), CONFIGURATION, ALONE, keep, **others)


def load(directory, configuration=CONFIGURATION, **others):
    loaded = state(0.0)
    found, note = load_checkpoint(directory, configuration, loaded, ALONE, **others)
    return found.step, loaded["model"]["w"].tolist(), note


def test_round_trip(tmp_path):
    path = save(tmp_path / "run" / "checkpoints", 7)
    assert path.name == "step-00000007"
    assert load(path.parent) == (7, [1, 1, 1], None)
    description = json.loads((path / "state.json").read_text())
    assert description["configuration"] == CONFIGURATION
    assert description["processes"] == 1
    assert [file.name for file in path.parent.iterdir()] == ["step-00000007"]
    files = {file.name: file.read_bytes() for file in path.iterdir() if file.name != "state.json"}
    assert description["files"] == {
        name: {"size": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)} for name, content in files.items()
    }


def test_digests_of_large_and_of_short_writes(tmp_path):
    """A block is hashed at a time, whatever the sizes of the pieces that are written."""
    content = os.urandom(3 * stored._BLOCK + 5)
    files = stored._Files()
    with files.create_stream(tmp_path / "file", "wb") as stream:
        for start, stop in ((0, 3), (3, 2 * stored._BLOCK), (2 * stored._BLOCK, len(content))):
            assert stream.write(content[start:stop]) == stop - start
    assert (tmp_path / "file").read_bytes() == content
    assert files.digests["file"] == stored.digest_of(tmp_path / "file")
    assert files.digests["file"].digits == xxhash.xxh3_128_hexdigest(content)


def test_without_xxhash_digests_are_sha256_and_those_of_xxhash_are_refused(tmp_path, monkeypatch):
    with_xxhash = save(tmp_path / "with", 7)
    monkeypatch.setattr(stored, "_HASHES", {"sha256": hashlib.sha256})
    monkeypatch.setattr(stored, "_HASH", "sha256")
    without = save(tmp_path / "without", 7)
    content = (without / ".metadata").read_bytes()
    digest = json.loads((without / "state.json").read_text())["files"][".metadata"]
    assert digest == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    with pytest.raises(OrthoFxError, match=f"^{with_xxhash} has digests of xxhash: pip install xxhash$"):
        load(tmp_path / "with")
    monkeypatch.undo()
    assert load(tmp_path / "without") == (7, [1, 1, 1], None)
    (without / ".metadata").write_bytes(content[:-1] + b"x")
    with pytest.raises(OrthoFxError, match=r"the content of \.metadata has changed"):
        load(tmp_path / "without")


def test_the_newest_are_kept(tmp_path):
    for step in (2, 4, 6, 99_999_999, 100_000_000):
        save(tmp_path, step, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-99999999", "step-100000000"]
    assert len(list(tmp_path.iterdir())) == 2


def test_what_an_interrupted_save_left_is_passed_over_and_removed(tmp_path):
    save(tmp_path, 2)
    for name in ("step-00000004.partial", ".step-00000004.abc.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("{}")
    (tmp_path / "step-00000006").mkdir()
    assert load(tmp_path)[0] == 2
    save(tmp_path, 8)
    assert not list(tmp_path.glob("*.partial"))
    remove_checkpoints(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_removal_leaves_no_checkpoint_without_its_files(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(path):
        (path / "__0_0.distcp").unlink()
        raise Killed

    save(tmp_path, 2)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", killed)
    with pytest.raises(Killed):
        save(tmp_path, 4, keep=1)
    monkeypatch.undo()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000004"]
    assert load(tmp_path)[0] == 4
    save(tmp_path, 6, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000006"]


def test_what_is_not_ours_stays_and_ends_nothing(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("")
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "notes.partial").write_text("")
    (folder / "link.partial").symlink_to(outside)
    (folder / "step-00000001.partial").symlink_to(outside)
    (folder / "step-00000002").symlink_to(outside)
    (folder / "step-00000003").write_text("")
    for step in (2, 3):
        save(folder, step)
        assert load(folder)[0] == step
    remove_checkpoints(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["link.partial", "notes.partial"]
    assert [path.name for path in outside.iterdir()] == ["precious"]


def test_another_configuration_is_refused_field_by_field(tmp_path):
    path = save(tmp_path, 7)
    with pytest.raises(OrthoFxError) as caught:
        load(tmp_path, {"basis": "fourier", "degree": 3, "seed": 1})
    assert str(caught.value) == (
        f"{path} is of another configuration: basis is 'hermite' there and 'fourier' here, "
        "seed is None there and 1 here"
    )


def test_other_data_are_refused(tmp_path):
    save(tmp_path, 7, data="abc")
    assert load(tmp_path, data="abc")[0] == 7
    with pytest.raises(OrthoFxError, match="was trained on other data"):
        load(tmp_path, data="abd")


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
        load(tmp_path)
    path = save(tmp_path, 7)
    described = json.loads((path / "state.json").read_text())
    for content in ("", "no", "[1]", "[" * 10**5, '{"version": 2}', '{"version": 2, "configuration": 3, "step": 1}'):
        (path / "state.json").write_text(content)
        with pytest.raises(OrthoFxError, match="step-00000007 is not a readable checkpoint: ") as caught:
            load(tmp_path)
        assert "\n" not in str(caught.value)
    described.pop("sha256")
    (path / "state.json").write_text(checkpoint._sealed({**described, "version": 9}))
    with pytest.raises(OrthoFxError, match="has checkpoint version 9; this release reads 2 and 3"):
        load(tmp_path)


def test_a_checkpoint_of_version_2_is_read_and_cannot_be_made_of_one_of_version_3(tmp_path):
    path = save(tmp_path, 7)
    described = json.loads((path / "state.json").read_text()) | {"version": 2}
    (path / "state.json").write_text(json.dumps(described))
    with pytest.raises(OrthoFxError, match=r"state\.json has changed"):
        load(tmp_path)
    for name in ("sha256", "files", "rows", "data"):
        del described[name]
    (path / "state.json").write_text(json.dumps(described))
    assert load(tmp_path, data="abc") == (7, [1, 1, 1], None)


def test_lost_rows_count_as_damage(tmp_path):
    save(tmp_path, 1, rows={"metrics.jsonl": RowsWritten(1, "a")})
    path = save(tmp_path, 2, rows={"metrics.jsonl": RowsWritten(2, "b")})
    lost = {2: "rows are lost"}
    step, _, note = load(tmp_path, rows_differ=lambda found: lost.get(found.rows["metrics.jsonl"].count))
    assert step == 1
    assert note == f"{path} is not a readable checkpoint: rows are lost; goes on from {tmp_path / 'step-00000001'}"


def test_a_checkpoint_without_a_tensor_that_is_needed_is_an_error(tmp_path):
    save(tmp_path, 7)
    with pytest.raises(OrthoFxError, match=r"is not a readable checkpoint: .*average"):
        load_checkpoint(tmp_path, CONFIGURATION, {**state(), "average": {"w": torch.ones(3)}}, ALONE)


def damages(whole, other):
    """Every way in which a file may differ from `whole`, by its name; `other` is the same file of another run."""
    yield "emptied", b""
    yield "longer", whole + b"\0"
    yield "another run's", other
    for part in range(1, 8):
        yield f"cut at {part}/8", whole[: len(whole) * part // 8]
    for part in range(60):
        place, bit = len(whole) * part // 60, part % 8
        yield f"bit {bit} of byte {place}", whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :]


def test_no_damage_is_loaded(tmp_path):
    """Each file of the newest checkpoint damaged in 71 ways: one line, and the older one; alone, one line."""
    folder = tmp_path / "checkpoints"
    save(folder, 1, 1.0)
    newest = save(folder, 2, 2.0)
    other = save(tmp_path / "other", 2, 3.0)
    alone = tmp_path / "alone"
    shutil.copytree(newest, alone / newest.name)
    count = 0
    for name in sorted(path.name for path in newest.iterdir()):
        whole = (newest / name).read_bytes()
        swapped = (other / name).read_bytes()
        cases = [*damages(whole, swapped), ("missing", None)]
        # The files of two runs may be the same.
        for case, content in (pair for pair in cases if pair[1] != whole):
            count += 1
            for place in (newest, alone / newest.name):
                (place / name).unlink(missing_ok=True)
                if content is not None:
                    (place / name).write_bytes(content)
            step, values, note = load(folder)
            assert (step, values) == (1, [1, 1, 1]), (name, case)
            assert note.startswith(f"{newest} is not a readable checkpoint: "), (name, case)
            assert note.endswith(f"; goes on from {folder / 'step-00000001'}")
            assert "\n" not in note
            with pytest.raises(OrthoFxError, match=r"(no checkpoint is whole|there is no checkpoint)") as caught:
                load(alone)
            assert "\n" not in str(caught.value)
        for place in (newest, alone / newest.name):
            (place / name).write_bytes(whole)
    assert count >= 200
    assert load(folder) == (2, [2, 2, 2], None)


def test_after_a_fall_back_the_abandoned_checkpoints_go(tmp_path):
    for step in (100, 200):
        save(tmp_path, step, keep=1 + step // 200)
    (tmp_path / "step-00000200" / ".metadata").write_bytes(b"")
    assert load(tmp_path)[0] == 100
    save(tmp_path, 150, keep=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000150"]


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def sealed_again(path):
    """Gives a checkpoint that was changed the digests of what it holds, as somebody who makes one up would."""
    described = json.loads((path / "state.json").read_text())
    described.pop("sha256")
    for name in described["files"]:
        described["files"][name] = stored.digest_of(path / name).to_json()
    (path / "state.json").write_text(checkpoint._sealed(described))


@pytest.mark.parametrize("version", [2, 3])
def test_a_pickle_in_the_index_does_not_run(tmp_path, version):
    path = save(tmp_path, 7)
    (path / ".metadata").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    sealed_again(path)
    if version == 2:
        described = json.loads((path / "state.json").read_text()) | {"version": 2}
        kept = {key: described[key] for key in described if key not in ("sha256", "files", "rows", "data")}
        (path / "state.json").write_text(json.dumps(kept))
    with pytest.raises(OrthoFxError, match=r"names pathlib\S*, which no index of a checkpoint holds|readable"):
        load(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", ["value", "tensor"])
def test_a_pickle_beside_the_tensors_does_not_run(tmp_path, value):
    bad = Payload(tmp_path / "ran")
    held = {"w": bad} if value == "tensor" else {"w": torch.ones(3)}
    groups = {"param_groups": [{"lr": bad, "betas": (0.9, 0.95)}]}
    path = save_checkpoint(tmp_path, 7, {"model": held, "optimizer": groups}, CONFIGURATION, ALONE, 1)
    assert not (tmp_path / "ran").exists()
    sealed_again(path)
    with pytest.raises(OrthoFxError, match="is not a readable checkpoint"):
        load(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_an_index_names_only_files_beside_it(tmp_path):
    path = save(tmp_path, 7)
    shutil.move(path / "__0_0.distcp", tmp_path / "elsewhere")
    index = (path / ".metadata").read_bytes()
    # Both names have 12 letters.
    (path / ".metadata").write_bytes(index.replace(b"__0_0.distcp", b"../elsewhere"))
    described = json.loads((path / "state.json").read_text())
    del described["files"]["__0_0.distcp"], described["sha256"]
    (path / "state.json").write_text(checkpoint._sealed(described))
    sealed_again(path)
    with pytest.raises(OrthoFxError, match=r"names '\.\./elsewhere', which is not in the folder of the checkpoint"):
        load(tmp_path)


def test_an_index_cannot_change_a_class(tmp_path):
    """A pickle may set attributes of the classes that it names: these are not PyTorch's own."""
    from torch.distributed.checkpoint.metadata import Metadata

    path = save(tmp_path, 7)
    # Metadata itself, then BUILD with (None, {"version": "poisoned"}).
    attribute = b"X\x07\x00\x00\x00versionX\x08\x00\x00\x00poisoned"
    (path / ".metadata").write_bytes(
        b"\x80\x04c" + b"torch.distributed.checkpoint.metadata\nMetadata\n(N}" + attribute + b"stb."
    )
    sealed_again(path)
    with pytest.raises(OrthoFxError, match="is not a readable checkpoint"):
        load(tmp_path)
    assert Metadata.version is None
