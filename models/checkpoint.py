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
    except (OSError, RuntimeError) as error:  # PyTorch's zip writer turns a full disk into a RuntimeError
        temporary.unlink(missing_ok=True)
        raise OrthoFxError(f"cannot save {path}: {_reason(error)}; an earlier checkpoint there is untouched") from None


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
        version, saved = state["version"], state["configuration"]
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
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
    """The first line of the error's message, or its class where it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)
