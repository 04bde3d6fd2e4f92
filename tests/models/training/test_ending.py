"""How a run ends early, what it says then, and what it goes on from."""

import errno
import io
import itertools
import json
import os
import shutil
import signal
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from ortho_fx import OrthoFxError
from ortho_fx.errors import Terminated
from ortho_fx.models import gpt2
from ortho_fx.models.data.loader import WorkerLost
from ortho_fx.models.recipe import TrainConfig
from ortho_fx.models.runs.lock import locked
from ortho_fx.models.training import loop, space
from ortho_fx.models.training.loop import Run, train
from ortho_fx.models.training.processes import Processes, peer_lost

pytestmark = pytest.mark.slow

ALONE = Processes(0, 1, torch.device("cpu"))
GIGABYTE = 10**9


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    monkeypatch.setitem(gpt2.PRESETS, "test", gpt2.GPT2Config(vocabulary=256, context=8, layers=1, heads=1, width=8))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("abcdefgh" * 500)


def config(**changes):
    values = {"size": "test", "data": "text", "steps": 6, "batch_size": 2, "compile": False, "save_every": 2}
    return TrainConfig(**{**values, "eval_every": 3, "warmup": 1, "out": "run", **changes})


def ended(during, at=4, **changes):
    """A run in which `during` is called in the step after `at` steps."""
    run = Run(config(**changes), ALONE)
    step = run.optimization.step

    def stepping(number, parts):
        if number == at:
            during()
        return step(number, parts)

    run.optimization.step = stepping
    return run


def failing(error):
    def fail():
        raise error

    return fail


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_a_signal_says_what_is_kept(number, error):
    run = ended(lambda: signal.raise_signal(number))
    with pytest.raises(error) as caught:
        run.start(resume=False, overwrite=False)
    said = caught.value.kept if error is Terminated else str(caught.value)
    assert said == "run/checkpoints/step-00000005 is kept: go on with --resume"
    assert sorted(train(config(), resume=True).losses) == [1, 2, 3, 4, 5, 6]


def test_a_reader_that_is_gone_ends_a_run_after_it_has_saved(monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    run = Run(config(), ALONE)
    monkeypatch.setattr(sys, "stdout", Gone())
    with pytest.raises(OrthoFxError) as caught:
        run.start(resume=False, overwrite=False)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    # The first line is that of the validation at step 3.
    assert str(caught.value) == (
        "cannot write to the standard output: Broken pipe; run/checkpoints/step-00000003 is kept: go on with --resume"
    )
    assert sorted(train(config(), resume=True).losses) == [1, 2, 3, 4, 5, 6]


def test_without_a_checkpoint_nothing_is_advised_that_fails():
    run = ended(failing(KeyboardInterrupt()), at=1)
    with pytest.raises(KeyboardInterrupt, match=r"^no checkpoint was saved yet: start again$"):
        run.start(resume=False, overwrite=False)
    assert len(train(config()).losses) == 6


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            WorkerLost("a worker is gone"),
            "a worker is gone; run/checkpoints/step-00000004 is kept: go on with --resume",
        ),
        (
            OrthoFxError("the disk is full"),
            "the disk is full; run/checkpoints/step-00000004 is kept: go on with --resume",
        ),
        (loop._OfData("token 9 is not known"), "token 9 is not known; run/checkpoints/step-00000004 is kept"),
    ],
)
def test_an_error_says_what_is_kept(error, said):
    with pytest.raises(OrthoFxError) as caught:
        ended(failing(error)).start(resume=False, overwrite=False)
    assert str(caught.value) == said


def test_a_lost_process_is_one_line(monkeypatch):
    run = ended(failing(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")))
    with pytest.raises(RuntimeError, match="Connection closed"):  # alone there is no other process
        run.start(resume=False, overwrite=False)
    run = ended(failing(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")))
    monkeypatch.setattr(loop, "peer_lost", lambda error, processes: peer_lost(error, Processes(0, 2, ALONE.device)))
    with pytest.raises(
        OrthoFxError, match=r"^process 0 has lost another process of the run; run/checkpoints/\S+ is kept"
    ):
        run.start(resume=False, overwrite=True)


def test_data_that_end_a_run_are_told_from_its_disk(monkeypatch):
    def short(*arguments, **settings):
        yield from ()
        raise OrthoFxError("token ids must be below the vocabulary")

    monkeypatch.setattr(loop, "load", short)
    with pytest.raises(OrthoFxError, match=r"below the vocabulary; no checkpoint was saved yet: start again$"):
        train(config())


def test_a_folder_that_is_removed_is_noticed():
    with pytest.raises(
        OrthoFxError, match=r"^cannot write run/metrics\.jsonl: No such file or directory; no checkpoint"
    ):
        ended(lambda: shutil.rmtree("run")).start(resume=False, overwrite=False)


def test_the_space_for_a_checkpoint_is_checked_at_the_start_and_before_each(monkeypatch):
    usage, free = namedtuple("usage", "total used free"), [GIGABYTE]
    monkeypatch.setattr(space.shutil, "disk_usage", lambda path: usage(GIGABYTE, GIGABYTE, 10))
    needs = r"the next checkpoint needs \S+ MB, and the disk of run has 1e-05 MB free: remove something there, or"
    with pytest.raises(OrthoFxError, match=needs):
        train(config())
    monkeypatch.setattr(space.shutil, "disk_usage", lambda path: usage(GIGABYTE, 0, free[0]))
    with pytest.raises(OrthoFxError, match=rf"^{needs}.*; run/checkpoints/step-00000004 is kept: go on with --resume"):
        ended(lambda: free.append(free.pop() and 10), at=5).start(resume=False, overwrite=False)


def test_the_estimate_of_the_first_checkpoint_is_close(monkeypatch):
    wide = gpt2.GPT2Config(vocabulary=256, context=8, layers=1, heads=1, width=128)
    monkeypatch.setitem(gpt2.PRESETS, "test", wide)
    for ema in (0.0, 0.9):
        run = Run(config(ema=ema), ALONE)
        estimate = space.size_to_come(run.model, bool(ema))
        run.start(resume=False, overwrite=True)
        stated = space.size_of(run._state())
        taken = sum(file.stat().st_size for file in (run.directory / "checkpoints" / "step-00000006").iterdir())
        assert taken <= stated * 1.1
        assert estimate == pytest.approx(stated, rel=0.25)


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        *itertools.product(["metrics.jsonl", "sites.jsonl"], ["the last row", "the first row", "a digit", "the file"]),
        ("coefficients.jsonl", "the first row"),
    ],
)
def test_rows_that_are_lost_are_noticed(capsys, name, loss):
    whole = train(config())
    path = config().directory / name
    before = path.read_text()
    lines = before.splitlines(keepends=True)
    if loss == "the file":
        path.unlink()
    elif loss == "the last row":
        path.write_text("".join(lines[:-1]) + lines[-1][:9])
    elif loss == "the first row":
        path.write_text("".join(lines[1:]))
    else:
        number = next(place for place, letter in enumerate(before) if letter in "456789")
        path.write_text(before[:number] + "3" + before[number + 1 :])
    if loss != "the last row":
        with pytest.raises(OrthoFxError, match=rf"run/{name}.*; no checkpoint is whole: ") as caught:
            train(config(), resume=True)
        assert "\n" not in str(caught.value)
        return
    # The older checkpoint has all of its rows, and the run writes the others again.
    assert train(config(), resume=True).losses == whole.losses
    (line,) = capsys.readouterr().err.splitlines()
    assert "step-00000006 is not a readable checkpoint: run/" + name in line
    assert line.endswith("; goes on from run/checkpoints/step-00000004")
    timeless = [{**row, "seconds": 0} for row in map(json.loads, path.read_text().splitlines())]
    assert timeless == [{**row, "seconds": 0} for row in map(json.loads, lines)]


def test_other_data_of_the_same_size_are_refused():
    train(config())
    Path("text").write_text("hgfedcba" * 500)
    with pytest.raises(OrthoFxError, match=r"step-00000006 was trained on other data: both are 'text of 1 file"):
        train(config(), resume=True)


def test_a_folder_in_which_a_run_is_refuses_another():
    with locked(config().directory), pytest.raises(OrthoFxError, match="another run is in run: process"):
        train(config())


def test_what_a_killed_run_left_half_written_is_removed():
    folder = config().directory
    (folder / ".model.safetensors.abc").mkdir(parents=True)
    (folder / ".metrics.jsonl.abc.partial").write_text("")
    (folder / ".model.safetensors.link").symlink_to("text")
    (folder / ".notes").write_text("")
    train(config())
    assert sorted(path.name for path in folder.glob(".*")) == [".lock", ".notes"]
