"""Errors as one line: what an exception of any kind becomes on the standard error, and how names are printed.

The commands raise `OrthoFxError` for the mistakes that they look for. What the system, the allocator or a library
raises besides becomes one line too: a folder without permission, a full disk, a size that no memory holds.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from ortho_fx.errors import OrthoFxError

# With this variable set, Python's traceback comes before the line.
TRACEBACK = "ORTHO_FX_TRACEBACK"
_LONGEST = 2000
# What PyTorch's allocators say; their errors are plain RuntimeErrors.
_OF_MEMORY = (
    "DefaultCPUAllocator",
    "out of memory",
    "alloc_cpu",
    "Storage size calculation",
    "overflow",
    "unpack long",
)


def quoted(text: str, lines: bool = False) -> str:
    """The text with escapes for what is not printable: control characters, invalid bytes, marks of direction.

    A name can neither end a line nor reach the terminal as a command. With `lines`, newlines and tabs stay.
    """
    kept = "\n\t" if lines else ""
    return "".join(
        char if char.isprintable() or char in kept else char.encode("unicode_escape", "surrogatepass").decode()
        for char in text
    )


def shortened(text: str, longest: int = _LONGEST) -> str:
    """The text with its middle left out, if it is longer than that many characters."""
    return text if len(text) <= longest else f"{text[: longest // 2]} ... {text[-longest // 2 :]}"


def said(error: BaseException) -> str:
    """What an error says, on one line."""
    return shortened(quoted(_described(error)))


def say(text: object, file: TextIO | None = None) -> None:
    """Prints lines whose names may come from files; see `quoted`."""
    print(quoted(str(text), lines=True), file=sys.stdout if file is None else file, flush=True)


def say_or_end(text: object, kept: str) -> None:
    """Prints lines as `say` does. If nobody reads them any more, an `OrthoFxError` ends the command and says `kept`."""
    try:
        say(text)
    except OSError as error:
        raise OrthoFxError(f"cannot write to the standard output: {error.strerror}; {kept}") from None


def report(error: BaseException) -> None:
    """Prints an error as one line on the standard error."""
    if os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    with contextlib.suppress(OSError):  # nobody can be told
        print(f"ortho-fx: error: {said(error)}", file=sys.stderr, flush=True)


def _described(error: BaseException) -> str:
    text = str(error).strip()
    if isinstance(error, OrthoFxError):
        return text
    if isinstance(error, OSError):
        place = error.filename
        named = f"cannot use {shortened(os.fsdecode(place), 200)}: " if isinstance(place, str | bytes) else ""
        return named + (error.strerror or text or "an error of input or output")
    first = " ".join(text.split())
    if isinstance(error, MemoryError) or any(sign in text for sign in _OF_MEMORY):
        reason = first.partition(" Exception raised from")[0].partition(". Error code")[0]
        return f"what was asked for is larger than memory, or than numbers go: choose smaller sizes ({reason})"
    if isinstance(error, RecursionError):
        return "what was given is nested too deeply to be read"
    if isinstance(error, UnicodeError):
        return f"text that cannot be written or read: {first}"
    return f"{type(error).__name__}: {first or 'without a message'}; {TRACEBACK}=1 shows where"


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Within the block, output can be printed: closed streams lead nowhere, and no character is refused."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number that is free, so no file of ours gets that of a stream, which libraries write to.
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for name, stream in zip(("stdout", "stderr"), before, strict=True):
            if stream is None:
                getattr(sys, name).close()
                setattr(sys, name, None)


def abandon_output() -> None:
    """Lets what is still to be printed lead nowhere, so that Python does not fail at its end."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
