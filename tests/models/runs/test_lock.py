import os
import subprocess
import sys

import pytest

from ortho_fx import OrthoFxError
from ortho_fx.models.runs.lock import locked

HOLDER = """
import sys
from pathlib import Path
from ortho_fx.models.runs.lock import locked
with locked(Path(sys.argv[1])):
    print("holds", flush=True)
    sys.stdin.read()
"""


def test_the_second_is_refused_until_the_first_leaves(tmp_path):
    with locked(tmp_path / "run"):
        with pytest.raises(OrthoFxError, match=rf"another run is in .*/run: process {os.getpid()} on \S+ writes it"):
            locked(tmp_path / "run").__enter__()
        with locked(tmp_path / "other"):
            pass
    with locked(tmp_path / "run"):
        pass


@pytest.mark.slow
def test_a_process_that_was_killed_holds_nothing(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "holds\n"
        with pytest.raises(OrthoFxError, match=f"process {holder.pid} on"):
            locked(tmp_path).__enter__()
        holder.kill()
    with locked(tmp_path):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_does_not_keep_the_lock(tmp_path):
    ready, until = os.pipe(), os.pipe()
    with locked(tmp_path):
        child = os.fork()
        if child == 0:
            os.write(ready[1], b"1")
            os.read(until[0], 1)
            os._exit(0)
        os.read(ready[0], 1)
    try:
        with locked(tmp_path):
            pass
    finally:
        os.write(until[1], b"1")
        os.waitpid(child, 0)
        for end in (*ready, *until):
            os.close(end)


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OrthoFxError, match="cannot write to"):
        locked(tmp_path / "run").__enter__()
    assert (tmp_path / "victim").read_text() == "precious"
