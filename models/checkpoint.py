"""Checkpoints: one file that says what it holds, replaced in one step, so that a failed save loses nothing."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ortho_fx.errors import OrthoFxError

VERSION = 1


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Writes `state` to a file beside `path`, flushes it to the disk and renames it to `path`.

    Raises:
        OrthoFxError: the disk is full or cannot be written; what `path` held before is untouched.
    """
    temporary = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            torch.save({"version": VERSION, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        raise OrthoFxError(f"cannot save {path}: {_reason(error)}; an earlier checkpoint there is untouched") from None
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: Path, configuration: Mapping[str, Any]) -> dict[str, Any]:
    """The state that `save_checkpoint` wrote, if it is of this configuration.

    Raises:
        OrthoFxError: no checkpoint, one that cannot be read, or one of another version or configuration, with every
            field that differs.
    """
    if not path.exists():
        raise OrthoFxError(f"there is no checkpoint {path} to resume from")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        version, saved = state["version"], dict(state["configuration"])
    except pickle.UnpicklingError:
        # PyTorch's own text advises loading without weights_only, which runs whatever code the file holds.
        raise OrthoFxError(f"{path} is not a readable checkpoint: it is damaged, or holds more than tensors") from None
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError) as error:
        raise OrthoFxError(f"{path} is not a readable checkpoint: {_reason(error)}") from None
    if version != VERSION:
        raise OrthoFxError(f"{path} has checkpoint version {version}; this release reads version {VERSION}")
    different = [
        f"{name} is {saved.get(name)!r} there and {configuration.get(name)!r} here"
        for name in sorted({*saved, *configuration})
        if saved.get(name) != configuration.get(name)
    ]
    if different:
        raise OrthoFxError(f"{path} is of another configuration: {', '.join(different)}")
    return state


def _reason(error: Exception) -> str:
    """One line: the system's reason where there is one, else the error's message, or its class where it has none."""
    # PyTorch's zip writer answers a failed write with a RuntimeError that only speaks of positions in the file.
    system = error if isinstance(error, OSError) else error.__context__
    if isinstance(system, OSError) and system.strerror:
        return system.strerror
    return next(iter(str(error).splitlines()), type(error).__name__)
