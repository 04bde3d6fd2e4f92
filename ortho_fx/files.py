"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ortho_fx.errors import OrthoFxError


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Gives a path in a temporary folder next to `path`; its files move to `path`'s folder if the block succeeds.

    The path has the same file name. The block may open it, replace it, or write more files next to it. Missing folders
    are made.

    Raises:
        OrthoFxError: the disk is full or cannot be written. An earlier file at `path` is then unchanged.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            temporary = Path(folder, path.name)
            with temporary.open("wb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            yield temporary
            # The additional files move first, so that the main file never exists without them.
            for written in sorted(Path(folder).iterdir(), key=lambda written: written == temporary):
                # safetensors makes files that only their owner can read.
                written.chmod(mode)
                with written.open("rb+") as file:
                    os.fsync(file.fileno())
                written.replace(path.with_name(written.name))
    except (OSError, RuntimeError) as error:
        if not _is_of_writing(error):
            raise
        raise OrthoFxError(f"cannot save {path}: {reason(error)}; an earlier file there is untouched") from None


def remove_unfinished(folder: Path, names: Iterable[str]) -> None:
    """Removes what a process that was killed has left of files with these names, under the hidden names of a write.

    Raises:
        OSError: a folder that cannot be written.
    """
    begins = tuple(f".{name}." for name in names)
    for left in folder.glob(".*"):
        if left.name.startswith(begins):
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()


def _is_of_writing(error: BaseException) -> bool:
    """Whether an error comes from the file system, directly or through PyTorch's archive writer."""
    chain = (error, error.__cause__, error.__context__)
    return any(isinstance(part, OSError) for part in chain) or "inline_container" in str(error)


def reason(error: BaseException) -> str:
    """One line: the system's reason if there is one, else the error's message, else the name of its class."""
    # After a failed write, PyTorch raises a RuntimeError whose message gives only positions in the file.
    for system in (error, error.__cause__, error.__context__):
        if isinstance(system, OSError) and system.strerror:
            return system.strerror
    return next(iter(str(error).splitlines()), type(error).__name__)
