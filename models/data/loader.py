"""Worker processes compute the batches of the next steps while the model trains."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from ortho_fx.errors import OrthoFxError
from ortho_fx.models.data.batch import Batch, Data

T = TypeVar("T")


def load(
    data: Data,
    *,
    seed: int,
    first: int,
    last: int,
    size: int,
    rows: Sequence[slice],
    workers: int,
    prefetch: int = 2,
    pin: bool = False,
) -> Generator[list[Batch], None, None]:
    """Yields the micro-batches of each step from `first` to before `last`, the same for any number of workers.

    The worker processes end when the generator ends or is closed.

    Args:
        data: source of the batches; it is pickled if workers are not forked.
        seed: of the run.
        first, last: steps.
        size: rows of the global batch.
        rows: rows of it in each micro-batch of this process.
        workers: processes that compute batches, with one thread each; 0 computes each batch here when it is asked for.
        prefetch: number of steps that each worker computes ahead.
        pin: put batches into page-locked memory, from which a GPU copies faster.

    Raises:
        OrthoFxError: `data` raised it, or a worker died.
    """
    counts = [len(range(size)[part]) for part in rows]
    steps = _Steps(data, seed, size, rows)
    with contextlib.closing(_computed(steps, range(first, last), workers, prefetch, pin)) as batches:
        for inputs, targets in batches:
            yield list(zip(inputs.split(counts), targets.split(counts), strict=True))


def load_validation(
    data: Data, *, size: int, rows: slice = slice(None), workers: int = 0, prefetch: int = 2, pin: bool = False
) -> Generator[Batch, None, None]:
    """Yields these rows of every validation batch of `size`. Arguments and errors are those of `load`."""
    numbers = range(data.validation_batches(size))
    return _computed(_Validation(data, size, rows), numbers, min(workers, len(numbers)), prefetch, pin)


def _computed(
    batches: _Batches, numbers: range, workers: int, prefetch: int, pin: bool
) -> Generator[Batch, None, None]:
    """The batches of these numbers, in their order, from DataLoader."""
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        collate_fn=_as_it_is,
        pin_memory=pin,
        worker_init_fn=_heed_the_parent_alone,
        # Without a generator, DataLoader draws from PyTorch's global one, and a resumed run would draw once more.
        generator=torch.Generator(),
    )
    before, death = signal.getsignal(signal.SIGCHLD), ""
    with _sigterm_blocked():
        computed = iter(loader)
    if before is not None and threading.current_thread() is threading.main_thread():
        # DataLoader's handler would raise a worker's death anywhere in the training; the except below finds it too.
        signal.signal(signal.SIGCHLD, before)
    try:
        for batch in computed:
            if isinstance(batch, OrthoFxError):
                raise batch
            yield batch
    except (RuntimeError, OSError, EOFError) as error:
        # DataLoader starts an error of the data with "Caught"; anything else means that a worker died.
        if not workers or str(error).startswith("Caught"):
            raise
        death = str(error) or type(error).__name__
    finally:
        # Workers end when the last reference is dropped, and the traceback of an error would keep this one.
        del computed
    if death:
        # Most often the machine ran out of memory, or of shared memory, which batches pass through.
        raise WorkerLost(f"a worker that loads data is gone, try fewer workers: {' '.join(death.split())}")


class WorkerLost(OrthoFxError):
    """A process that loads data has died."""


class _Batches(ABC, Dataset["Batch | OrthoFxError"]):
    """Batches by number."""

    def __getitem__(self, number: int) -> Batch | OrthoFxError:
        try:
            return self.compute(number)
        except OrthoFxError as error:
            # Returned, not raised: DataLoader would put the worker's traceback into the message.
            return error

    @abstractmethod
    def compute(self, number: int) -> Batch: ...


class _Steps(_Batches):
    def __init__(self, data: Data, seed: int, size: int, rows: Sequence[slice]) -> None:
        self.data, self.seed, self.size, self.rows = data, seed, size, rows

    def compute(self, number: int) -> Batch:
        parts = [self.data.batch(self.seed, number, self.size, part) for part in self.rows]
        # Each tensor in transfer takes a file descriptor. Many micro-batches would need too many.
        inputs, targets = (torch.cat(tensors) if len(parts) > 1 else tensors[0] for tensors in zip(*parts, strict=True))
        return inputs, targets


class _Validation(_Batches):
    def __init__(self, data: Data, size: int, rows: slice) -> None:
        self.data, self.size, self.rows = data, size, rows

    def compute(self, number: int) -> Batch:
        return self.data.validation_batch(number, self.size, self.rows)


def _as_it_is(step: T) -> T:
    return step


@contextlib.contextmanager
def _sigterm_blocked() -> Iterator[None]:
    """Processes that start in the block have SIGTERM blocked in all of their threads.

    PyTorch makes its thread pool anew after a fork, before our code runs in a worker. A single thread that does not
    block SIGTERM would end the worker.
    """
    if not hasattr(signal, "sigwaitinfo"):  # not on macOS, nor on Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _heed_the_parent_alone(worker: int) -> None:
    # Ctrl-C reaches every process of a terminal, and a scheduler sends SIGTERM to every process of a job. The run then
    # finishes its step and saves, for which it needs its batches. It ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        threading.Thread(target=_wait_for_the_parent, daemon=True).start()


def _wait_for_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        pass
    os._exit(0)
