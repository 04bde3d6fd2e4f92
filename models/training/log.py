"""The log of a run: rows as JSON and CSV, sites and their coefficients as JSON, and curves for a logger.

Rows are written through at once, so that `tail -f` shows them and a killed run keeps them. A checkpoint keeps their
number and their digest; before it gets its name they are flushed to the disk.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ortho_fx.errors import OrthoFxError
from ortho_fx.models.runs.files import Row, RowsWritten, read_rows, row_line
from ortho_fx.models.training.loggers import Logger, open_logger

ROW_FILES = ("metrics.jsonl", "sites.jsonl", "coefficients.jsonl")
COLUMNS = ("step", "loss", "lr", "gradient_norm", "seconds", "skipped", "validation_loss", "accuracy", "mfu")
# Columns that a logger shows, with their names there; it groups curves by the part before the slash.
_TAGS = {
    "loss": "loss/training",
    "validation_loss": "loss/validation",
    "accuracy": "validation/accuracy",
    "lr": "training/lr",
    "gradient_norm": "training/gradient_norm",
    "mfu": "training/mfu",
}
_SITE_TAGS = ("std", "drift")


class RunLog:
    """Opens the files of a run that has done `first` steps. Later rows are dropped, since the run writes them again.

    Args:
        directory: the run's directory; made if it is missing.
        first: number of steps done. A new run has 0 and replaces earlier files.
        writes: whether this process writes; only one of a distributed run does.
        logger: what shows the curves besides; see `open_logger`.
        settings: of the run, for the logger.

    Attributes:
        kept: the rows up to `first`.
        kept_sites: the site rows up to `first`.

    Raises:
        OrthoFxError: a file that cannot be written or, on resuming, cannot be read.
    """

    def __init__(
        self,
        directory: Path,
        first: int,
        writes: bool,
        logger: str = "tensorboard",
        settings: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.kept: list[Row] = []
        self.kept_sites: list[Row] = []
        self._files: list[_RowFile] = []
        self._logger: Logger | None = None
        if not writes:
            return
        paths = [directory / name for name in (*ROW_FILES, "metrics.csv")]
        coefficients: list[Row] = []
        if first:
            self.kept, self.kept_sites, coefficients = (
                [row for row in read_rows(path) if row["step"] <= first] if path.exists() else [] for path in paths[:3]
            )
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OrthoFxError(f"cannot write {directory}: {error.strerror}") from None
        header = ",".join(COLUMNS) + "\n"
        texts = (
            "".join(map(row_line, self.kept)),
            "".join(map(row_line, self.kept_sites)),
            "".join(map(row_line, coefficients)),
            header + "".join(map(_csv_line, self.kept)),
        )
        self._files = [_RowFile(path, text) for path, text in zip(paths, texts, strict=True)]
        self._logger = open_logger(logger, directory, first, settings)

    def row(self, row: Mapping[str, Any]) -> None:
        """Writes the row of a step; keys that are not in `COLUMNS` are in the JSON alone.

        Raises:
            OrthoFxError: a file that cannot be written.
        """
        if self._files:
            self._files[0].append(row_line(row))
            self._files[3].append(_csv_line(row))
        if self._logger is not None:
            self._logger.add({_TAGS[name]: value for name, value in row.items() if name in _TAGS}, row["step"])

    def site_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes a measurement of the sites, as `SiteMonitor.measure` returns it.

        Raises:
            OrthoFxError: a file that cannot be written.
        """
        if self._files:
            self._files[1].append("".join(map(row_line, rows)))
        if self._logger is not None and rows:
            values = {f"sites_{name}/{row['site']}": row[name] for row in rows for name in _SITE_TAGS}
            self._logger.add(values, rows[0]["step"])

    def coefficient_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes what the expansions are at a step, as `SiteMonitor.coefficients` returns it.

        Raises:
            OrthoFxError: a file that cannot be written.
        """
        if self._files:
            self._files[2].append("".join(map(row_line, rows)))

    def flush(self) -> dict[str, RowsWritten]:
        """Flushes the rows to the disk; returns what there is in each .jsonl file, by its name.

        Raises:
            OrthoFxError: a file that cannot be written.
        """
        for file in self._files:
            file.flush()
        return {file.path.name: file.written for file in self._files[:3]}

    def close(self) -> None:
        """Closes the files; a killed run too keeps the rows that were written before."""
        for file in self._files:
            file.close()
        self._files = []
        if self._logger is not None:
            logger, self._logger = self._logger, None
            logger.close()


class _RowFile:
    """A file to which rows are appended without a buffer, and whose lines are counted and digested."""

    def __init__(self, path: Path, text: str) -> None:
        self.path = path
        self._count, self._digest = 0, hashlib.sha256()
        # Renamed into place, so that a crash here does not lose the kept rows. "x" opens no file or link that is there.
        partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
        try:
            self._file = partial.open("xb", buffering=0)
            self.write(text)
            self.flush()
            partial.replace(path)
            self._place = _place(path.stat())
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise OrthoFxError(f"cannot write {path}: {error.strerror}") from None

    @property
    def written(self) -> RowsWritten:
        return RowsWritten(self._count, self._digest.hexdigest())

    def append(self, text: str) -> None:
        """Writes lines; an error if the file in the folder is another by now, or gone."""
        try:
            there = _place(self.path.stat())
        except OSError as error:
            raise OrthoFxError(f"cannot write {self.path}: {error.strerror}") from None
        if there != self._place:
            raise OrthoFxError(f"cannot write {self.path}: another file was put in its place")
        self.write(text)

    def write(self, text: str) -> None:
        encoded = text.encode()
        rest = memoryview(encoded)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise OrthoFxError(f"cannot write {self.path}: {error.strerror}") from None
        self._count += encoded.count(b"\n")
        self._digest.update(encoded)

    def flush(self) -> None:
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OrthoFxError(f"cannot write {self.path}: {error.strerror}") from None

    def close(self) -> None:
        self._file.close()


def _place(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _csv_line(row: Mapping[str, Any]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow([_cell(row.get(column)) for column in COLUMNS])
    return line.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return int(value)
    return "nan" if isinstance(value, float) and not math.isfinite(value) else value
