"""Where the curves of a run are shown: TensorBoard, Weights & Biases, or trackio.

The files of `log.py` are written in any case. They alone decide what a resumed run continues.
"""

from __future__ import annotations

import importlib
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ortho_fx.errors import OrthoFxError
from ortho_fx.files import reason

PROJECT = "ortho_fx"


class Logger(Protocol):
    """Shows numbers by their names, for each step."""

    def add(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


def require_logger(name: str) -> None:
    """Raises an `OrthoFxError` if the package of a logger is missing; TensorBoard is used where it is installed."""
    if name in ("wandb", "trackio"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            missing = isinstance(error, ModuleNotFoundError) and error.name == name
            told = f"pip install {name}" if missing else reason(error)
            raise OrthoFxError(f"log {name!r} needs {name}: {told}; or choose another by --log") from None


def open_logger(name: str, directory: Path, first: int, settings: Mapping[str, Any]) -> Logger | None:
    """The logger of a run that has done `first` steps; None for "none", and without TensorBoard.

    Args:
        name: tensorboard, wandb, trackio or none.
        directory: the run's directory, which exists.
        first: number of steps done; a new run has 0.
        settings: those of the run, which Weights & Biases and trackio show beside it.

    Raises:
        OrthoFxError: a directory that cannot be written, or a logger that does not start.
    """
    if name == "tensorboard":
        return _open_board(directory / "tensorboard", first)
    if name == "none":
        return None
    require_logger(name)
    return _Tracker(name, directory, first, settings)


class _Board:
    """TensorBoard's event files in a directory."""

    def __init__(self, writer: Any, directory: Path) -> None:
        self._writer, self._directory = writer, directory

    def add(self, values: Mapping[str, float], step: int) -> None:
        try:
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, step)
            self._writer.flush()
        except OSError as error:
            raise OrthoFxError(f"cannot write {self._directory}: {error.strerror}") from None

    def close(self) -> None:
        self._writer.close()


class _Tracker:
    """A run of Weights & Biases, or of trackio, which has the same functions.

    A resumed run goes on in the same curves: its id, or its name in trackio, is in a file of the run's directory.
    Weights & Biases leaves out steps that it has seen already, and a resumed run repeats those after its checkpoint. So
    the step is a value of its own there.
    """

    def __init__(self, name: str, directory: Path, first: int, settings: Mapping[str, Any]) -> None:
        self._name, self._library = name, importlib.import_module(name)
        own = f"{directory.name}-{self._identity(directory / f'{name}.id', first)}"
        common: dict[str, Any] = {"project": PROJECT, "config": dict(settings), "resume": "allow"}
        try:
            if name == "wandb":
                quiet = self._library.Settings(console="off")
                self._run = self._library.init(
                    id=own, name=directory.name, dir=str(directory), settings=quiet, **common
                )
                self._run.define_metric("*", step_metric="step")
            else:
                self._run = self._library.init(name=own, **common)
        except Exception as error:  # each has errors of its own
            raise OrthoFxError(f"{name} does not start: {reason(error)}; {self._advice()}") from None

    def add(self, values: Mapping[str, float], step: int) -> None:
        try:
            if self._name == "wandb":
                self._run.log({**values, "step": step})
            else:
                self._run.log(dict(values), step=step)
        except Exception as error:
            raise OrthoFxError(f"{self._name} does not take step {step}: {reason(error)}") from None

    def close(self) -> None:
        try:
            self._run.finish()
        except Exception as error:
            raise OrthoFxError(f"{self._name} does not end: {reason(error)}; the run's own files are whole") from None

    def _advice(self) -> str:
        offline = "WANDB_MODE=offline needs no account; " if self._name == "wandb" else ""
        return f"{offline}--log none shows the run nowhere"

    @staticmethod
    def _identity(path: Path, first: int) -> str:
        try:
            if first and path.exists():
                return path.read_text(encoding="utf-8").strip()
            made = secrets.token_hex(4)
            path.write_text(made + "\n", encoding="utf-8")
        except OSError as error:
            raise OrthoFxError(f"cannot write {path}: {error.strerror}") from None
        return made


def _open_board(directory: Path, first: int) -> _Board | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    try:
        if not first:
            # Otherwise TensorBoard would also show the curves of an earlier run in this directory.
            for events in directory.glob("events.out.tfevents.*"):
                events.unlink()
        return _Board(SummaryWriter(str(directory), purge_step=first + 1 if first else None), directory)
    except OSError as error:
        raise OrthoFxError(f"cannot write {directory}: {error.strerror}") from None
