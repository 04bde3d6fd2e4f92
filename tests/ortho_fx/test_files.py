import errno
import os

import pytest

from ortho_fx import files
from ortho_fx.errors import OrthoFxError
from ortho_fx.files import atomic_file, remove_unfinished


def _full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _zip_writer_fails():
    try:
        _full()
    finally:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0\nmore")


def test_a_file_takes_its_place_when_it_is_written(tmp_path):
    path = tmp_path / "new" / "folder" / "file"
    with atomic_file(path) as temporary:
        assert (temporary.name, temporary.parent.parent) == (path.name, path.parent)
        temporary.write_text("one")
        temporary.chmod(0o600)
    assert path.read_text() == "one"
    (tmp_path / "plain").write_text("")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert [file.name for file in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("where", ["flushing", "writing", "in the zip writer"])
def test_a_full_disk_keeps_the_earlier_file(tmp_path, monkeypatch, where):
    path = tmp_path / "file"
    path.write_text("earlier")
    if where == "flushing":
        monkeypatch.setattr(files.os, "fsync", _full)
    failure = {"flushing": lambda: None, "writing": _full, "in the zip writer": _zip_writer_fails}[where]

    def write():
        with atomic_file(path) as temporary:
            temporary.write_text("half")
            failure()

    with pytest.raises(OrthoFxError) as caught:
        write()
    assert str(caught.value) == f"cannot save {path}: No space left on device; an earlier file there is untouched"
    assert path.read_text() == "earlier"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OrthoFxError, match=r"^cannot save .*file/below: (File exists|Not a directory); an earlier"):
        with atomic_file(tmp_path / "file" / "below"):
            pass


def test_other_errors_pass_and_leave_nothing_behind(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_file(tmp_path / "file"):
        _ = 1 / 0
    assert not list(tmp_path.iterdir())


def test_files_that_are_written_beside_it_move_too(tmp_path):
    with atomic_file(tmp_path / "file") as temporary:
        temporary.write_text("one")
        temporary.with_name("file.data").write_text("two")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"file": "one", "file.data": "two"}


def test_an_error_that_is_not_the_disks_stays_what_it_is(tmp_path):
    with pytest.raises(RuntimeError, match="shapes"), atomic_file(tmp_path / "file"):
        raise RuntimeError("shapes do not match")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_write_leaves_is_removed_and_nothing_else(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".run.json.a1b2").mkdir()
    (tmp_path / ".run.json.a1b2" / "run.json").write_text("half")
    (tmp_path / ".run.json.c3d4").symlink_to(tmp_path / "elsewhere")
    kept = ["elsewhere", ".run.jsonl.a1b2", "run.json.a1b2", "run.json"]
    for name in kept[1:]:
        (tmp_path / name).write_text("")
    remove_unfinished(tmp_path, ["run.json"])
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(kept)
