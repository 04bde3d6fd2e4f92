import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from ortho_fx import OrthoFxError
from ortho_fx.models.data.images import Digits, Settings
from ortho_fx.models.data.loader import load
from ortho_fx.models.data.text import TokenFiles

pytestmark = pytest.mark.slow

HALVES = [slice(0, 2), slice(2, 8)]


class Steps:
    """Data whose batches hold their step, rows and process; it fails at one step."""

    name, kind = "steps", "tokens"

    def __init__(self, fails_at=None, pause=0.0):
        self.fails_at, self.pause = fails_at, pause

    def batch(self, seed, step, size, rows=slice(None)):
        time.sleep(self.pause)
        if step == self.fails_at:
            raise OrthoFxError(f"step {step} is bad")
        numbers = torch.tensor(list(range(size)[rows]))
        return numbers + 100 * step, torch.tensor([[os.getpid(), torch.get_num_threads()]] * len(numbers))


def run(data, workers, first=0, last=6, rows=HALVES):
    return load(data, seed=0, first=first, last=last, size=8, rows=rows, workers=workers)


def no_workers(seconds=10):
    deadline = time.monotonic() + seconds
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    return not multiprocessing.active_children()


def test_batches_are_those_of_the_data_with_any_number_of_workers(tmp_path):
    for name in ("train.bin", "val.bin"):
        np.arange(1000, dtype="<u2").tofile(tmp_path / name)
    for data in (Digits(Settings(mixup=0.2)), TokenFiles(tmp_path, context=8)):
        expected = [[data.batch(0, step, 8, rows) for rows in HALVES] for step in range(3, 7)]
        for workers in (0, 2):
            loaded = list(run(data, workers, first=3, last=7))
            assert [len(parts) for parts in loaded] == [2] * 4
            for parts, whole in zip(loaded, expected, strict=True):
                for part, batch in zip(parts, whole, strict=True):
                    assert type(part) is tuple
                    assert all(torch.equal(a, b) for a, b in zip(part, batch, strict=True))
    assert no_workers()


def test_steps_come_in_order_from_processes_with_one_thread_each():
    loaded = list(run(Steps(), 2))
    assert [parts[0][0][0].item() // 100 for parts in loaded] == list(range(6))
    processes, threads = zip(*(parts[0][1][0].tolist() for parts in loaded), strict=True)
    assert len(set(processes)) == 2
    assert os.getpid() not in processes
    assert set(threads) == {1}
    assert {parts[0][1][0, 0].item() for parts in run(Steps(), 0)} == {os.getpid()}
    assert list(run(Steps(), 2, first=6)) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_random_numbers_of_the_model_are_left_alone(workers):
    before = torch.get_rng_state()
    list(run(Steps(), workers, last=2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_data_comes_out_as_it_is(workers):
    batches = run(Steps(fails_at=2), workers)
    assert len([next(batches) for _ in range(2)]) == 2
    with pytest.raises(OrthoFxError, match=r"^step 2 is bad$"):
        next(batches)
    assert no_workers()


def test_closing_ends_the_workers():
    batches = run(Steps(), 2, last=1000)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert no_workers()


def signal_from_outside(process, number):
    """Sends a signal from a process that is not the worker's parent."""
    code = f"import os; os.kill({process}, {int(number)})"
    subprocess.run([sys.executable, "-S", "-c", code], check=True)


def test_signals_to_all_processes_leave_workers_at_work():
    # PyTorch's thread pool exists from here on; each forked worker makes it anew.
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.set_num_threads(threads)
    batches = run(Steps(pause=0.02), 2, last=30)
    for _ in range(2):  # after these, both workers are running
        next(batches)
    for child in multiprocessing.active_children():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal_from_outside(child.pid, number)
    assert len(list(batches)) == 28


def test_a_worker_that_is_killed_is_one_line_where_batches_are_asked_for():
    handler = signal.getsignal(signal.SIGCHLD)
    batches = run(Steps(pause=0.02), 1, last=1000)
    next(batches)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    time.sleep(0.2)  # stands for a step of the training
    with pytest.raises(OrthoFxError, match=r"^a worker that loads data is gone, try fewer workers: [^\n]+$"):
        list(batches)
    assert signal.getsignal(signal.SIGCHLD) == handler
    assert no_workers()


def test_a_program_that_fails_ends_with_its_workers(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from ortho_fx.models.data.loader import load\n"
        "from ortho_fx.models.data.text import StandardLibrary\n"
        "batches = load(StandardLibrary(8), seed=0, first=0, last=1000, size=4, rows=[slice(None)], workers=2)\n"
        "next(batches)\n"
        "1 / 0\n"
    )
    done = subprocess.run([sys.executable, script], cwd=Path(__file__).parents[3], capture_output=True, timeout=60)
    assert done.returncode == 1
    assert b"ZeroDivisionError" in done.stderr
