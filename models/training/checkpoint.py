"""Checkpoints: one directory for each step. It gets its name only when it is complete, so a failed save loses nothing.

    checkpoints/step-00000500/state.json    configuration, step, processes, versions
    checkpoints/step-00000500/*.distcp      the tensors, written by torch.distributed.checkpoint

Tensors have their qualified names, and each process writes its shards. So a run can resume with another number of
processes, wrapped by DDP, sharded by FSDP2 or alone. PyTorch reads the directory's index with pickle: resume only from
checkpoints that you trust. To share weights, use model.safetensors.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ortho_fx.errors import OrthoFxError
from ortho_fx.files import reason
from ortho_fx.models.recipe import differences
from ortho_fx.models.training.processes import Processes

VERSION = 2
_FAILURES = (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, CheckpointException)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its directory, the step that it is of, and the number of skipped steps until then."""

    path: Path
    step: int
    skipped: int


def save_checkpoint(
    directory: Path,
    step: int,
    state: Mapping[str, Any],
    configuration: Mapping[str, Any],
    processes: Processes,
    keep: int,
    *,
    skipped: int = 0,
) -> Path:
    """Writes the checkpoint of a step, flushed to the disk, and removes all but the newest `keep`.

    Every process has to call it, with its own shards in `state`. `skipped` is the number of skipped steps so far.

    Raises:
        OrthoFxError: the disk is full or cannot be written; earlier checkpoints are untouched.
    """
    path = directory / f"step-{step:08d}"
    partial = path.with_name(path.name + ".partial")
    try:
        if processes.rank == 0:
            _remove(partial)
            partial.mkdir(parents=True)
        processes.wait()
        with _one_process_is_meant():
            save(dict(state), storage_writer=FileSystemWriter(partial), no_dist=processes.count == 1)
        if processes.rank == 0:
            described = {
                "version": VERSION,
                "configuration": dict(configuration),
                "step": step,
                "skipped": skipped,
                "processes": processes.count,
                "torch": torch.__version__,
                "random numbers": "each step seeds PyTorch's generators from the seed, the step and the rank",
            }
            with (partial / "state.json").open("w") as file:
                file.write(json.dumps(described, indent=1) + "\n")
                file.flush()
                os.fsync(file.fileno())
            _remove(path)
            partial.rename(path)
            _flush(directory)
            for old in (*checkpoints(directory)[:-keep], *directory.glob("*.partial")):
                _remove(old)
        processes.wait()
    except _FAILURES as error:
        if processes.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise OrthoFxError(f"cannot save {path}: {_reason(error)}; earlier checkpoints are untouched") from None
    return path


def checkpoints(directory: Path) -> list[Path]:
    """The complete checkpoints in a directory, the newest last."""
    return sorted(path.parent for path in directory.glob("step-*/state.json") if path.parent.suffix != ".partial")


def newest_checkpoint(directory: Path, configuration: Mapping[str, Any]) -> Checkpoint:
    """The newest checkpoint of a directory.

    Raises:
        OrthoFxError: no checkpoint, one that cannot be read, one of another version, or one of another configuration;
            the error then lists the fields that differ.
    """
    found = checkpoints(directory)
    if not found:
        raise OrthoFxError(f"there is no checkpoint in {directory} to resume from")
    path = found[-1]
    try:
        described = json.loads((path / "state.json").read_text())
        version, saved = described["version"], dict(described["configuration"])
        newest = Checkpoint(path, int(described["step"]), int(described["skipped"]))
    except _FAILURES as error:
        raise OrthoFxError(f"{path} is not a readable checkpoint: {_reason(error)}") from None
    if version != VERSION:
        raise OrthoFxError(f"{path} has checkpoint version {version}; this release reads version {VERSION}")
    different = differences(saved, configuration)
    if different:
        raise OrthoFxError(f"{path} is of another configuration: {', '.join(different)}")
    return newest


def load_tensors(path: Path, state: dict[str, Any], processes: Processes) -> None:
    """Reads a checkpoint into `state`, whose tensors are like those that were saved. Every process has to call it.

    Raises:
        OrthoFxError: a checkpoint that cannot be read, or that holds other tensors than `state`.
    """
    try:
        with _one_process_is_meant():
            load(state, storage_reader=FileSystemReader(path), no_dist=processes.count == 1)
    except (Exception, CheckpointException) as error:  # a damaged index can make pickle raise any exception
        raise OrthoFxError(f"{path} is not a readable checkpoint: {_reason(error)}") from None


def remove_checkpoints(directory: Path) -> None:
    """Removes every checkpoint of a directory, unfinished ones too."""
    for path in directory.glob("step-*"):
        _remove(path)


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)


@contextlib.contextmanager
def _one_process_is_meant() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield


def _flush(directory: Path) -> None:
    # The rename is safe on the disk only after the directory itself is flushed.
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        # Its own text is long: the error and traceback of each process. One process' error is enough.
        error = next((failure[0] for failure in error.failures.values()), error)
    return reason(error)
