"""What the processes of a run know together, and how one of them ends."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch

from ortho_fx.errors import OrthoFxError
from ortho_fx.files import reason

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# For one process' own, where others are not to be waited for.
ALONE = "alone"
_T = TypeVar("_T")


def gathered(value: _T, group: ProcessGroup | str | None) -> list[_T]:
    """The values of all processes of a group, in the order of their ranks; of all there are for None.

    Each of them has to ask. The value alone where `torch.distributed` is not initialised, and for "alone".

    Raises:
        OrthoFxError: another word.
    """
    if isinstance(group, str) and group != ALONE:
        raise OrthoFxError(f"process_group must be a ProcessGroup, None or 'alone'; got {group!r}")
    if isinstance(group, str) or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    size = torch.distributed.get_world_size(group)
    if size == 1 or torch.distributed.get_backend(group) == "fake":  # which answers nothing
        return [value]
    values: list[Any] = [None] * size
    torch.distributed.all_gather_object(values, value, group=group)
    return values


def together(action: Callable[[], _T]) -> list[_T]:
    """The results that all processes have of an action, in the order of their ranks; if it raises in one, all raise.

    Each of them has to ask. Without `torch.distributed` it is the action alone.

    Raises:
        OrthoFxError: the action raised in another process.
    """
    results: list[_T] = []
    failure: Exception | None = None
    try:
        results.append(action())
    except Exception as error:
        failure = error
    told = gathered((results, "" if failure is None else reason(failure)), None)
    if failure is not None:
        raise failure
    for _, text in told:
        if text:
            raise OrthoFxError(text)
    return [result for others, _ in told for result in others]


def measured(measure: Callable[[], dict[str, _T]], group: ProcessGroup | str | None) -> list[dict[str, _T]]:
    """What each process of a group measures at the sites of its model, by their names; where one raises, all do.

    Raises:
        OrthoFxError: another process raised, or holds other sites.
    """
    own: dict[str, _T] = {}
    failure = None
    try:
        own = measure()
    except Exception as error:
        failure = error
    told = gathered(("" if failure is None else f"{type(failure).__name__}: {failure}", own), group)
    if failure is not None:
        raise failure
    for rank, (text, other) in enumerate(told):
        if text:
            raise OrthoFxError(f"process {rank} of the group could not run its inputs: {text}")
        if list(other) != list(told[0][1]):
            missing = ", ".join(sorted(other.keys() ^ told[0][1].keys())) or "their order"
            raise OrthoFxError(
                f"processes 0 and {rank} hold different sites ({missing}), and cannot measure together: pass "
                "process_group=, those that hold the same model, or 'alone'"
            )
    return [other for _, other in told]


def leave(status: int) -> NoReturn:
    """Ends a process of a process group with an exit code, without tearing the interpreter down.

    Threads of Python are waited for, functions of `atexit` run and output is written, as at any other end. Threads of
    gloo are left as they are: one that lets go of a tensor of a collective late, while the interpreter is torn down,
    would abort the process after all of its work was done (PyTorch issue 190489). Python's own `multiprocessing` ends a
    forked process in the same way.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
