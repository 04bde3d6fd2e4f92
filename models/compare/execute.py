"""Trains the runs of a comparison: one after the other in this process, or several at a time in processes of their own.

A process trains one run on one thread, and ends with this one. Whatever ends this process before its last run, a run
under way is saved first if there is time for it: after Ctrl-C and SIGTERM, and after an error of another run.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch

from ortho_fx.errors import OrthoFxError, Terminated
from ortho_fx.models.compare.tuning import Trial
from ortho_fx.models.recipe import TrainConfig
from ortho_fx.models.training.checkpoint import checkpoints
from ortho_fx.models.training.loop import Diverged, train
from ortho_fx.models.training.signals import Signals


@dataclass(frozen=True)
class Job:
    """A run to train: its activation's label, how lines about it call it, its settings, and the trial that it is."""

    label: str
    title: str
    config: TrainConfig
    trial: Trial | None = None


# Gets a job and why it diverged, or None.
Done = Callable[[Job, str | None], None]


def train_all(
    jobs: Sequence[Job],
    at_once: int,
    done: Done,
    progress: Callable[[str], None],
    to_go_on: str,
    prepare: Callable[[], None] | None = None,
) -> None:
    """Trains every job, from its newest checkpoint if it has one, and calls `done` after each.

    Args:
        jobs: in their order.
        at_once: how many are trained at a time.
        done: called in this process.
        progress: called with a line when a job begins.
        to_go_on: what a run that ends early advises.
        prepare: called first in each process that is started, to register bases; a function of a module.

    Raises:
        OrthoFxError: any error of `train` except `Diverged`, or a process that is gone.
        KeyboardInterrupt, Terminated: after SIGINT or SIGTERM, once the runs under way are saved.
    """
    if at_once > 1:
        _in_processes(jobs, at_once, done, progress, to_go_on, prepare)
        return
    for job in jobs:
        progress(job.title)
        done(job, train_one(job.config, to_go_on))


def train_one(config: TrainConfig, to_go_on: str) -> str | None:
    """Trains one run; returns why it diverged, or None."""
    # The previous run's compiled code is of no use here, and it counts towards the compiler's recompilation limits.
    torch.compiler.reset()
    gc.collect()
    try:
        train(config, resume=bool(checkpoints(config.directory / "checkpoints")), to_go_on=to_go_on)
    except Diverged as error:
        return str(error)
    return None


def _in_processes(
    jobs: Sequence[Job],
    at_once: int,
    done: Done,
    progress: Callable[[str], None],
    to_go_on: str,
    prepare: Callable[[], None] | None,
) -> None:
    # A forked process would inherit the threads of PyTorch in an unknown state.
    context = multiprocessing.get_context("spawn")
    waiting, running = list(jobs), dict[Connection, tuple[Job, BaseProcess]]()
    with Signals():
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    job = waiting.pop(0)
                    progress(job.title)
                    receiver, sender = context.Pipe(duplex=False)
                    process: BaseProcess = context.Process(target=_work, args=(job.config, to_go_on, sender, prepare))
                    with _interrupts_ignored():
                        process.start()
                    sender.close()
                    running[receiver] = (job, process)
                for ready in wait(list(running)):
                    assert isinstance(ready, Connection)
                    job, process = running.pop(ready)
                    done(job, _answer(job, process, ready))
        finally:
            # Empty unless something ended the loop.
            for _, left in running.values():
                left.terminate()
            for _, left in running.values():
                left.join()


def _answer(job: Job, process: BaseProcess, receiver: Connection) -> str | None:
    try:
        kind, text = receiver.recv()
    except EOFError:
        process.join()
        raise OrthoFxError(
            f"the process of {job.title} is gone, with exit code {process.exitcode}; the same command goes on"
        ) from None
    process.join()
    if kind == "error":
        raise OrthoFxError(text)
    if kind == "interrupt":
        raise KeyboardInterrupt(text)
    return text


def _work(config: TrainConfig, to_go_on: str, sender: Connection, prepare: Callable[[], None] | None) -> None:
    """Trains a run in a process of its own, and sends its end."""
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    torch.set_num_threads(1)
    # The lines of several runs at a time would mix.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        if prepare is not None:
            prepare()
        answer = ("done", train_one(config, to_go_on))
    except OrthoFxError as error:
        answer = ("error", str(error))
    except KeyboardInterrupt as end:
        answer = ("interrupt", str(end))
    except Terminated as end:
        answer = ("interrupt", end.kept)
    except Exception as error:
        answer = ("error", f"{config.directory}: {type(error).__name__}: {' '.join(str(error).split())}")
    sender.send(answer)


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """A process that starts in the block ignores Ctrl-C, until its run heeds it: the one that started it ends it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
