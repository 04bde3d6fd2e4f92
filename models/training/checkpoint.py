"""Checkpoints: one directory for each step. It gets its name only when it is complete, so a failed save loses nothing.

    checkpoints/step-00000500/state.json    configuration, step, processes, versions, and a digest of every file
    checkpoints/step-00000500/*.distcp      the tensors, written by torch.distributed.checkpoint
    checkpoints/step-00000500/.metadata     their index

Tensors have their qualified names, and each process writes its shards. So a run can resume with another number of
processes, wrapped by DDP, sharded by FSDP2 or alone.

A checkpoint is read only if every file has its digest, and `state.json` has one of itself. Otherwise the next older one
is read. Reading runs no code from a checkpoint; see `ortho_fx.models.training.stored`. Version 2 had no digests; it is
still read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ortho_fx.errors import OrthoFxError
from ortho_fx.files import reason
from ortho_fx.models.recipe import differences
from ortho_fx.models.runs.files import RowsWritten
from ortho_fx.models.training.processes import Processes
from ortho_fx.models.training.stored import Digest, difference, read_tensors, write_tensors
from ortho_fx.processes import gathered, together

VERSION = 3
_WITHOUT_DIGESTS = 2
_FAILURES = (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError)
_NAME = re.compile(r"step-(\d{8,})")
# What an interrupted save or removal leaves: a folder with a random name, or, from version 2, with this one.
_UNFINISHED = re.compile(r"\.step-\d{8,}\..+\.partial|step-\d{8,}\.partial")


@dataclass(frozen=True)
class Checkpoint:
    """What `state.json` says.

    Attributes:
        path: the checkpoint's directory.
        step: the step that it is of.
        skipped: number of skipped steps until then.
        configuration: the settings of its run.
        data: digest of the run's data; None in version 2.
        rows: the rows that the run had written, by the name of their file; empty in version 2.
        files: digests of the other files; empty in version 2.
    """

    path: Path
    step: int
    skipped: int
    configuration: Mapping[str, Any]
    data: str | None = None
    rows: Mapping[str, RowsWritten] = field(default_factory=dict)
    files: Mapping[str, Digest] = field(default_factory=dict)


def save_checkpoint(
    directory: Path,
    step: int,
    state: Mapping[str, Any],
    configuration: Mapping[str, Any],
    processes: Processes,
    keep: int,
    *,
    skipped: int = 0,
    data: str | None = None,
    rows: Mapping[str, RowsWritten] | None = None,
) -> Path:
    """Writes the checkpoint of a step, flushed to the disk, and removes all but the newest `keep`.

    Every process has to call it, with its own shards in `state`. The other arguments are those of the first process;
    see `Checkpoint`. Checkpoints of later steps are removed as well: the run has gone back behind them.

    Raises:
        OrthoFxError: the disk is full or cannot be written; earlier checkpoints are untouched.
    """
    path = directory / f"step-{step:08d}"
    leads = processes.rank == 0
    made = ""
    try:
        made = together(lambda: _new_folder(directory, path.name) if leads else "")[0]
        partial = Path(made)
        found = together(lambda: write_tensors(partial, state, processes.count == 1))
        described = {
            "version": VERSION,
            "configuration": dict(configuration),
            "step": step,
            "skipped": skipped,
            "data": data,
            "rows": {name: asdict(written) for name, written in (rows or {}).items()},
            "files": {name: digest.to_json() for part in found for name, digest in part.items()},
            "processes": processes.count,
            "torch": torch.__version__,
            "random numbers": "each step seeds PyTorch's generators from the seed, the step and the rank",
        }
        together(lambda: _complete(partial, path, described) if leads else None)
    except _FAILURES as error:
        if leads and made:
            shutil.rmtree(made, ignore_errors=True)
        raise OrthoFxError(f"cannot save {path}: {reason(error)}; earlier checkpoints are untouched") from None
    if leads:
        # What cannot be removed is no reason to end a run that has saved.
        complete = checkpoints(directory)
        until = [other for other in complete if _step(other) <= step]
        for old in (*until[:-keep], *complete[len(until) :], *_unfinished(directory)):
            _remove(old)
    return path


def checkpoints(directory: Path) -> list[Path]:
    """The complete checkpoints in a directory, the newest last."""
    found = (path.parent for path in directory.glob("step-*/state.json") if _NAME.fullmatch(path.parent.name))
    return sorted(found, key=_step)


def load_checkpoint(
    directory: Path,
    configuration: Mapping[str, Any],
    state: dict[str, Any],
    processes: Processes,
    *,
    data: str | None = None,
    rows_differ: Callable[[Checkpoint], str | None] = lambda checkpoint: None,
) -> tuple[Checkpoint, str | None]:
    """Reads the newest whole checkpoint of a directory into `state`, whose tensors are like those that were saved.

    Every process has to call it.

    Args:
        directory: the checkpoints.
        configuration: the settings of this run.
        state: as `save_checkpoint` takes it.
        processes: this process and the others.
        data: digest of this run's data.
        rows_differ: says how the rows of the run differ from those that a checkpoint was saved with; None if they do
            not.

    Returns:
        The checkpoint, and one line about newer ones that are damaged; None if there are none.

    Raises:
        OrthoFxError: no checkpoint, none that is whole, one of another version or configuration (the error lists the
            fields that differ), or one of a run on other data.
    """
    if not checkpoints(directory):
        raise OrthoFxError(f"there is no checkpoint in {directory} to resume from")
    damaged: list[str] = []
    named = (path for path in directory.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir())
    for path in sorted(named, key=_step, reverse=True):
        try:
            checkpoint = _described(path)
            _check_settings(checkpoint, configuration, data)
            _check_files(checkpoint, processes, rows_differ)
            _load_tensors(checkpoint, state, processes)
        except _Damaged as problem:
            damaged.append(str(problem))
            continue
        return checkpoint, f"{'; '.join(damaged)}; goes on from {path}" if damaged else None
    raise OrthoFxError(
        f"{'; '.join(damaged)}; no checkpoint is whole: bring one back from a copy, or remove {directory} to start anew"
    )


def remove_checkpoints(directory: Path) -> None:
    """Removes every checkpoint of a directory, unfinished ones too."""
    for path in (*directory.glob("step-*"), *_unfinished(directory)):
        if _NAME.fullmatch(path.name) or _UNFINISHED.fullmatch(path.name):
            _remove(path)


class _Damaged(OrthoFxError):
    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path} is not a readable checkpoint: {problem}")


def _new_folder(directory: Path, name: str) -> str:
    directory.mkdir(parents=True, exist_ok=True)
    return tempfile.mkdtemp(prefix=f".{name}.", suffix=".partial", dir=directory)


def _complete(partial: Path, path: Path, described: Mapping[str, Any]) -> None:
    """Writes `state.json`, and gives the checkpoint its name."""
    with (partial / "state.json").open("x", encoding="utf-8") as file:
        file.write(_sealed(described))
        file.flush()
        os.fsync(file.fileno())
        # mkdtemp makes folders that only their owner can enter. Who may read the file may enter.
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        partial.chmod(mode | (mode & 0o444) >> 2)
    _remove(path)
    partial.rename(path)
    _flush(path.parent)


def _sealed(described: Mapping[str, Any]) -> str:
    """The text of `state.json`: these values, and the digest of their text."""
    digest = hashlib.sha256(json.dumps(described, indent=1).encode()).hexdigest()
    return json.dumps({**described, "sha256": digest}, indent=1) + "\n"


def _described(path: Path) -> Checkpoint:
    try:
        text = (path / "state.json").read_text(encoding="utf-8")
        described = json.loads(text)
        version, digest = described["version"], described.pop("sha256", None)
        if (digest is not None or version == VERSION) and text != _sealed(described):
            raise _Damaged(path, "the content of state.json has changed")
        if version == _WITHOUT_DIGESTS and "files" in described:
            raise _Damaged(path, "the content of state.json has changed")
        if version not in (VERSION, _WITHOUT_DIGESTS):
            raise OrthoFxError(
                f"{path} has checkpoint version {version!r}; this release reads {_WITHOUT_DIGESTS} and {VERSION}"
            )
        checkpoint = Checkpoint(
            path,
            int(described["step"]),
            int(described["skipped"]),
            dict(described["configuration"]),
            described.get("data"),
            {name: RowsWritten(**written) for name, written in described.get("rows", {}).items()},
            {name: Digest.from_json(digest) for name, digest in described.get("files", {}).items()},
        )
    except OrthoFxError:
        raise
    except ImportError as error:
        raise OrthoFxError(f"{path} has {error}") from None
    except (*_FAILURES, AttributeError, RecursionError) as error:
        raise _Damaged(path, f"state.json: {reason(error)}") from None
    if checkpoint.step != _step(path):
        raise _Damaged(path, f"state.json is of step {checkpoint.step}")
    if any(Path(name).name != name for name in checkpoint.files):
        raise _Damaged(path, "state.json names files that are not beside it")
    return checkpoint


def _check_settings(checkpoint: Checkpoint, configuration: Mapping[str, Any], data: str | None) -> None:
    different = differences(checkpoint.configuration, configuration)
    if different:
        raise OrthoFxError(f"{checkpoint.path} is of another configuration: {', '.join(different)}")
    if checkpoint.data is not None and data is not None and checkpoint.data != data:
        name = configuration.get("data")
        raise OrthoFxError(
            f"{checkpoint.path} was trained on other data: both are {name!r}, and their content differs; bring back "
            f"the data that the run began with, or start anew with --overwrite"
        )


def _check_files(checkpoint: Checkpoint, processes: Processes, rows_differ: Callable[[Checkpoint], str | None]) -> None:
    """Compares the files with their digests; each process reads its share of them."""
    problem = rows_differ(checkpoint) if processes.rank == 0 else None
    if problem is None:
        names = list(checkpoint.files)[processes.rank :: processes.count]
        problems = (difference(checkpoint.path, name, checkpoint.files[name]) for name in names)
        problem = next(filter(None, problems), None)
    for told in gathered(problem, None):
        if told is not None:
            raise _Damaged(checkpoint.path, told)


def _load_tensors(checkpoint: Checkpoint, state: dict[str, Any], processes: Processes) -> None:
    try:
        together(lambda: read_tensors(checkpoint.path, state, processes.count == 1))
    except Exception as error:
        raise _Damaged(checkpoint.path, reason(error)) from None


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _unfinished(directory: Path) -> Iterator[Path]:
    return (path for path in directory.glob("*.partial") if _UNFINISHED.fullmatch(path.name))


def _remove(path: Path) -> None:
    """Removes a folder, or a link or file in its place; what a link points to stays."""
    try:
        if path.is_dir() and not path.is_symlink():
            if _NAME.fullmatch(path.name):
                # First the name: a process that is killed here must not leave a checkpoint without some of its files.
                path = path.rename(path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial"))
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError:
        shutil.rmtree(path, ignore_errors=True)


def _flush(directory: Path) -> None:
    # The rename is safe on the disk only after the directory itself is flushed.
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
