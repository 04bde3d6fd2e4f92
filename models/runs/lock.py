"""A lock on a folder, so that two processes do not write it at the same time.

The system holds it (`flock`) and frees it when its process ends, however it ends. The file `.lock` names the process.
On a network file system without `flock`, and on Windows, there is no lock.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import weakref
from collections.abc import Iterator
from pathlib import Path

from ortho_fx.errors import OrthoFxError

_NAME = ".lock"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


class _Held:
    """The open file of a lock."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def forget(self) -> None:
        os.close(self.handle)


_held: weakref.WeakSet[_Held] = weakref.WeakSet()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder, which is made if it is missing.

    Raises:
        OrthoFxError: another process holds it, or a folder that cannot be written.
    """
    path = folder / _NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        raise OrthoFxError(f"cannot write to {folder}: {error.strerror}") from None
    held = _Held(handle)
    _held.add(held)
    try:
        _take(handle, folder)
        yield
    finally:
        _held.discard(held)
        held.forget()


def _take(handle: int, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.truncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    except BlockingIOError:
        holder = os.read(handle, 200).decode(errors="replace").strip() or "a process"
        raise OrthoFxError(
            f"another run is in {folder}: {holder} writes it; wait for its end, or choose another --out"
        ) from None
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise OrthoFxError(f"cannot lock {folder}: {error.strerror}") from None


def _leave_to_the_parent() -> None:
    # A forked process has the file open too, and would hold the lock for as long as it lives.
    for held in _held:
        held.forget()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_the_parent)
