"""What the processes of a comparison's runs answer, and what this one makes of it."""

import multiprocessing
from types import SimpleNamespace

import pytest

from ortho_fx import OrthoFxError
from ortho_fx.models.compare import execute
from ortho_fx.models.compare.execute import Job
from ortho_fx.models.recipe import TrainConfig

JOB = Job("gelu", "1 of 2: gelu, seed 0", TrainConfig(basis="none"))


def answered(*answer):
    """What `_answer` makes of an answer, or of a process that is gone without one."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    if answer:
        sender.send(answer)
    sender.close()
    process = SimpleNamespace(join=lambda: None, exitcode=-9)
    return execute._answer(JOB, process, receiver)


def test_a_run_that_is_done_may_have_diverged():
    assert answered("done", None) is None
    assert answered("done", "the loss is nan") == "the loss is nan"


def test_other_ends_end_the_comparison():
    with pytest.raises(OrthoFxError, match=r"^the disk is full$"):
        answered("error", "the disk is full")
    with pytest.raises(KeyboardInterrupt, match="step-3 is kept"):
        answered("interrupt", "step-3 is kept")
    with pytest.raises(
        OrthoFxError, match=r"^the process of 1 of 2: gelu, seed 0 is gone, with exit code -9; the same "
    ):
        answered()
