"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ortho_fx.errors import OrthoFxError


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A path of that name in a temporary folder beside it, whose files move there when the block ends without an error.

    Whoever writes may do so in its own way, opening that path, replacing what is there, or writing more files beside
    it. Folders are made as needed.

    Raises:
        OrthoFxError: the disk is full or cannot be written; what `path` held before is untouched.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            temporary = Path(folder, path.name)
            with temporary.open("wb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            yield temporary
            # What lies beside it first: the file is then never without that.
            for written in sorted(Path(folder).iterdir(), key=lambda written: written == temporary):
                # safetensors leaves a file that its owner alone can read.
                written.chmod(mode)
                with written.open("rb+") as file:
                    os.fsync(file.fileno())
                written.replace(path.with_name(written.name))
    except (OSError, RuntimeError) as error:
        if not _is_of_writing(error):
            raise
        raise OrthoFxError(f"cannot save {path}: {reason(error)}; an earlier file there is untouched") from None


def _is_of_writing(error: BaseException) -> bool:
    """Whether an error is the file system's, or that of PyTorch's writer of archives about it."""
    chain = (error, error.__cause__, error.__context__)
    return any(isinstance(part, OSError) for part in chain) or "inline_container" in str(error)


def reason(error: BaseException) -> str:
    """One line: the system's reason where there is one, else the error's message, or its class where it has none."""
    # PyTorch's writers answer a failed write with a RuntimeError that only speaks of positions in the file.
    for system in (error, error.__cause__, error.__context__):
        if isinstance(system, OSError) and system.strerror:
            return system.strerror
    return next(iter(str(error).splitlines()), type(error).__name__)
